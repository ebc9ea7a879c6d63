"""Ends a run that does not learn, since each of its steps is skipped for a gradient not finite."""

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.training.metrics import StepMetrics


class SkippedSteps:
    """Counts the steps in a row that were skipped; the same on all ranks."""

    def __init__(self, run: RunConfig) -> None:
        """Start at none.

        Args:
            run: How many are too many, and the settings that are likely causes.
        """
        self._run, self._num_in_row = run, 0

    def note(self, step: int, metrics: StepMetrics) -> None:
        """Count one step.

        Args:
            step: Steps done, this one included.
            metrics: Its metrics.

        Raises:
            UserError: When training.max_skipped_steps in a row were skipped.
        """
        self._num_in_row = 0 if metrics.was_applied else self._num_in_row + 1
        most = self._run.training.max_skipped_steps
        if self._num_in_row >= most:
            raise UserError(
                f"training.max_skipped_steps: got {most} steps in a row that were skipped, the "
                f"last one step {step}, {self._causes(metrics)}"
            )

    def check_learned(self, updates: int, metrics: StepMetrics) -> None:
        """Raise unless the run, which is at its last step, has changed its weights.

        Args:
            updates: Steps that changed weights since the run began.
            metrics: Metrics of the last step.

        Raises:
            UserError: When there is none.
        """
        if not updates:
            raise UserError(
                f"{self._run.name}: no step changed a weight, {self._causes(metrics)}; no "
                "checkpoint was saved at the end"
            )

    def _causes(self, metrics: StepMetrics) -> str:
        training = self._run.training
        return (
            f"since a gradient was not finite (loss {metrics.loss:.4g}, indexer KL "
            f"{metrics.indexer_kl:.4g}); likely causes are weights that are not finite "
            f"(training.checkpoint.weights={training.checkpoint.weights or '""'}; megatron-keye "
            "convert --check-finite finds them), a training.optimizer.learning_rate too high "
            f"(got {training.optimizer.learning_rate}) or a loss weight "
            f"(training.indexer_loss_weight={training.indexer_loss_weight}, "
            "model.decoder.experts.balance_loss_weight="
            f"{self._run.model.decoder.experts.balance_loss_weight})"
        )

# SPDX-License-Identifier: Apache-2.0
"""What a run that learns from its answers is made of on one rank."""

from dataclasses import replace

from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.data.tokens import END_OF_TEXT, load_tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.parallel.process import Process
from megatron_keye.post_training.judge import check_judge
from megatron_keye.post_training.learning import Learning
from megatron_keye.post_training.prompts import Prompts
from megatron_keye.post_training.reward_pool import RewardPool
from megatron_keye.post_training.rollouts import Rollouts
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.generating_model import open_generating_model
from megatron_keye.training.patch_source import open_patch_source
from megatron_keye.training.trained_model import build_trained_model


class Parts:
    """The model, what generates with it and what trains it, with the same weights."""

    def __init__(
        self, run: RunConfig, process: Process, *, uses_transformer_engine: bool, fusions: Fusions
    ) -> None:
        """Build all parts. Collective: all ranks must call it.

        Args:
            run: The run.
            process: This rank.
            uses_transformer_engine: Whether linear layers and experts are Transformer Engine's.
            fusions: The fused kernels that run.

        Raises:
            UserError: For questions that are malformed, and degrees that do not fit the ranks.
        """
        device, probe_video = process.device, node_cache().probe
        tokenizer = load_tokenizer(run.data.tokenizer)
        self.prompts = Prompts(run, tokenizer, probe_video)
        """The questions."""
        trained = build_trained_model(
            run,
            process,
            probe_video,
            uses_transformer_engine=uses_transformer_engine,
            fusions=fusions,
        )
        self.trained = trained
        """The model with what trains it."""
        self.learning = Learning(
            run,
            trained.grid,
            trained.model,
            trained.step,
            pad_token_id=tokenizer.control_id(END_OF_TEXT),
            open_source=trained.open_patches,
            device=device,
        )
        """Learns from answers."""
        generating = open_generating_model(
            run,
            process,
            trained.grid,
            trained.model,
            uses_transformer_engine=uses_transformer_engine,
            fusions=fusions,
        )
        self._refit = generating.refit
        patches = open_patch_source(generating.run, generating.model, device, probe_video)
        self.engine = EmbeddedEngine(
            generating.run,
            generating.grid,
            generating.model,
            source=patches,
            device=device,
            heartbeat=process.heartbeat,
            refit=generating.refit,
            notes_routes=run.post_training.replays_routes,
        )
        """Answers."""
        pool = RewardPool(_scoring(run)) if process.rank == 0 else None
        self.rollouts = Rollouts(
            run,
            self.engine,
            self.prompts,
            tokenizer,
            pool=pool,
            is_asked_to_stop=lambda: bool(trained.stop.name),
            device=device,
        )
        """Has questions answered and scored."""
        self._closed = [part for part in (patches, pool) if part is not None]

    def refit_figures(self) -> dict[str, float]:
        """Return figures of the last time that weights went to the ranks that generate.

        None where the weights that generate are those that learn.
        """
        if self._refit is None:
            return {}
        return {
            "refit_seconds": self._refit.seconds,
            "refit_bytes": float(self._refit.num_bytes),
        }

    def close(self) -> None:
        """Let go of processes, threads and devices; a save at work may become complete."""
        self.trained.close()
        for part in self._closed:
            part.close()


def _scoring(run: RunConfig) -> PostTrainingConfig:
    """Return the settings of rewards, with a folder for judgements."""
    settings = run.post_training
    check_judge(settings.judge)
    folder = settings.judge.cache_folder or str(run.folder / "judgements")
    return replace(settings, judge=replace(settings.judge, cache_folder=folder))

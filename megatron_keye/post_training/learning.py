# SPDX-License-Identifier: Apache-2.0
"""What a step does with scored answers: log-probabilities before, mini-batches, updates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_keye.config.run import RunConfig
from megatron_keye.data.packing import pack
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.row import RowMeter
from megatron_keye.errors import UserError
from megatron_keye.model import KeyeModel
from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import Grid
from megatron_keye.post_training.answer_rows import LearnedAnswer, answer_rows
from megatron_keye.post_training.answered import AnsweredGroup
from megatron_keye.post_training.log_probs import gather_log_probs
from megatron_keye.post_training.ratios import Ratios, passes_gate
from megatron_keye.training.batch_pass import BatchPass
from megatron_keye.training.chunk_encoder import PatchSource
from megatron_keye.training.metrics import StepMetrics, count_batch
from megatron_keye.training.step import TrainingStep

Answer = tuple[int, int]
"""Number of a group within the step, and of an answer within the group."""


@dataclass(kw_only=True)
class Learned:
    """What a step has learned from its answers."""

    metrics: list[StepMetrics] = field(default_factory=list)
    """Of each update; none if no answer counts."""
    rows: list[list[PackedRow]] = field(default_factory=list)
    """Of each update."""
    ratios: dict[Answer, Ratios] = field(default_factory=dict)
    """Of each answer that counts, in the update that it was in."""
    num_gated: int
    """Answers left out since training and generation differ on them."""
    log_prob_errors: NDArray[np.float64]
    """|log-probability in training - in generation| of each token whose weights were the same."""


class Learning:
    """Learns from groups of answers; the same code on every kind of rank."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        step: TrainingStep,
        *,
        pad_token_id: int,
        open_source: Callable[[], PatchSource | None],
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        """Prepare for all steps.

        Args:
            run: The run.
            grid: Groups of this rank.
            model: This rank's modules.
            step: Makes an update.
            pad_token_id: Token of padding.
            open_source: Opens a source of pictures of its own, for a forward pass.
            device: Where this rank computes.
            recorder: Told of forward passes; by default one that nobody reads.
        """
        self._run, self._grid, self._model, self._step = run, grid, model, step
        self._pad_token_id, self._open_source, self._device = pad_token_id, open_source, device
        self._recorder = recorder or Recorder()
        self._settings = run.post_training

    def __call__(self, groups: Sequence[AnsweredGroup], number: int) -> Learned:
        """Learn from groups of answers. Collective: all ranks must call it, with the same groups.

        Args:
            groups: Groups with rewards.
            number: 0-based number of the step.

        Raises:
            UserError: When training's log-probabilities are not those of generation.
        """
        places, num_tokens = _places(groups, self._settings.truncated)
        drawn = np.zeros(num_tokens)
        for (group, answer), span in places.items():
            drawn[span] = groups[group].completions[answer].log_probs
        old, errors, num_gated = drawn, np.zeros(0), 0
        if self._settings.old_log_probs == "trainer" and places:
            old = self._log_probs_now(groups, places, num_tokens)
            errors = np.abs(old - drawn)
            self._check_error(errors)
            passed = {a: span for a, span in places.items() if self._passes(old - drawn, span)}
            num_gated, places = len(places) - len(passed), passed
        learned = Learned(num_gated=num_gated, log_prob_errors=errors)
        for part in _parts(groups, places, self._settings.minibatches):
            now = self._update(groups, part, old, number, learned)
            if len(learned.metrics) == 1 and not len(learned.log_prob_errors):
                spans = part.values()
                learned.log_prob_errors = np.concatenate(
                    [np.abs(now[s] - drawn[s]) for s in spans]
                )
                self._check_error(learned.log_prob_errors)
        return learned

    def _update(
        self,
        groups: Sequence[AnsweredGroup],
        part: dict[Answer, slice],
        old: NDArray[np.float64],
        number: int,
        learned: Learned,
    ) -> NDArray[np.float64]:
        """Make one update, note it in `learned`, and return the log-probabilities before it."""
        rows = self._rows(groups, part, old)
        learned.rows.append(rows)
        learned.metrics.append(self._step(rows, number))
        now = gather_log_probs(self._step.log_probs, len(old), self._grid, self._device)
        for answer, span in part.items():
            advantage = float(groups[answer[0]].advantages[answer[1]])
            ratios = Ratios.of(now[span] - old[span], advantage, self._settings)
            learned.ratios[answer] = ratios
        return now

    def _passes(self, differences: NDArray[np.float64], span: slice) -> bool:
        return passes_gate(differences[span], self._settings)

    def _rows(
        self, groups: Sequence[AnsweredGroup], part: dict[Answer, slice], old: NDArray[np.float64]
    ) -> list[PackedRow]:
        """Return the rows of some answers, with rows of padding that the grid needs to be full.

        These count in the router's balancing loss, in which grids then differ; in no other.
        """
        learned: dict[int, list[LearnedAnswer]] = {}
        for (number, answer), span in part.items():
            group = groups[number]
            each = LearnedAnswer(
                token_ids=group.completions[answer].token_ids,
                first_place=span.start,
                old_log_probs=old[span],
                advantage=float(group.advantages[answer]),
                routes=group.completions[answer].routes,
            )
            learned.setdefault(number, []).append(each)
        rows = answer_rows(
            [(groups[number].prompt, answers) for number, answers in sorted(learned.items())],
            self._run.data.row_tokens,
            pad_token_id=self._pad_token_id,
            least_rows=self._run.rows_multiple,
        )
        padding = pack([], self._run.data.row_tokens, pad_token_id=self._pad_token_id)
        return rows + [padding] * (-len(rows) % self._run.rows_multiple)

    def _log_probs_now(
        self, groups: Sequence[AnsweredGroup], places: dict[Answer, slice], num_tokens: int
    ) -> NDArray[np.float64]:
        """Return the log-probabilities by training's forward pass with the weights as they are."""
        rows = self._rows(groups, places, np.zeros(num_tokens))
        source, meter = self._open_source(), RowMeter()
        try:
            with self._model.evaluation():
                forward = BatchPass(
                    self._run,
                    self._grid,
                    self._model,
                    source=source,
                    device=self._device,
                    is_forward_only=True,
                )
                planned = forward.take(rows)
                forward(planned, meter, count_batch(planned.rows, self._run), self._recorder)
        finally:
            if source is not None:
                source.close()
        return gather_log_probs(meter.log_probs, num_tokens, self._grid, self._device)

    def _check_error(self, errors: NDArray[np.float64]) -> None:
        limit, error = self._settings.max_log_prob_error, float(errors.mean())
        if not error <= limit:
            raise UserError(
                f"post_training.max_log_prob_error: generation and training differ by {error:.2g} "
                f"in the log-probability of a token, expected at most {limit:g}; answers are then "
                "not those of the weights that learn. Look for settings in which both differ, "
                "such as rollout.cache_quantization or model.decoder.indexer.quantization, or "
                "raise the limit"
            )


def _places(groups: Sequence[AnsweredGroup], truncated: str) -> tuple[dict[Answer, slice], int]:
    """Return where each answer that counts has its tokens among those of the step, and how many.

    Not scored, aborted and, if they are masked, truncated answers do not count.
    """
    finishes = ("stop", "length") if truncated == "scored" else ("stop",)
    places, num_tokens = {}, 0
    for number, group in enumerate(groups):
        for answer, completion in enumerate(group.completions):
            length = len(completion.token_ids)
            is_scored = not np.isnan(group.advantages[answer])
            if is_scored and completion.finish in finishes and length:
                places[number, answer] = slice(num_tokens, num_tokens + length)
                num_tokens += length
    return places, num_tokens


def _parts(
    groups: Sequence[AnsweredGroup], places: dict[Answer, slice], num_parts: int
) -> list[dict[Answer, slice]]:
    """Share the groups that have answers out to mini-batches; fewer groups make fewer of them."""
    numbers = [n for n in range(len(groups)) if any(group == n for group, _ in places)]
    parts = np.array_split(np.array(numbers, dtype=np.int64), min(num_parts, len(numbers)) or 1)
    return [
        {answer: span for answer, span in places.items() if answer[0] in part}
        for part in parts
        if len(part)
    ]

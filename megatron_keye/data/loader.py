# SPDX-License-Identifier: Apache-2.0
"""Packed rows from the samples of a run, in an order that depends on the seed alone.

Every rank makes the same rows and takes its share, so the order is the same for any number of
ranks. The state is a few counts and the samples that wait to be packed.
"""

import logging
from collections import defaultdict
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.config.check import check
from megatron_keye.data.blend import Blend
from megatron_keye.data.conversation import describe_unread
from megatron_keye.data.packing import PackingWindow, WaitingSample, pack
from megatron_keye.data.row import PackedRow, Sample
from megatron_keye.data.source import open_source
from megatron_keye.data.tokens import END_OF_TEXT, load_tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError

# A store is faster at large reads; this many tokens take about 100 MB of memory.
_TOKENS_PER_READ = 1 << 22

_logger = logging.getLogger(__name__)


class RowLoader:
    """Draws samples from all sources by weight and packs them into rows.

    Args:
        config: Sources, row length, tokenizer, budgets, what to do with bad samples.
        model: Vocabulary and picture sizes.
        seed: Decides the order of every epoch.
        epochs: The rows end when this many times the samples of all sources were drawn; 0: never.

    Raises:
        UserError: For a source that is missing, malformed anywhere or prepared under other
            settings, or a tokenizer that has more entries than the model. Media are checked
            when their sample is drawn.
    """

    def __init__(
        self, config: DataConfig, model: ModelConfig, seed: int, *, epochs: float = 0.0
    ) -> None:
        tokenizer = load_tokenizer(config.tokenizer)
        check(
            tokenizer.vocab_size <= model.decoder.vocab_size,
            "model.decoder.vocab_size",
            model.decoder.vocab_size,
            f"at least the {tokenizer.vocab_size} entries of data.tokenizer",
        )
        self._config = config
        self._seed = seed
        self._sources = [
            open_source(source.path, tokenizer, config, model) for source in config.sources
        ]
        for source in self._sources:
            if source.unread:
                _logger.warning("%s: %s", source.path, describe_unread(source.unread))
        self._weights = [source.weight for source in config.sources]
        self._blend = Blend(
            [source.num_samples for source in self._sources],
            self._weights,
            seed=seed,
            shuffles=config.shuffles,
        )
        self._last_draw = max(1, round(epochs * self.num_samples)) if epochs else 0
        self._window = PackingWindow(config.packing_window)
        self._pad_token_id = tokenizer.control_id(END_OF_TEXT)
        # Of each source, samples in a row that were skipped.
        self._num_unusable = [0] * len(self._sources)
        self._probes = node_cache()
        self._num_skipped = 0
        self._newly_skipped: list[str] = []

    @property
    def num_samples(self) -> int:
        """Samples of one epoch of every source."""
        return sum(source.num_samples for source in self._sources)

    @property
    def share_done(self) -> float:
        """Share of the samples of all epochs that are in rows or were skipped."""
        assert self._last_draw, "endless rows have no share"
        return (sum(self._blend.num_drawn) - len(self._window.waiting)) / self._last_draw

    @property
    def is_exhausted(self) -> bool:
        """Whether the epochs are over, so that there are no more rows."""
        return self._has_ended() and not self._window.waiting

    @property
    def num_skipped(self) -> int:
        """Bad samples skipped since the run began."""
        return self._num_skipped

    def take_skipped(self) -> list[str]:
        """Return the reason for each sample skipped since the last call, one sentence each."""
        newly, self._newly_skipped = self._newly_skipped, []
        return newly

    def probe_video(self, path: Path) -> VideoInfo:
        """Return what is known of a video in rows that were made lately; from any thread.

        Raises:
            UserError: As `probe`.
        """
        known = (source.video_info(path) for source in self._sources)
        return next((info for info in known if info is not None), None) or self._probes.probe(path)

    def next_rows(self, count: int) -> list[PackedRow]:
        """Return the next rows of the whole run, whatever the number of ranks.

        Args:
            count: Rows wanted; the position advances by as many.

        Returns:
            Fewer rows only where the epochs end.

        Raises:
            UserError: Naming the sample that cannot be read or is longer than a row, unless
                such samples are skipped; naming a source that had no usable one in a whole epoch.
                The position stays before these rows.
        """
        before = list(self._blend.num_drawn), list(self._num_unusable), self._window.waiting
        try:
            rows = self.pack_rows(self.choose_rows(count))
            self._find_end()
            return rows
        except UserError:
            self._blend.num_drawn, self._num_unusable, waiting = before
            self._window = PackingWindow(self._config.packing_window, waiting)
            raise

    def choose_rows(self, count: int) -> list[list[WaitingSample]]:
        """Advance by `count` rows, fewer only where the epochs end, without reading their tokens.

        Returns:
            The samples of each row, for `pack_rows`.

        Raises:
            UserError: As `next_rows`; the position is then somewhere behind these rows.
        """
        fill = partial(self._window.fill_row, self._config.row_tokens, self._draw)
        return list(takewhile(bool, (fill() for _ in range(count))))

    def pack_rows(self, chosen: list[list[WaitingSample]]) -> list[PackedRow]:
        """Load the samples of some rows and lay them out.

        Raises:
            UserError: Naming a sample that has become unusable since it was chosen.
        """
        rows_per_read = max(1, _TOKENS_PER_READ // self._config.row_tokens)
        packed = []
        for first in range(0, len(chosen), rows_per_read):
            rows = chosen[first : first + rows_per_read]
            samples = iter(self._load([sample for row in rows for sample in row]))
            for row in rows:
                of_row = list(islice(samples, len(row)))
                packed.append(self._pack(of_row))
        return packed

    def padding_row(self) -> PackedRow:
        """Return a row without samples, for a micro-batch that the grid needs."""
        return self._pack([])

    def _pack(self, samples: list[Sample]) -> PackedRow:
        return pack(
            samples,
            self._config.row_tokens,
            pad_token_id=self._pad_token_id,
            weighting=self._config.loss_weighting,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, ready for JSON."""
        return {
            "num_drawn": list(self._blend.num_drawn),
            "waiting": [[sample.source, sample.index] for sample in self._window.waiting],
            "num_unusable": list(self._num_unusable),
            "num_skipped": self._num_skipped,
            "seed": self._seed,
            "weights": list(self._weights),
            "samples_digests": [source.digest for source in self._sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume exactly where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.

        Raises:
            UserError: When it belongs to other samples, weights or another seed, or names the
                sample that waited to be packed and has become unreadable.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise UserError(
                f"data.samples: the checkpoint's position in the data lacks {', '.join(missing)}, "
                "expected one that this version saved; begin a run from its weights with "
                "training.checkpoint.weights, or start afresh with training.checkpoint.resume=none"
            )
        check(
            state["weights"] == self._weights,
            "data.samples",
            self._config.samples,
            f"sources with the weights {state['weights']} as when the checkpoint was saved",
        )
        for source, digest in zip(self._sources, state["samples_digests"], strict=True):
            if source.digest != digest:
                raise UserError(
                    f"data.samples: {source.path} has content {source.digest}, expected {digest} "
                    "as when the checkpoint was saved; restore the file, or start afresh with "
                    "training.checkpoint.resume=none"
                )
        check(
            state["seed"] == self._seed,
            "training.seed",
            self._seed,
            f"{state['seed']} as when the checkpoint was saved, for the same sample order",
        )
        waiting = [self._measured(source, index) for source, index in state["waiting"]]
        self._window = PackingWindow(self._config.packing_window, waiting)
        self._blend.num_drawn = list(state["num_drawn"])
        self._num_unusable = list(state["num_unusable"])
        self._num_skipped = state["num_skipped"]

    def _find_end(self) -> None:
        """Draw a sample ahead if all that are left may be unusable, and no row would follow."""
        if self._last_draw and not self._window.waiting and self._config.on_bad_sample == "skip":
            sample = self._draw()
            if sample is not None:
                self._window.add(sample)

    def _has_ended(self) -> bool:
        return 0 < self._last_draw <= sum(self._blend.num_drawn)

    def _draw(self) -> WaitingSample | None:
        """Draw the next usable sample; None when the epochs are over."""
        while not self._has_ended():
            source, index = self._blend.draw()
            try:
                sample = self._measured(source, index)
            except UserError as error:
                if self._config.on_bad_sample == "refuse":
                    raise
                self._skip(source, str(error))
            else:
                self._num_unusable[source] = 0
                return sample
        return None

    def _skip(self, source: int, reason: str) -> None:
        """Count and log a bad sample; give up on a source that has no other."""
        self._num_skipped += 1
        self._newly_skipped.append(reason)
        _logger.warning("sample skipped: %s", reason)
        self._num_unusable[source] += 1
        num_samples = self._sources[source].num_samples
        if self._blend.ends_epoch(source) and self._num_unusable[source] >= num_samples:
            raise UserError(
                f"{self._sources[source].path}: all {num_samples} samples were skipped in a whole "
                "epoch, expected a usable one; correct the samples, or drop the source. The last "
                f"was skipped because {reason}"
            )

    def _measured(self, source: int, index: int) -> WaitingSample:
        num_tokens = self._sources[source].measure(index)
        if num_tokens > self._config.row_tokens:
            name = self._sources[source].name(index)
            raise UserError(
                f"{name}: is {num_tokens} tokens long, expected at most data.row_tokens = "
                f"{self._config.row_tokens}; raise data.row_tokens, or lower "
                "data.frames.frames_per_second, data.frames.max_tokens_per_frame or "
                "data.frames.max_tokens_per_video"
            )
        return WaitingSample(source=source, index=index, num_tokens=num_tokens)

    def _load(self, taken: list[WaitingSample]) -> list[Sample]:
        """Load samples, with one call per source."""
        positions = defaultdict(list)
        for position, sample in enumerate(taken):
            positions[sample.source].append(position)
        loaded: dict[int, Sample] = {}
        for source, of_source in positions.items():
            samples = self._sources[source].load([taken[n].index for n in of_source])
            loaded |= zip(of_source, samples, strict=True)
        return [loaded[n] for n in range(len(taken))]

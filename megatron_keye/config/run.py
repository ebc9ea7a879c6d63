# SPDX-License-Identifier: Apache-2.0
"""The whole configuration of a run: checks across sections, JSON, and --set overrides."""

import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from megatron_keye.config.check import check
from megatron_keye.config.data import DataConfig
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.config.rollout import RolloutConfig
from megatron_keye.config.training import TrainingConfig
from megatron_keye.config.tree import assign, build, leaves, plain, rename


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run."""

    name: str
    """Name of the run, which writes to the folder output_dir/name."""
    model: ModelConfig
    """Sizes of the model."""
    data: DataConfig
    """Samples and rows."""
    parallel: ParallelConfig
    """Degrees of parallelism."""
    training: TrainingConfig
    """Steps, optimizer and checkpoints."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation."""
    post_training: PostTrainingConfig = field(default_factory=PostTrainingConfig)
    """Learning from the model's own answers."""
    output_dir: str = "runs"
    """Parent folder of the runs' folders."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" uses GPUs if torch finds any, else the CPU."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def folder(self) -> Path:
        """Folder of the run's configuration, checkpoints, events and summary."""
        return Path(self.output_dir) / self.name

    @property
    def rows_multiple(self) -> int:
        """Divisor of the number of rows of every batch: rows that run in the same pass."""
        degrees = self.parallel.decoder
        return degrees.data * (degrees.pipeline if degrees.virtual_stages > 1 else 1)

    @property
    def rows_per_replica(self) -> int:
        """Micro-batches of each data-parallel replica in one step."""
        return self.training.rows_per_step // self.parallel.decoder.data

    def validate(self) -> None:
        """Check the settings that depend on those of another section.

        Raises:
            UserError: Names the setting, its value and what was expected.
        """
        # The run's files are in output_dir/name, and an earlier run's move to output_dir/name.1.
        is_folder = self.name not in ("", ".", "..") and not {"/", "\0"} & set(self.name)
        check(is_folder, "name", self.name, "the name of a folder, without '/'")
        samples = self.data.samples
        check(bool(samples), "data.samples", samples, "a sample file, a store or a blend of them")
        decoder, degrees = self.model.decoder, self.parallel.decoder
        self._check_divides(decoder.num_kv_heads, "tensor", "key-value heads")
        self._check_divides(decoder.vocab_size, "tensor", "vocabulary rows")
        self._check_divides(decoder.experts.num_experts, "expert", "experts")
        self._check_divides(self.training.rows_per_step, "data", "rows per step")
        degrees.layers_per_stage(decoder.num_layers)
        check(
            degrees.virtual_stages == 1 or self.rows_per_replica % degrees.pipeline == 0,
            "training.rows_per_step",
            self.training.rows_per_step,
            f"a multiple of data x pipeline = {degrees.data * degrees.pipeline}, since the "
            "pipeline is interleaved",
        )
        shared = self.parallel.vision.shared_micro_batches
        check(
            2 * shared <= self.rows_per_replica,
            "parallel.vision.shared_micro_batches",
            shared,
            f"at most half of the {self.rows_per_replica} micro-batches of a step "
            "(training.rows_per_step / parallel.decoder.data)",
        )
        divisor = degrees.tensor * degrees.context * (2 if degrees.context > 1 else 1)
        check(
            self.data.row_tokens % divisor == 0,
            "data.row_tokens",
            self.data.row_tokens,
            f"a multiple of {divisor}, so that tensor x context ranks get equal parts",
        )
        check(
            self.training.dense_up_to < self.data.row_tokens,
            "training.dense_up_to",
            self.training.dense_up_to,
            f"less than data.row_tokens = {self.data.row_tokens}, or no row would train the "
            'indexer; if that is meant, set training.phase="dense"',
        )
        check(
            not self.data.feature_cache or "vision" not in self.training.trained_parts,
            "data.feature_cache",
            self.data.feature_cache,
            "'', since vision learns in this run, so that its features change with every step; or "
            "add vision to training.frozen",
        )
        check(
            self.training.validation.patience == 0 or bool(self.data.validation),
            "data.validation",
            self.data.validation,
            "samples to validate on, since training.validation.patience is "
            f"{self.training.validation.patience}",
        )

    def _check_divides(self, count: int, axis: str, what: str) -> None:
        degree = getattr(self.parallel.decoder, axis)
        check(
            count % degree == 0, f"parallel.decoder.{axis}", degree, f"a divisor of {count} {what}"
        )

    def check_num_ranks(self, num_ranks: int) -> None:
        """Raise a UserError unless the degrees multiply to the `num_ranks` that were started."""
        check(
            num_ranks == self.parallel.num_ranks,
            "parallel",
            self.parallel.describe(),
            f"{num_ranks}, the number of ranks that were started; change a degree with --set, or "
            f"start {self.parallel.num_ranks} ranks (megatron-keye train --ranks; under "
            "Slurm, nodes x GPUs per node)",
        )

    def differing_settings(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ in another run, by dotted name, with both values."""
        theirs = leaves(plain(other))
        return {
            name: (value, theirs[name])
            for name, value in leaves(plain(self)).items()
            if value != theirs[name]
        }

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return json.dumps(plain(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the configuration that `to_json`, of this or an earlier version, wrote."""
        tree = json.loads(text)
        rename(tree)
        return typing.cast(Self, build(cls, tree, path=""))

    def with_overrides(self, overrides: list[str]) -> Self:
        """Return a copy with `section.field=value` settings applied, which are checked together.

        Args:
            overrides: Arguments of `--set`; values are JSON, or text without quotes, with commas
                between the items of a list. `as_override` writes such an argument.

        Raises:
            UserError: For a setting without "=", an unknown field (suggesting similar ones), a
                value of the wrong type, or an invalid combination.
        """
        tree = plain(self)
        for override in overrides:
            name, equals, text = override.partition("=")
            check(bool(equals), "--set", override, "section.field=value")
            assign(type(self), tree, name.strip(), text.strip())
        return typing.cast(Self, build(type(self), tree, path=""))


def as_override(name: str, value: object) -> str:
    """Return the argument of `--set` that gives a setting this value, as messages advise it.

    Args:
        name: Dotted name of the setting.
        value: Its value; a list or tuple for a setting that is a list.
    """
    if isinstance(value, str):
        return f"{name}={value}"
    is_list = isinstance(value, list | tuple)
    items = [str(item) for item in typing.cast(list[object], value)] if is_list else []
    if items and not any("," in item for item in items):
        return f"{name}={','.join(items)}"
    return f"{name}={json.dumps(value)}"

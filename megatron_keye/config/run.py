"""The whole configuration of a run: checks across sections, JSON, and --set overrides."""

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from megatron_keye.config.check import check, suggest
from megatron_keye.config.data import DataConfig
from megatron_keye.config.model import ModelConfig
from megatron_keye.config.parallel import ParallelConfig
from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.config.rollout import RolloutConfig
from megatron_keye.config.training import TrainingConfig
from megatron_keye.errors import UserError

RENAMED = {
    "parallel.decoder.chunks_per_stage": "parallel.decoder.virtual_stages",
    "training.recompute_layers": "training.recompute",
    "training.max_skipped_steps": "training.health.max_bad_steps",
}
"""Former names of settings, as in run.json files and checkpoints of earlier versions."""
FORMER_VALUES = {"training.recompute_layers": {False: "none", True: "full"}}
"""What true and false under a former name are now, where the setting is of another type."""


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
        check(
            not self.training.evaluation.samples or degrees.pipeline == degrees.context == 1,
            "training.evaluation.samples",
            self.training.evaluation.samples,
            "'' with pipeline stages or context ranks, which do not generate; evaluate its "
            "checkpoints with megatron-keye evaluate",
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
        theirs = _leaves(_plain(other))
        return {
            name: (value, theirs[name])
            for name, value in _leaves(_plain(self)).items()
            if value != theirs[name]
        }

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return json.dumps(_plain(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the configuration that `to_json`, of this or an earlier version, wrote."""
        tree = json.loads(text)
        for former, name in RENAMED.items():
            _move(tree, former.split("."), name.split("."))
        return typing.cast(Self, _build(cls, tree, path=""))

    def with_overrides(self, overrides: list[str]) -> Self:
        """Return a copy with `section.field=value` settings applied, which are checked together.

        Args:
            overrides: Arguments of `--set`; values are JSON, or text without quotes, with commas
                between the items of a list. `as_override` writes such an argument.

        Raises:
            UserError: For a setting without "=", an unknown field (suggesting similar ones), a
                value of the wrong type, or an invalid combination.
        """
        tree = _plain(self)
        for override in overrides:
            name, equals, text = override.partition("=")
            check(bool(equals), "--set", override, "section.field=value")
            _assign(type(self), tree, name.strip(), text.strip())
        return typing.cast(Self, _build(type(self), tree, path=""))


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


def _move(tree: dict[str, Any], former: list[str], name: list[str]) -> None:
    """Move a setting of nested sections to another name, if it is there."""
    source, target = tree, tree
    for section in former[:-1]:
        source = source.get(section, {})
    if former[-1] in source:
        for section in name[:-1]:
            target = target.setdefault(section, {})
        value = source.pop(former[-1])
        if isinstance(value, bool):
            value = FORMER_VALUES.get(".".join(former), {}).get(value, value)
        target[name[-1]] = value


def _plain(node: Any) -> Any:
    """Return dataclasses as dicts, without derived fields, and tuples as lists."""
    if dataclasses.is_dataclass(node):
        return {f.name: _plain(getattr(node, f.name)) for f in dataclasses.fields(node) if f.init}
    return [_plain(item) for item in node] if isinstance(node, tuple) else node


def _leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the settings of nested sections by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inside = _leaves(value, f"{path}{name}.") if isinstance(value, dict) else {}
        found |= inside or {f"{path}{name}": value}
    return found


def _fields(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section) if f.init}


def _field_type(section: type, name: str, path: str) -> Any:
    known = _fields(section)
    if f"{path}{name}" in RENAMED:
        raise UserError(f"{path}{name}: is called {RENAMED[f'{path}{name}']} now; use that name")
    if name not in known:
        raise UserError(f"{path}{name}: no such field; {suggest(name, known)}")
    return known[name]


def _assign(section: type, tree: dict[str, Any], name: str, text: str) -> None:
    *parents, leaf = name.split(".")
    path = ""
    for parent in parents:
        section = _field_type(section, parent, path)
        path += f"{parent}."
        check(dataclasses.is_dataclass(section), path[:-1], name, "no dot after this setting")
        tree = tree[parent]
    wanted = _field_type(section, leaf, path)
    if dataclasses.is_dataclass(wanted):
        inside = ", ".join(_fields(typing.cast(type, wanted)))
        raise UserError(f"{name}: is a section; set one of its fields: {inside}")
    tree[leaf] = _parse(text, wanted)


def _parse(text: str, wanted: Any) -> Any:
    """Return an override's text as JSON data of the `wanted` type, or as it is."""
    arguments = typing.get_args(wanted)
    if wanted is str or (typing.get_origin(wanted) is Literal and text in arguments):
        return text
    if typing.get_origin(wanted) is tuple and not text.startswith("["):
        return [_parse(item.strip(), arguments[0]) for item in text.split(",")] if text else []
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _build(wanted: Any, value: Any, path: str) -> Any:
    """Return JSON data as a value of the `wanted` type; UserError if it is none."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        section = typing.cast(type, wanted)
        below = f"{path}." if path else ""
        parts = {}
        for name, part in value.items():
            parts[name] = _build(_field_type(section, name, below), part, f"{below}{name}")
        return section(**parts)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        check(len(kinds) == len(items), path, value, f"{len(kinds)} values")
        return tuple(_build(kind, item, path) for kind, item in zip(kinds, items, strict=True))
    if origin is Literal:
        check(value in arguments, path, value, f"one of {arguments}")
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) <= sys.float_info.max, path, value, "a number below 1e308")
        return float(value)
    assert not isinstance(wanted, types.UnionType), f"{path}: config fields have one type"
    check(type(value) is wanted, path, value, f"a value of type {wanted.__name__}")
    return value

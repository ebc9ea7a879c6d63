# SPDX-License-Identifier: Apache-2.0
"""A bad step on disk: bad_steps/step-N.json in the run's folder, and what runs the step again."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """What was wrong with a step, on which samples, and from where its rows can be made again."""

    step: int
    """Steps done, this one included, as the log counts them."""
    reason: str
    """What was wrong, in words."""
    verdict: str
    """What a second computation of the step says, in words; "" without one."""
    loss: float
    """Mean language loss."""
    gradient_norm: float
    """L2 norm of all gradients."""
    learning_rate: float
    """Learning rate of the step."""
    was_applied: bool
    """Whether the weights were updated nevertheless."""
    sick_ranks: dict[str, list[int]]
    """Ranks by what was not finite on them."""
    sick_tensors: list[str]
    """Weights and moments that hold numbers which are not finite."""
    samples: list[list[str]]
    """Samples of each row."""
    seed: int
    """Seed of the run, which decides the order of samples."""
    rows_per_step: int
    """Rows of the step."""
    data: dict[str, Any]
    """Position of the data before the step."""
    checkpoint: str
    """Newest checkpoint before the step; "" if there was none."""

    def write(self, run: RunConfig) -> Path:
        """Write the file and return its path; one of the same step is replaced."""
        path = bad_step_file(run, self.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(_words(asdict(self)), indent=2, allow_nan=False) + "\n")
        partial.replace(path)
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` wrote.

        Raises:
            UserError: When it is missing or no such file.
        """
        try:
            tree = json.loads(path.read_text())
            known = {field.name: tree[field.name] for field in fields(cls)}
            numbers = {n: float(known[n]) for n in ("loss", "gradient_norm", "learning_rate")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--replay: got {str(path)!r}, which cannot be read "
                f"({type(error).__name__}: {error}), expected a file of bad_steps/ in a run's "
                "folder"
            ) from error
        return cls(**known | numbers)

    @property
    def names(self) -> list[str]:
        """All samples of the step."""
        return names_of(self.samples)


def bad_step_file(run: RunConfig, step: int) -> Path:
    """Return the path of the file of a bad step."""
    return run.folder / "bad_steps" / f"step-{step:08d}.json"


def names_of(samples: Sequence[Sequence[str]]) -> list[str]:
    """Return the samples of all rows."""
    return [name for row in samples for name in row]


def _words(value: Any) -> Any:
    """Return the value with words for the numbers that JSON does not know, as float() reads."""
    if isinstance(value, dict):
        return {name: _words(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

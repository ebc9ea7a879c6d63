# SPDX-License-Identifier: Apache-2.0
"""How checkpoints are converted, in every direction."""

from dataclasses import dataclass, field

import torch

from megatron_keye.files.progress import NoProgress, Progress


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert, for every direction."""

    num_workers: int = 1
    """Processes."""
    dtype: torch.dtype | None = None
    """Type to round to; None keeps the checkpoint's."""
    checks_finite: bool = False
    """Whether NaN and Inf are refused."""
    checks_sums: bool = True
    """Whether the checksums of a native checkpoint's files are compared, beside their sizes."""
    dropped: tuple[str, ...] = ()
    """Patterns of surplus tensors to ignore."""
    progress: Progress = field(default_factory=NoProgress)
    """Receives the progress."""

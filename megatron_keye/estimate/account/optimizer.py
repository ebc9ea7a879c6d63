# SPDX-License-Identifier: Apache-2.0
"""Work of an AdamW update on one rank: it moves the state that it owns, and multiplies nothing."""

from collections.abc import Sequence

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.work import Passes, Work, widened
from megatron_keye.estimate.state import (
    BYTES,
    SUM_BYTES,
    Parameters,
    num_owned,
    num_trained,
    optimizer_bytes,
)


def optimizer_work(run: RunConfig, held: Sequence[Parameters]) -> Work:
    """Return the work of one update.

    Of what the rank owns it reads the gradient, reads and writes moments and master weights, and
    writes the weight; it clears the gradients of all that it holds. State in main memory passes
    through the device's too.

    Args:
        run: Precision, optimizer and what learns.
        held: Parameters on the rank.
    """
    precision = run.training.precision
    owned = num_owned(run, held)
    moved = (SUM_BYTES[precision] + BYTES[precision]) * owned + 2 * optimizer_bytes(run, held)
    moved += SUM_BYTES[precision] * num_trained(run, held)
    moves = Passes(forward=moved)
    return Work(module="optimizer", precision=widened(precision), moved_bytes=moves)

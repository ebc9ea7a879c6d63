# SPDX-License-Identifier: Apache-2.0
"""A span: what a rank did during one interval of a step.

Separate from the recorder, so that drawings and the simulator need no torch.
"""

from dataclasses import dataclass
from typing import Literal

SpanName = Literal[
    "decode", "encode", "send", "wait", "forward", "backward", "return", "vision", "optimizer"
]
"""decode: files to patches. encode: the ViT's forward. send: features are sent. wait: for features
or their gradients. forward, backward: the decoder. return: gradients of features are sent. vision:
the ViT's recomputed forward and backward. optimizer: reduction of gradients, update."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a rank did during one interval."""

    name: SpanName
    """Kind of work."""
    label: str
    """The chunk or micro-batch that it was on."""
    start: float
    """Seconds after the step's start, which all ranks share."""
    end: float
    """Likewise."""

"""One stretch of a rank's step, and the names that such stretches have.

Apart from the recorder because drawings and the simulator need no torch.
"""

from dataclasses import dataclass
from typing import Literal

SpanName = Literal[
    "decode", "encode", "send", "wait", "forward", "backward", "return", "vision", "optimizer"
]
"""decode: files to patches. encode: the ViT forward. send: features leave. wait: for features, or
for gradients. forward, backward: the decoder. return: gradients of features leave. vision: the
ViT's second forward and its backward. optimizer: adding up gradients and updating."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a rank did from one time to another."""

    name: SpanName
    """What ran."""
    label: str
    """On what: a chunk of pictures or a micro-batch."""
    start: float
    """Seconds after the step's start, which all ranks have together."""
    end: float
    """Likewise."""

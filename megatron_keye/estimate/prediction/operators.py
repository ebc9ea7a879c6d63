# SPDX-License-Identifier: Apache-2.0
"""How fast this project's operators run on one H100, by the length of documents.

Measured in bf16, 32/4 heads of 128, indexer 16 x 64, top-k 2048. The tables are those of
docs/benchmarks/README.md and the lines beside it: "K" is kernels_h100.jsonl, "B"
backward_forms_h100.jsonl, "S" step_h100.jsonl.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Curve:
    """Values measured at some sizes; between them it is interpolated in the logarithm of sizes,
    beyond them the nearest one holds.
    """

    points: tuple[tuple[float, float], ...]
    """Size and value, ascending."""

    def at(self, sizes: Any) -> NDArray[np.float64]:
        """Return the values at these sizes, of which 0 counts as 1."""
        known, values = zip(*self.points, strict=True)
        logarithms = np.log(np.maximum(np.asarray(sizes, dtype=np.float64), 1))
        values_there: NDArray[np.float64] = np.interp(logarithms, np.log(known), values)
        return values_there


UNION_KEYS = Curve(
    (
        (1, 1),
        (2_048, 2_048),
        (8_192, 2_698),
        (16_384, 3_887),
        (32_768, 5_299),
        (131_072, 6_975),
        (262_144, 7_547),
    )
)
"""Keys that 16 neighbouring queries select together, by the document's tokens ("local" in K); a
short document's are all of its own. What is known of it before a model is trained: the released
model's authors state about 8K at 128K tokens."""

SELECTED_FORWARD = Curve(
    ((2_698, 139.3), (3_887, 135.8), (5_299, 118.6), (6_975, 102.9), (7_547, 96.5), (23_247, 32.2))
)
"""Useful TFLOP/s of sparse attention's forward pass, by keys of a union (K)."""
SELECTED_BACKWARD = Curve(
    ((2_698, 118.0), (3_887, 106.8), (5_299, 92.7), (6_975, 74.0), (7_547, 67.4), (23_247, 23.9))
)
"""That of its backward pass (B; up to 5,299 K's former form by the ratio of both at 6,975)."""
SELECTED_LOSS = Curve(((2_698, 63.0), (5_299, 67.0), (6_975, 62.0), (7_547, 56.0), (23_247, 35.0)))
"""Executed TFLOP/s of the indexer's loss over selected keys: their scores, target, gradients and
union lists together (K, B)."""
DENSE_FORWARD = Curve(
    ((1_024, 250.0), (8_192, 536.1), (16_384, 611.7), (32_768, 601.5), (131_072, 552.5))
)
"""TFLOP/s of dense attention's forward pass, by the document's tokens (K; at 1,024 assumed)."""
DENSE_BACKWARD = Curve(
    ((1_024, 200.0), (8_192, 456.8), (16_384, 535.0), (32_768, 539.0), (131_072, 532.3))
)
"""That of its backward pass, which multiplies queries and keys again."""
DENSE_LOSS = Curve(((8_192, 175.7), (16_384, 230.9), (32_768, 314.4), (131_072, 371.7)))
"""TFLOP/s of the warm-up's loss with its gradients (K)."""
SCORES_TFLOPS = 523.0
"""TFLOP/s of the indexer's scores, without what a query costs (K: the slope from 128K to 256K)."""
SELECTION_NANOSECONDS = 87.0
"""What a query costs the selection beside its pairs (K: the same line at no pairs)."""

VISION_FORWARD = Curve(((8_192, 288.0), (16_384, 345.0)))
"""TFLOP/s of the ViT that encodes, by the patches of a chunk: measured at 16K patches, which are a
fifth faster than 8K."""
VISION_LEARNING = Curve(((8_192, 258.0), (16_384, 309.0)))
"""That of encoding again and of the backward pass."""

PRODUCT_SHARE = 0.85
"""Share of the matmul rate that projections and logits reach; an estimate."""
EXPERT_SHARE = 0.78
"""That of the experts' products: 600 of 766 TFLOP/s, between the 530 and 720 that profiles of
whole layers show."""
FLOAT32_TFLOPS = 45.0
"""Products in float32 without TF32, as of the router: two thirds of the data sheet's 67."""
UPDATE_SHARE = 0.70
"""Share of the copy rate at which an update moves its state (S: 20 ms for two layers)."""

ROUTED_FORWARD, ROUTED_BACKWARD = 34.0, 40.0
"""Reads or writes of a routed row of hidden size to which all else of a layer amounts: its
permutation and way back, SwiGLU, rotary positions, copies, gaps between kernels. Fitted to one
run: two layers at 128K tokens, selective, 333 and 768 ms (S)."""
UNFUSED = 1.5
"""Factor of these without fused kernels; fitted to the same run without them (S)."""
LAUNCH_SECONDS = 30e-6
"""Of the host, for one kernel: 8K tokens take 94.6 ms and about 3,000 launches for two layers."""
LAUNCHES = {"layer": 100, "expert": 2}
"""Kernels of a forward pass: of a layer, and of each expert that has products of its own."""


def effective(curve: Curve, sizes: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Return the rate at which parts of different sizes run together.

    Args:
        curve: Rate by size.
        sizes: Of each part.
        weights: Work of each part.
    """
    return float(weights.sum() / (weights / curve.at(sizes)).sum())

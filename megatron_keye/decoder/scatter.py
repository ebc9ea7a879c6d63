# SPDX-License-Identifier: Apache-2.0
"""Replaces the embeddings of placeholder tokens by vision features.

A wrong number of features raises, since a misplaced feature would corrupt training silently.
"""

from torch import Tensor


def scatter_features(
    embeddings_SBD: Tensor, features_MD: Tensor, positions_M: Tensor, *, where: str
) -> Tensor:
    """Return the embeddings with vision features at their placeholders; differentiable in both.

    Args:
        embeddings_SBD: [S/CP/TP, 1, D] token embeddings of this rank.
        features_MD: [M, D] features of this rank's placeholders, in row order.
        positions_M: int64 [M] local positions of these placeholders, ascending.
        where: Rank and samples, for the error message.

    Returns:
        [S/CP/TP, 1, D]. The embeddings' gradient is zero at placeholders. Without placeholders
        the features have a gradient too, of no rows, whose hooks tell when it is due.

    Raises:
        ValueError: When the numbers of features and placeholders differ.
    """
    if len(features_MD) != len(positions_M):
        raise ValueError(
            f"{where}: got {len(features_MD)} vision features for {len(positions_M)} "
            "placeholders, expected as many; the plan of vision ranks does not match this row"
        )
    features_MBD = features_MD[:, None].to(embeddings_SBD.dtype)
    return embeddings_SBD.index_copy(0, positions_M, features_MBD)

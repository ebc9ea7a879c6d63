"""Puts vision features over the placeholders of their tokens.

A misplaced feature corrupts training without any sign, so every mismatch raises here.
"""

from torch import Tensor


def scatter_features(
    embeddings_SBD: Tensor, features_MD: Tensor, positions_M: Tensor, *, where: str
) -> Tensor:
    """Return the embeddings with vision features at their placeholders; differentiable in both.

    Args:
        embeddings_SBD: [S/CP/TP, 1, D] token embeddings of this rank.
        features_MD: [M, D] features that this rank's placeholders take, in row order.
        positions_M: int64 [M] local positions of those placeholders, ascending.
        where: Rank and samples, for the message.

    Returns:
        [S/CP/TP, 1, D]. The embeddings' gradient is zero at placeholders.

    Raises:
        ValueError: When the numbers of features and placeholders differ.
    """
    if len(features_MD) != len(positions_M):
        raise ValueError(
            f"{where}: got {len(features_MD)} vision features for {len(positions_M)} "
            "placeholders, expected as many; the plan of vision ranks and this row disagree"
        )
    if len(positions_M) == 0:
        return embeddings_SBD
    features_MBD = features_MD[:, None].to(embeddings_SBD.dtype)
    return embeddings_SBD.index_copy(0, positions_M, features_MBD)

# SPDX-License-Identifier: Apache-2.0
"""A packed row before it reaches a device: tokens, weighted labels, documents, picture positions.

Cheap to build and equal on every rank, so that each rank plans a whole step by itself; pixels are
decoded later, only by the rank that encodes them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_keye.data.media import Medium
from megatron_keye.plan.prefix_trees import PrefixTrees
from megatron_keye.plan.slots import RowSizes

IGNORED_LABEL = -100
"""Label of a position whose token is not predicted."""


NO_EXPERT = 255
"""In the place of a token's experts where they are not known."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image or one video frame as the model sees it."""

    medium: Medium
    """Its file."""
    frame: int
    """Index of the frame in that file, in presentation order; 0 for an image."""
    patch_grid: tuple[int, int]
    """Patches down and across after resizing; multiples of the merge size."""
    seconds: float | None = None
    """When a video shows the frame; None for an image."""

    @property
    def is_video(self) -> bool:
        """Whether it is a frame of a video, which may be a file of its own."""
        return self.seconds is not None

    @property
    def num_patches(self) -> int:
        """Patches P of this picture."""
        return self.patch_grid[0] * self.patch_grid[1]

    def num_tokens(self, merge_size: int) -> int:
        """Return the decoder tokens M that the picture becomes."""
        return self.num_patches // merge_size**2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenized conversation, not yet packed."""

    name: str
    """File and line it comes from, for error messages."""
    token_ids: NDArray[np.int64]
    """Token ids [T]; a picture's placeholders are contiguous."""
    labels: NDArray[np.int64]
    """Next token to predict at each position [T], IGNORED_LABEL where there is none."""
    weights: NDArray[np.float32]
    """Weight of each label in the loss [T], above 0; 0 where there is no label."""
    pictures: tuple[Picture, ...]
    """Pictures in the order of their placeholders."""
    picture_starts: tuple[int, ...]
    """Position of each picture's first placeholder."""


@dataclass(frozen=True, kw_only=True)
class RowAnswers:
    """What policy training knows of a row's labels, which are tokens of a model's own answers.

    The weights of an answer's labels add up to 1, up to rounding, so that the weight of a global
    batch is its number of answers.
    """

    answers: NDArray[np.int64]
    """Number of the answer, within the row, that each label belongs to [L], in the row's order."""
    places: NDArray[np.int64]
    """Place of each label [L] among the tokens of all answers of the step."""
    old_log_probs: NDArray[np.float64]
    """Log-probability [L] of each label before the step's first update."""
    advantages: NDArray[np.float64]
    """How much better than its group's mean each answer is [A]."""


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """Several samples laid end to end in one row of fixed length, padded at its end.

    The padding after the last document is a document of its own, without labels, so that
    attention does not cross between it and samples.
    """

    token_ids: NDArray[np.int64]
    """Token ids [T]."""
    labels: NDArray[np.int64]
    """Next token at each position [T], IGNORED_LABEL where none is predicted."""
    weights: NDArray[np.float32]
    """Weight of each label in the loss [T]; those of positions without a label do not count."""
    document_bounds: NDArray[np.int64]
    """Where documents start and end [documents + 1]: 0, ..., T."""
    prefix_trees: PrefixTrees | None = None
    """Branches of these documents; None where no document branches."""
    num_real_tokens: int
    """Tokens that belong to samples; the rest is padding."""
    pictures: tuple[Picture, ...]
    """Pictures of all samples, in row order."""
    picture_starts: tuple[int, ...]
    """Row position of each picture's first placeholder."""
    sample_names: tuple[str, ...]
    """Where the documents come from, for error messages."""
    routes: NDArray[np.uint8] | None = None
    """Experts [T, layers, experts of a token] to which generation routed each token, NO_EXPERT
    where that is not known; None where routers choose."""
    answers: RowAnswers | None = None
    """What its labels are in policy training; None where they are to be imitated."""

    @property
    def num_loss_tokens(self) -> int:
        """Positions that have a label."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def loss_weight(self) -> float:
        """Sum of the weights of all labels, in float64."""
        return float(self.weights[self.labels != IGNORED_LABEL].sum(dtype=np.float64))

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document, or of the longest path in one, padding included."""
        return self.branches.longest_path

    @property
    def branches(self) -> PrefixTrees:
        """The branches of all documents, each document being one where none branches."""
        return self.prefix_trees or PrefixTrees.of_documents(self.document_bounds)

    @property
    def sizes(self) -> RowSizes:
        """What its cost follows from."""
        return RowSizes(
            self.branches.lengths,
            [picture.num_patches for picture in self.pictures],
            self.branches.num_earlier,
            num_padding=len(self.token_ids) - self.num_real_tokens,
            num_labels=self.num_loss_tokens,
        )

    @property
    def num_indexer_queries(self) -> int:
        """Real tokens, each counted once for every path through it."""
        return int(self.branches.num_paths[: self.num_real_tokens].sum())


def labels_of(token_ids: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the labels [T] of one sample: the next token wherever that has a weight.

    Args:
        token_ids: [T].
        weights: Weight of each position's label [T], 0 where none is wanted and at the end.
    """
    return np.where(weights > 0, np.append(token_ids[1:], IGNORED_LABEL), IGNORED_LABEL)

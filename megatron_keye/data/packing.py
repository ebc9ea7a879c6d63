"""Samples laid end to end in rows of fixed length.

Packing is greedy and in order, so a row is a pure function of where in the sample stream it
starts, and a position is all that a resumed run needs.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_keye.data.row import IGNORED_LABEL, PackedRow, Sample


def fill_row(samples: Iterable[Sample], row_tokens: int) -> list[Sample]:
    """Take samples off a stream until the next one does not fit into the row.

    Args:
        samples: The stream; the sample that does not fit is read but not taken.
        row_tokens: Length of the row.

    Returns:
        The samples of one row in stream order; empty only if the stream is.

    Raises:
        ValueError: For a sample longer than a whole row, naming it, its length and the row's.
    """
    taken: list[Sample] = []
    room = row_tokens
    for sample in samples:
        length = len(sample.token_ids)
        if length > row_tokens:
            raise ValueError(
                f"{sample.name}: is {length} tokens long, expected at most data.row_tokens = "
                f"{row_tokens}; raise data.row_tokens, or lower data.frames.frames_per_second, "
                "data.frames.max_tokens_per_frame or data.frames.max_tokens_per_video"
            )
        if length > room:
            break
        taken.append(sample)
        room -= length
        if not room:
            break
    return taken


def pack(samples: Sequence[Sample], row_tokens: int, *, pad_token_id: int) -> PackedRow:
    """Lay samples end to end and pad the rest of the row as a document of its own.

    Labels stay inside their document: a sample's last position has none.

    Args:
        samples: Samples that fit together, as `fill_row` takes them.
        row_tokens: Length of the row.
        pad_token_id: Token of the padding document.

    Returns:
        A row with at least one document.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    num_real = sum(lengths)
    assert num_real <= row_tokens, f"{num_real} tokens were packed into a row of {row_tokens}"
    assert all(sample.labels[-1] == IGNORED_LABEL for sample in samples), (
        "a label crosses into the next document"
    )
    bounds = np.cumsum([0, *lengths], dtype=np.int64)
    token_ids = np.full(row_tokens, pad_token_id, dtype=np.int64)
    labels = np.full(row_tokens, IGNORED_LABEL, dtype=np.int64)
    picture_starts: list[int] = []
    for sample, start in zip(samples, bounds[:-1].tolist(), strict=True):
        stop = start + len(sample.token_ids)
        token_ids[start:stop] = sample.token_ids
        labels[start:stop] = sample.labels
        picture_starts += [start + place for place in sample.picture_starts]
    if num_real < row_tokens:
        bounds = np.append(bounds, row_tokens)
    return PackedRow(
        token_ids=token_ids,
        labels=labels,
        document_bounds=bounds,
        num_real_tokens=num_real,
        pictures=tuple(picture for sample in samples for picture in sample.pictures),
        picture_starts=tuple(picture_starts),
        sample_names=tuple(sample.name for sample in samples),
    )

"""Makes sure that all ranks train on the same rows.

Where bad samples are skipped, a file that only some machines can read would give ranks different
rows, and the first exchange of features would wait for ever.
"""

import hashlib

import torch
import torch.distributed as dist

from megatron_keye.data.row import PackedRow


def check_same_rows(rows: list[PackedRow], device: torch.device) -> None:
    """Compare this rank's rows with everyone's. All ranks must call it.

    Args:
        rows: All rows of the global batch, as this rank made them.
        device: Where the message is put together.

    Raises:
        RuntimeError: On every rank, when any two ranks have different rows.
    """
    digest = hashlib.blake2b(digest_size=7)
    for row in rows:
        pictures = [(picture.frame, picture.grid, picture.is_video) for picture in row.pictures]
        digest.update(repr((row.sample_names, pictures)).encode())
        digest.update(row.document_bounds.tobytes())
    mark = int.from_bytes(digest.digest(), "little")
    ends = torch.tensor([mark, -mark], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    largest, negative_smallest = ends.tolist()
    if largest != -negative_smallest:
        names = ", ".join(name for row in rows for name in row.sample_names)
        raise RuntimeError(
            "ranks made different rows, so a sample was skipped on some machines only: samples "
            "and media must be equally readable on all of them. This rank, whose log names what "
            f"it skipped, has {names}"
        )

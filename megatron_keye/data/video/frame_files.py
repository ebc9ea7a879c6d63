# SPDX-License-Identifier: Apache-2.0
"""Videos that are kept as image files, one for each frame: a list of names, or a folder.

Their frames are decoded as images are, and shown as those of a video.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_keye.config import DataConfig, RemoteConfig, VisionConfig
from megatron_keye.data.conversation.turns import Part
from megatron_keye.data.media import Medium, is_remote, locate_media
from megatron_keye.data.remote.copies import local_copy
from megatron_keye.data.row import Picture
from megatron_keye.data.video.frames import choose_frames, frame_patch_grid
from megatron_keye.data.video.image import probe_image
from megatron_keye.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def frame_names(part: Part, base: Path) -> tuple[str, ...]:
    """Return the names of a video's frame files in order, () for a video in one file.

    Args:
        part: A video.
        base: Folder that relative names start from.

    Raises:
        UserError: For a folder with anything but images.
    """
    if part.frame_names or not part.value or is_remote(part.value):
        return part.frame_names
    folder = base / part.value
    if not folder.is_dir():
        return ()
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    others = [name for name in files if not name.lower().endswith(_SUFFIXES)]
    if others or not files:
        raise UserError(
            f"{part.value}: is a folder with {others[0] if others else 'no file'}, expected "
            f"frames alone ({', '.join(_SUFFIXES)}); name a video file, or a folder of its frames"
        )
    return tuple(f"{part.value.rstrip('/')}/{name}" for name in sorted(files, key=_by_number))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts frame_2 before frame_10."""
    pieces = re.split(r"(\d+)", name)
    return [(int(piece) if piece.isdigit() else -1, piece) for piece in pieces]


def frame_pictures(
    part: Part, names: Sequence[str], base: Path, config: DataConfig, vision: VisionConfig
) -> list[Picture]:
    """Return the frames that the model sees, within the sample's limits and the run's budgets.

    All frames are due unless the part has a rate of its own: the list was sampled before.

    Args:
        part: A video with `frame_list_rate`.
        names: Its frame files in order.
        base: Folder that relative names start from.
        config: Rate and budgets of the run, copies of remote media.
        vision: Patch and merge size.

    Raises:
        UserError: Without a rate, since the times would be unknown; for frames that are missing,
            are no images or have other sizes than the first.
    """
    rate = part.frame_list_rate
    where = part.value or names[0]
    if rate is None:
        raise UserError(
            f"{where}: is a video of {len(names)} frame files without a rate, expected the "
            "frames per second at which they were taken; add 'sample_fps'"
        )
    limited = part.limits.of_video(config.frames, vision, default_rate=rate)
    times = np.arange(len(names)) / rate
    chosen = choose_frames(
        times,
        limited,
        start_seconds=part.start_seconds,
        end_seconds=part.end_seconds,
        limits=part.limits,
    ).tolist()
    media = {index: Medium(locate_media(names[index], base), "image") for index in chosen}
    height, width = _common_size(list(media.values()), where, config.remote)
    patch_grid = frame_patch_grid(height, width, len(chosen), limited, vision)
    return [
        Picture(
            medium=media[index],
            frame=0,
            patch_grid=patch_grid,
            seconds=float(times[index]),
        )
        for index in chosen
    ]


def _common_size(media: Sequence[Medium], where: str, remote: RemoteConfig) -> tuple[int, int]:
    """Return height and width of all frames of a video; refuse other sizes than the first."""
    height, width = _size(media[0], remote)
    for medium in media[1:]:
        if (size := _size(medium, remote)) != (height, width):
            raise UserError(
                f"{medium.path}: is {size[0]} x {size[1]} pixels, expected {height} x {width} as "
                f"the first frame of {where}; make all frames of a video equally large"
            )
    return height, width


def _size(medium: Medium, remote: RemoteConfig) -> tuple[int, int]:
    with local_copy(medium, remote) as path:
        return probe_image(path)

# SPDX-License-Identifier: Apache-2.0
"""Names of media files in a record, and what it says about their rate and size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_keye.data.conversation.turns import Part
from megatron_keye.data.conversation.values import count, is_given, number, one_of, shown
from megatron_keye.data.media import is_remote, path_of_url
from megatron_keye.data.video.limits import MediaLimits
from megatron_keye.errors import UserError

Kind = Literal["image", "video"]

LIST_KEYS: dict[Kind, tuple[str, ...]] = {
    "image": ("images", "image", "image_path", "image_paths", "imgs"),
    "video": ("videos", "video", "video_path", "video_paths"),
}
"""Keys, of one meaning, under which a record or a message lists its files."""
_PIXELS = ("min_pixels", "max_pixels")
_FRAMES = ("nframes", "min_frames", "max_frames", "total_pixels")
LIMIT_KEYS: dict[Kind, tuple[str, ...]] = {
    "image": _PIXELS,
    "video": (*_PIXELS, "fps", *_FRAMES, "sample_fps"),
}
"""Keys of a record, or of a part, that limit media of each kind."""
WINDOW_KEYS = ("start", "end", "video_start", "video_end")

_MOST_BYTES_OF_A_NAME = 255
"""Longest name that Linux file systems hold, between two slashes."""
_MOST_BYTES_OF_A_PATH = 2048
"""Half of what Linux takes, since the folder of the samples comes before it."""


@dataclass(frozen=True)
class MediaValue:
    """One entry of a list of files: a name, or the names of the frames of a video."""

    name: str
    frame_names: tuple[str, ...] = ()


def media_list(raw: Mapping[str, Any], kind: Kind) -> list[MediaValue] | None:
    """Return the files of one kind that a record or a message lists; None if it has no list.

    Args:
        raw: The record or the message.
        kind: What to look for; a single name counts as a list where the key is singular.

    Raises:
        UserError: For two lists of one meaning that differ, or values that name no files.
    """

    def read(value: Any, key: str) -> list[MediaValue]:
        is_plural = key.strip("'").endswith("s")
        if not is_plural and isinstance(value, (str, dict)):
            value = [value]
        if not isinstance(value, list):
            raise UserError(f"{key}: got {shown(value)}, expected a list of file names")
        return [media_value(item, key, kind) for item in value]

    return one_of(raw, LIST_KEYS[kind], read)


def media_value(value: Any, key: str, kind: Kind) -> MediaValue:
    """Read a name: text, {"path": NAME}, {"url": NAME}, or for a video a list of frames.

    Raises:
        UserError: For anything else, as bytes in the record.
    """
    if isinstance(value, list) and kind == "video" and value:
        frames = [media_value(item, key, "image").name for item in value]
        return MediaValue("", tuple(frames))
    if isinstance(value, dict):
        if is_given(value.get("bytes")):
            raise UserError(
                f"{key}: has the bytes of a file, expected its name; write the file beside the "
                "samples and name it"
            )
        names = {k: v for k, v in value.items() if is_given(v)}
        if "url" in names and names.get("detail") == "auto":
            del names["detail"]
        if set(names) in ({"path"}, {"url"}):
            value = next(iter(names.values()))
    if not isinstance(value, str):
        raise UserError(f"{key}: got {shown(value)}, expected a list of file names")
    return MediaValue(file_name(value))


def file_name(name: str) -> str:
    """Return the name of a file: a path, "file:" taken off, package:// or a URL.

    Raises:
        UserError: For text that can be no name, or a file of another machine.
    """
    if name[:5].lower() == "data:":
        raise UserError(
            f"{shown(name)} holds a file instead of its name, expected a path or URL; write it to "
            "a file and name it"
        )
    if name[:5].lower() == "file:":
        name = path_of_url(name)
    elif is_remote(name):
        return name
    longest = max(len(part.encode(errors="replace")) for part in name.split("/"))
    is_too_long = longest > _MOST_BYTES_OF_A_NAME or len(name) > _MOST_BYTES_OF_A_PATH
    if is_too_long or "\0" in name:
        raise UserError(
            f"{shown(name)} is no file name, expected at most {_MOST_BYTES_OF_A_NAME} bytes "
            f"between slashes and {_MOST_BYTES_OF_A_PATH} in all; write data that stands in the "
            "record to a file and name it"
        )
    return name


def read_limits(raw: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Return what a record or a part says about rate and size, by MediaLimits' names.

    Beside these, "sample_fps" of a list of frames.

    Raises:
        UserError: For values that are no number of the right kind.
    """
    found: dict[str, Any] = {}
    for key in LIMIT_KEYS[kind]:
        value = raw.get(key)
        if value is None:
            continue
        if key in ("fps", "sample_fps"):
            found[key] = number(value, repr(key), "a rate above 0, as a number", least=1e-6)
        else:
            found[key] = count(value, repr(key), "a whole number above 0")
    return found


def media_part(
    value: MediaValue, kind: Kind, of_record: Mapping[str, Any], of_part: Mapping[str, Any]
) -> Part:
    """Put a part together.

    Args:
        value: What to show.
        kind: How.
        of_record: `read_limits` of the record, where the part says nothing.
        of_part: The part with its window and limits, or nothing.

    Raises:
        UserError: For limits that exclude each other.
    """
    own = read_limits(of_part, kind)
    # "nframes" and a rate are two answers to one question; the part's own counts.
    rivals = {"nframes"} if own.keys() & {"fps", "min_frames", "max_frames"} else set()
    rivals |= {"fps", "min_frames", "max_frames"} if "nframes" in own else set()
    of_kind = {key: of_record[key] for key in LIMIT_KEYS[kind] if key in of_record}
    limits = {key: v for key, v in of_kind.items() if key not in rivals} | own
    rate = limits.pop("sample_fps", None)
    if value.frame_names and rate is None:
        # The frames of a list were sampled already; then, as in qwen-vl-utils, fps is their rate.
        rate = limits.pop("fps", None)
    return Part(
        kind=kind,
        value=value.name,
        frame_names=value.frame_names,
        frame_list_rate=rate,
        start_seconds=_seconds(of_part, "start"),
        end_seconds=_seconds(of_part, "end"),
        limits=MediaLimits(**limits),
    )


def _seconds(raw: Mapping[str, Any], key: str) -> float | None:
    """Read one end of a video's window; qwen-vl-utils prefixes its key with "video_"."""
    return one_of(
        raw, (key, f"video_{key}"), lambda value, name: number(value, name, "seconds as a number")
    )

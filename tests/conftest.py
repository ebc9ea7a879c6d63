# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.tiny import tiny_run
from tests.support.train import Trained, train

# Busy machines are slow at times, and a failure has to come again in the same place.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch of the benchmark cases, and the number of damaged files."""
    parser.addoption("--benchmark", action="store_true", help="time kernels; needs a GPU")
    parser.addoption(
        "--benchmark-out",
        type=Path,
        default=Path("benchmarks.jsonl"),
        help="file that each case adds a JSON line to; default: benchmarks.jsonl",
    )
    parser.addoption(
        "--damaged",
        type=int,
        default=8,
        help="damaged forms of each kind of image and video that are read; default: 8",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave benchmark cases out, or everything else."""
    wanted = bool(config.getoption("--benchmark"))
    config.hook.pytest_deselected(items=[i for i in items if _is_benchmark(i) != wanted])
    items[:] = [item for item in items if _is_benchmark(item) == wanted]


def _is_benchmark(item: pytest.Item) -> bool:
    return item.get_closest_marker("benchmark") is not None


@pytest.fixture(autouse=True)
def environment_of_a_test() -> Iterator[None]:
    """Give the next test the environment that this one met: commands complete theirs in place."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def num_damaged(pytestconfig: pytest.Config) -> int:
    """Return how many damaged forms of each kind of file are read."""
    return int(pytestconfig.getoption("--damaged"))


@pytest.fixture(scope="session")
def one_rank() -> Trained:
    """Return the tiny model trained by one process that does everything."""
    return train(tiny_run())

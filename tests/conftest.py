"""What all tests share."""

import pytest

from tests.support.tiny import tiny_run
from tests.support.train import Trained, train


@pytest.fixture(scope="session")
def one_rank() -> Trained:
    """Return the tiny model trained by one process that does everything."""
    return train(tiny_run())

"""What all tests share."""

import pytest
from hypothesis import settings

from tests.support.tiny import tiny_run
from tests.support.train import Trained, train

# Busy machines are slow at times, and a failure has to come again in the same place.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def one_rank() -> Trained:
    """Return the tiny model trained by one process that does everything."""
    return train(tiny_run())

"""A rank's environment is completed, and what the user has set stays."""

import pytest

from megatron_keye.cli import environment
from megatron_keye.cli.environment import complete_environment


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(64, 4, "8"), (8, 4, "2"), (2, 4, "1")])
def test_ranks_share_the_cores(
    cores: int, ranks: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda process: range(cores))
    variables: dict[str, str] = {}
    complete_environment(variables, local_ranks=ranks)
    assert variables == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": threads,
        "PYTHONSAFEPATH": "1",
    }


def test_the_users_values_stay() -> None:
    mine = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "OMP_NUM_THREADS": "5", "PYTHONSAFEPATH": ""}
    variables = dict(mine)
    complete_environment(variables, local_ranks=2)
    assert variables == mine

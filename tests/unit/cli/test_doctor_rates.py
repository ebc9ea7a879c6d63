# SPDX-License-Identifier: Apache-2.0
"""doctor --rates measures what plan --rates reads, on one rank and on several."""

import json
from pathlib import Path

import pytest
import torch

from megatron_keye.cli import doctor, plan, rates
from megatron_keye.data.video.probe import probe
from megatron_keye.estimate.prediction.machine import read_machine
from megatron_keye.estimate.prediction.machines import H100
from tests.support.ranks import run_on_ranks

LOCAL = {"matmul", "copy", "gather", "reduce", "decoded"}


def make_small() -> None:
    rates._SECONDS, rates._CPU_SIDE, rates._CPU_BYTES = 0.001, 64, 2**16
    rates._CLIP_FRAMES, rates._CLIP_SIZE = 4, (160, 96)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SECONDS", "_CPU_SIDE", "_CPU_BYTES", "_CLIP_FRAMES", "_CLIP_SIZE"):
        monkeypatch.setattr(rates, name, getattr(rates, name))
    make_small()


def test_a_machines_rates_are_what_the_planner_reads(
    small: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "new" / "rates.json"
    assert doctor.main(["--rates", str(file), "--ranks", "1"]) == 0
    text = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "a CPU's rates: plans made with them say nothing of a GPU" in text
    found = json.loads(file.read_text())
    assert {name.split("_")[0] for name in found["rates"]} >= LOCAL
    machine = read_machine(file, H100)
    assert machine.name == found["device"]
    for name, rate in found["rates"].items():
        assert getattr(machine, name) == rate > 0
    assert plan.main(["keye_tiny", "--gpus", "2", "--rates", str(file)]) == 0
    assert f"keye_tiny on 2 {machine.name}" in capsys.readouterr().out.replace("\n    ", " ")


def _measure() -> dict[str, float]:
    make_small()
    return rates.measure_rates(torch.device("cpu"), 2, 2)


@pytest.mark.slow
def test_several_ranks_measure_their_links() -> None:
    for found in run_on_ranks(2, _measure):
        assert {"all_gather_gigabytes_per_second", "all_to_all_gigabytes_per_second"} <= set(found)
        assert all(rate > 0 for rate in found.values())


def test_the_clip_is_the_video_that_its_rate_is_of(small: None, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    rates.make_clip(clip)
    info = probe(clip)
    assert (info.num_frames, info.width, info.height) == (4, 160, 96)


def test_ranks_without_rates_and_a_folder_that_is_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["--ranks", "2"])
    (tmp_path / "file").write_text("")
    assert doctor.main(["--rates", str(tmp_path / "file" / "rates.json")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_rates_are_below_its_peaks() -> None:
    found = rates.measure_rates(torch.device("cuda", 0), 1, 1)
    assert 50 < found["matmul_tflops"] < 2_500
    assert 500 < found["copy_gigabytes_per_second"] < 9_000
    assert found["host_gigabytes_per_second"] < 200

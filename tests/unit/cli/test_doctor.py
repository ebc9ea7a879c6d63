# SPDX-License-Identifier: Apache-2.0
"""The doctor names each broken combination and the command that fixes it.

Packages are faked as folders of metadata, since the broken ones must not be installed anywhere.
"""

import json
import sys
from pathlib import Path

import pytest

from megatron_keye.cli import doctor, machine
from megatron_keye.config import backends

HEALTHY = machine.Facts(
    versions={
        "torch": "2.11.0",
        "megatron-core": doctor.pinned_version("megatron-core"),
        "triton": "3.6.0",
        "nvidia-dali": None,
        "zarr": None,
        "tensorboard": "2.21.0",
        "wandb": None,
    },
    torch=machine.Torch(version="2.11.0", cuda="13.0", num_gpus=0),
)


class Site:
    """A folder on the import path that holds only what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, version: str, files: tuple[str, ...] = ()) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file in files:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).touch()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return Site(tmp_path)


def facts_with(**changes: object) -> machine.Facts:
    return machine.Facts(**{**vars(HEALTHY), **changes})  # type: ignore[arg-type]


def only_problem(facts: machine.Facts) -> doctor.Problem:
    problems = doctor.find_problems(facts)
    assert len(problems) == 1, problems
    return problems[0]


def test_nothing_installed_is_no_error(site: Site) -> None:
    assert backends.transformer_engine_version() is None, "nothing is installed"
    assert backends.apex_version() is None, "nothing is installed"


def test_a_whole_transformer_engine_has_a_version(site: Site) -> None:
    for name in ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"):
        site.install(name, "2.20.2")
    assert backends.transformer_engine_version() == "2.20.2"
    assert backends.transformer_engine_cuda() == 13


def test_a_transformer_engine_built_from_source_is_whole(site: Site) -> None:
    site.install("transformer-engine", "2.20.2+abc", ("transformer_engine_torch.cpython-312.so",))
    assert backends.transformer_engine_version() == "2.20.2+abc"


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        (["transformer-engine"], "transformer-engine-cu13, transformer-engine-torch"),
        (["transformer-engine", "transformer-engine-cu13"], "transformer-engine-torch"),
        (["transformer-engine", "transformer-engine-torch"], "transformer-engine-cu13"),
        (["transformer-engine-cu12", "transformer-engine-torch"], "transformer-engine"),
    ],
)
def test_half_a_transformer_engine_is_named_with_both_remedies(
    site: Site, installed: list[str], missing: str
) -> None:
    for name in installed:
        site.install(name, "2.20.2")
    with pytest.raises(RuntimeError, match=f"without {missing}\\. ") as error:
        backends.transformer_engine_version()
    assert backends.TRANSFORMER_ENGINE_INSTALL in str(error.value)
    assert f"pip uninstall -y {' '.join(installed)}" in str(error.value)


def test_parts_of_different_versions_are_refused(site: Site) -> None:
    site.install("transformer-engine", "2.20.2")
    site.install("transformer-engine-cu13", "2.19.0")
    site.install("transformer-engine-torch", "2.20.2")
    with pytest.raises(RuntimeError, match="differ in version"):
        backends.transformer_engine_version()


def test_apex_of_the_package_index_is_refused(site: Site) -> None:
    site.install("apex", "0.9.10", ("apex/__init__.py", "apex/models.py"))
    with pytest.raises(RuntimeError, match="not NVIDIA's.*pip uninstall -y apex"):
        backends.apex_version()


def test_apex_of_nvidia_has_a_version(site: Site) -> None:
    site.install("apex", "0.1", ("apex/optimizers/a.py", "apex/normalization/b.py"))
    assert backends.apex_version() == "0.1"


def test_a_healthy_machine_has_no_problem() -> None:
    assert doctor.find_problems(HEALTHY) == []


def test_another_megatron_core_is_a_problem() -> None:
    problem = only_problem(facts_with(versions={**HEALTHY.versions, "megatron-core": "0.16.1"}))
    assert "got 0.16.1" in problem.what
    assert problem.fix == f"pip install megatron-core=={doctor.pinned_version('megatron-core')}"


def test_fused_kernels_are_those_that_a_run_takes_here(site: Site) -> None:
    with_gpu = facts_with(torch=machine.Torch(version="2.11.0", cuda="13.0", num_gpus=1))
    assert doctor.fused_kernels(HEALTHY) == "", "no GPU"
    assert doctor.fused_kernels(with_gpu) == "swiglu", "the others need a package"
    for name in ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"):
        site.install(name, "2.20.2")
    assert doctor.fused_kernels(with_gpu) == "permutation, router, swiglu, norm, weight_gradients"


def test_torch_without_cuda_is_a_problem_only_beside_gpus() -> None:
    torch = machine.Torch(version="2.11.0+cpu", cuda=None, num_gpus=0)
    assert doctor.find_problems(facts_with(torch=torch)) == [], "a machine without GPUs"
    assert "without CUDA" in only_problem(facts_with(torch=torch, gpus=["H100, 9.0, 580"])).what


def test_gpus_that_torch_does_not_see_are_a_problem() -> None:
    assert "sees none of the 1 GPUs" in only_problem(facts_with(gpus=["H100, 9.0, 535"])).what


def test_a_compiler_of_another_cuda_is_noted_but_training_works() -> None:
    problem = only_problem(facts_with(nvcc="12.8"))
    assert "nvcc is CUDA 12.8" in problem.what
    assert not problem.breaks_training


def test_an_older_cudnn_is_named_with_both_versions_but_training_works() -> None:
    pair = "PyTorch was compiled against (9, 19, 0) but found runtime version (9, 14, 0)"
    facts = facts_with(cudnn_error=f"cuDNN version incompatibility: {pair}")
    problem = only_problem(facts)
    assert pair in problem.what and "FlashAttention runs in its place" in problem.what
    assert not problem.breaks_training
    (row,) = [row for row in doctor.make_rows(facts, "", "", "") if row.name == "cuDNN"]
    assert row.version == ""


def test_cudnns_version_is_shown_with_dots() -> None:
    assert [doctor.cudnn_version(n) for n in (91_501, 92_000, None)] == ["9.15.1", "9.20.0", ""]


def test_transformer_engine_for_another_cuda_is_a_problem(site: Site) -> None:
    site.install("transformer-engine-cu12", "2.20.2")
    assert "is for CUDA 12" in only_problem(HEALTHY).what


def test_a_failing_import_is_a_problem() -> None:
    problem = only_problem(facts_with(import_errors={"megatron_keye._C": "undefined symbol: x"}))
    assert "undefined symbol: x" in problem.what
    assert problem.fix == doctor.EXTENSION_BUILD


def test_a_probe_that_crashes_is_reported() -> None:
    assert machine.probe("print('noise'); print('{\"a\": 1}')") == ({"a": 1}, "")
    assert machine.probe("raise ValueError('broken')") == ({}, "ValueError: broken")
    found, error = machine.probe("import os; os.abort()")
    assert found == {} and error, "a crash has an error text"


@pytest.mark.parametrize(("nvcc", "status"), [(None, 0), ("12.8", 0), ("bad", 1)])
def test_exit_status_is_whether_training_works(
    nvcc: str | None,
    status: int,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors = {"torch": "ImportError"} if nvcc == "bad" else {}
    facts = facts_with(nvcc=None if nvcc == "bad" else nvcc, import_errors=errors)
    monkeypatch.setattr(doctor, "gather_facts", lambda: facts)
    assert doctor.main(["--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["works"] == (status == 0)
    assert {part["name"] for part in report["parts"]} >= {"torch", "NVIDIA apex", "NVDEC"}

# SPDX-License-Identifier: Apache-2.0
"""What an installation brings, and files about the package that no other test reads."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_keye

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")

KERNELS_ALONE = """
import importlib, json, pkgutil, sys, time
import torch, triton
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
blocked = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Refuse())
for name in [name for name in sys.modules if name.split(".")[0] in blocked]:
    del sys.modules[name]
start = time.process_time()
import megatron_keye.kernels.sparse_attention as sparse
seconds = time.process_time() - start
import megatron_keye.kernels as kernels
for module in pkgutil.walk_packages(kernels.__path__, "megatron_keye.kernels."):
    importlib.import_module(module.name)
q, k = torch.ones(2, 2, 8), torch.ones(2, 1, 8)
out, _ = sparse.sparse_attention(q, k, k, torch.tensor([[0, -1], [0, 1]]), scale=1.0)
others = sorted({name.split(".")[0] for name in sys.modules} & blocked)
print(json.dumps({"seconds": seconds, "sum": out.sum().item(), "others": others}))
"""


def closure(*names: str) -> set[str]:
    """Return distributions with all that they require."""
    known, waiting = set[str](), [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        needed = [Requirement(line) for line in lines]
        waiting += [
            canonicalize_name(each.name)
            for each in needed
            if each.marker is None or each.marker.evaluate({"extra": ""})
        ]
    return known


def test_the_kernels_need_torch_and_triton_alone_and_import_quickly() -> None:
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch", "triton"]
    assert EXTRAS["kernels"] == []
    allowed = closure("torch", "triton")
    blocked = [
        package
        for package, owners in metadata.packages_distributions().items()
        if package != "megatron_keye" and not allowed & {canonicalize_name(o) for o in owners}
    ]
    assert {"megatron", "numpy", "av"} <= set(blocked)
    command = [sys.executable, "-c", KERNELS_ALONE, json.dumps(blocked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["sum"] == pytest.approx(32.0)
    assert told["others"] == []
    assert told["seconds"] < 0.1, "processor time of the import beyond torch's"


@pytest.mark.parametrize("extra", ["", "train", "demo", "hf", "dev"])
def test_the_pinned_set_satisfies_what_make_installs(extra: str) -> None:
    lines = EXTRAS[extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= set(EXTRAS)
            continue
        pinned = PINS.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(pinned), f"{requirement}: pinned is {pinned}"


def test_the_image_fits_the_pinned_set() -> None:
    base = re.search(
        r"^FROM nvidia/cuda:(\d+\.\d+\.\d+)-cudnn-devel-ubuntu24\.04$", DOCKERFILE, re.M
    )
    assert base, "a pinned base with a compiler and cuDNN's headers"
    assert base[1] == PINS["cuda-toolkit"], "torch's CUDA"
    engine = next(line for line in EXTRAS["gpu"] if line.startswith("transformer-engine"))
    assert f"core_cu{base[1].split('.')[0]}" in engine
    python = (ROOT / ".python-version").read_text().strip()
    assert {f"python{python}", f"python{python}-dev", f"python{python}-venv"} <= set(
        DOCKERFILE.split()
    )
    assert python in PROJECT["requires-python"]
    settings = dict(
        word.split("=", 1)
        for line in re.findall(r"^ENV (.*)$", DOCKERFILE, re.M)
        for word in line.split()
    )
    assert settings["MEGATRON_KEYE_BUILD_CUDA"] == "1", "no GPU is visible in a build"
    default_arch = re.search(r'DEFAULT_ARCH = "(.*)"', (ROOT / "setup.py").read_text())
    assert default_arch and settings["TORCH_CUDA_ARCH_LIST"] == default_arch[1]


def test_the_image_installs_the_pins_first_and_resolves_nothing_else() -> None:
    installs = re.findall(r"pip install (.*?)(?:&&|$)", DOCKERFILE, re.M)
    assert [re.findall(r"-[rec] \S+", each) for each in installs] == [
        ["-r constraints.txt"],
        ["-c constraints.txt", '-e ".[demo,gpu]"'],
    ]
    assert "--no-deps" in installs[0] and "--no-build-isolation" in installs[1]
    assert {"demo", "gpu"} <= set(EXTRAS)
    for path in re.findall(r"^COPY (\S+) ", DOCKERFILE, re.M):
        assert (ROOT / path).exists(), path
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".venv" in ignored and "**/*.so" in ignored, "nothing built here gets into the image"


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert str(cited["version"]) == megatron_keye.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["title"] == megatron_keye.__name__


def test_issue_forms_are_forms() -> None:
    forms = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]
    assert len(forms) >= 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form), path.name
        for field in form["body"]:
            assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
            assert field["attributes"]["label"]
        identities = [field["id"] for field in form["body"]]
        assert len(set(identities)) == len(identities)


def test_continuous_integration_runs_commands_of_this_tree() -> None:
    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [
        step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        word, *others = command.split()
        if word == "make":
            assert re.search(rf"^{others[0]}:", makefile, re.M), command
        else:
            assert (ROOT / word).is_file(), command


def test_security_names_files_that_exist() -> None:
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", (ROOT / "SECURITY.md").read_text())
    assert named
    for name in named:
        assert (ROOT / name).is_file() or (ROOT / "megatron_keye" / name).is_file(), name

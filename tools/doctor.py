"""Says what the training stack finds on this machine, what is missing, and what that costs.

A wrong combination of GPU packages shows up far from its cause, often as a failed import of
Megatron-Core. Anything that might crash is imported in a process of its own.

    python tools/doctor.py [--json]

Exit status 0 when training works here, 1 when something broken was found.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the doctor also runs where the package is not installed

from megatron_keye.config import backends  # noqa: E402

# Distribution -> (what it gives, what its absence costs); REQUIRED ones are never absent.
REQUIRED = {
    "torch": "tensors, autograd, processes",
    "megatron-core": "decoder blocks, schedules, checkpoints",
    "triton": "GPU kernels; imported by megatron-core",
}
OPTIONAL = {
    "nvidia-dali": ("video decoded on the GPU", "video is decoded on the CPU"),
    "zarr": ("stores of prepared data", "data is prepared anew in each run"),
    "tensorboard": ("event files of a run", "no curves, only the log"),
}
ALIASES = {"nvidia-dali": backends.DALI_NAMES}
EXTENSION_BUILD = "MEGATRON_KEYE_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e ."
IMPORT_SECONDS = 180

TORCH_PROBE = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "num_gpus": torch.cuda.device_count()}))
"""
EXTENSION_PROBE = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
built = importlib.util.find_spec("megatron_keye._C") is not None
if built:
    import torch
    import megatron_keye._C
print(json.dumps({"built": built}))
"""
NVDEC_PROBE = "import ctypes; ctypes.CDLL('libnvcuvid.so.1'); print('{}')"
MEGATRON_PROBE = "import megatron.core; print('{}')"


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What torch says of itself; `cuda` is None for a build without it."""

    version: str
    cuda: str | None
    num_gpus: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. An empty `version` means absent."""

    name: str
    version: str
    gives: str
    without: str = "training does not start"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to mend. `breaks_training` decides the exit status."""

    what: str
    mend: str
    breaks_training: bool = True


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that was found on the machine, before any judgement."""

    versions: dict[str, str | None]
    torch: Torch | None = None
    nvcc: str | None = None
    gpus: list[str] = field(default_factory=list)
    has_nvdec: bool = False
    has_extension: bool = False
    import_errors: dict[str, str] = field(default_factory=dict)


def probe(code: str) -> tuple[dict[str, object], str]:
    """Run `code` in another Python; return the JSON it printed last and "", or {} and its error.

    Warnings that it writes are left out; a crash is reported by its signal or exit status.
    """
    command = [sys.executable, "-W", "ignore", "-c", code, str(ROOT)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"took longer than {IMPORT_SECONDS} s"
    if done.returncode == 0:
        found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
        return found, ""
    lines = done.stderr.strip().splitlines()
    return {}, lines[-1] if lines else f"exit status {done.returncode}"


def output_of(*command: str) -> str:
    """Return what a program prints, or "" when it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except subprocess.SubprocessError:
        return ""


def gather_facts() -> Facts:
    """Look at the distributions, the compiler, the driver, and import what must be imported."""
    versions = {}
    for name in (*REQUIRED, *OPTIONAL):
        found = (backends.installed_version(alias) for alias in ALIASES.get(name, (name,)))
        versions[name] = next((version for version in found if version), None)
    release = re.search(r"release (\S+),", output_of("nvcc", "--version"))
    query = ("--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    with ThreadPoolExecutor(max_workers=4) as pool:
        probes = (TORCH_PROBE, MEGATRON_PROBE, EXTENSION_PROBE, NVDEC_PROBE)
        torch, megatron, extension, nvdec = pool.map(probe, probes)
    errors = {"torch": torch[1], "megatron.core": megatron[1], "megatron_keye._C": extension[1]}
    return Facts(
        versions=versions,
        torch=None if torch[1] else Torch(**torch[0]),  # type: ignore[arg-type]
        nvcc=release[1] if release else None,
        gpus=output_of("nvidia-smi", *query).strip().splitlines(),
        has_nvdec=not nvdec[1],
        has_extension=bool(extension[0].get("built")),
        import_errors={name: error for name, error in errors.items() if error},
    )


def pinned_version(name: str) -> str:
    """Return the version that pyproject.toml pins the dependency `name` to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in project["dependencies"] if line.startswith(f"{name}==")]
    assert len(pins) == 1, f"pyproject.toml pins {name} {len(pins)} times"
    return str(pins[0].removeprefix(f"{name}=="))


def or_problem(version: Callable[[], str | None], problems: list[Problem]) -> str:
    """Return the version, or "" after noting the RuntimeError that it raised as a problem."""
    try:
        return version() or ""
    except RuntimeError as error:
        what, _, mend = str(error).partition(". ")
        problems.append(Problem(what=what, mend=mend))
        return ""


def find_problems(facts: Facts) -> list[Problem]:
    """Return what does not work or does not fit together, apart from optional backends."""
    problems = [
        Problem(what=f"{name} is not installed", mend="pip install -c constraints.txt -e .")
        for name in REQUIRED
        if facts.versions[name] is None
    ]
    for name, error in facts.import_errors.items():
        mend = EXTENSION_BUILD if name == "megatron_keye._C" else "mend what it names, then again"
        if facts.versions["torch"] is not None:
            problems.append(Problem(what=f"import {name} fails: {error}", mend=mend))
    pinned = pinned_version("megatron-core")
    version = facts.versions["megatron-core"]
    if version not in (None, pinned):
        problems.append(
            Problem(
                what=f"megatron-core: got {version}, expected {pinned}",
                mend=f"pip install megatron-core=={pinned}",
            )
        )
    return problems + find_cuda_problems(facts)


def find_cuda_problems(facts: Facts) -> list[Problem]:
    """Return where torch, driver, compiler and Transformer Engine disagree about CUDA."""
    torch = facts.torch
    if torch is None:
        return []
    if torch.cuda is None:
        what = f"torch {torch.version} is built without CUDA, but there are {len(facts.gpus)} GPUs"
        mend = "pip install --force-reinstall -c constraints.txt torch"
        return [Problem(what=what, mend=mend)] if facts.gpus else []
    problems = []
    major = torch.cuda.split(".")[0]
    if facts.gpus and torch.num_gpus == 0:
        what = f"torch sees none of the {len(facts.gpus)} GPUs"
        mend = f"unset CUDA_VISIBLE_DEVICES, or install a driver for CUDA {major}"
        problems.append(Problem(what=what, mend=mend))
    if facts.nvcc is not None and facts.nvcc.split(".")[0] != major:
        problems.append(
            Problem(
                what=f"nvcc is CUDA {facts.nvcc}, torch is built for CUDA {torch.cuda}: "
                "extensions cannot be built",
                mend=f"put the toolkit of CUDA {major} first in PATH, or set CUDA_HOME to it",
                breaks_training=False,
            )
        )
    engine_cuda = backends.transformer_engine_cuda()
    if engine_cuda is not None and str(engine_cuda) != major:
        problems.append(
            Problem(
                what=f"Transformer Engine is for CUDA {engine_cuda}, torch for CUDA {torch.cuda}",
                mend=f"pip uninstall -y transformer-engine-cu{engine_cuda} && "
                + backends.TRANSFORMER_ENGINE_INSTALL,
            )
        )
    return problems


def make_rows(facts: Facts, transformer_engine: str, apex: str) -> list[Row]:
    """Return the lines of the table, with an empty version for what is absent."""
    torch = facts.torch
    versions = {name: version or "" for name, version in facts.versions.items()}
    if torch is not None:
        versions["torch"] = f"{torch.version} ({f'CUDA {torch.cuda}' if torch.cuda else 'CPU'})"
    rows = [Row(name=name, version=versions[name], gives=REQUIRED[name]) for name in REQUIRED]
    optional = {
        "transformer-engine": (
            transformer_engine,
            "fused layers, grouped GEMM, FP8",
            "Megatron-Core's own layers: same numbers, slower on GPUs",
        ),
        "NVIDIA apex": (
            apex,
            "fused optimizer and norms",
            "torch's or Transformer Engine's are used",
        ),
        **{name: (versions[name], *words) for name, words in OPTIONAL.items()},
        "nvcc": (
            facts.nvcc or "",
            "builds megatron_keye._C",
            "kernels in Triton or PyTorch instead of CUDA C++",
        ),
        "NVDEC": (
            "libnvcuvid loads" if facts.has_nvdec else "",
            "hardware video decoder for DALI",
            "video is decoded on the CPU",
        ),
        "megatron_keye._C": (
            "built" if facts.has_extension else "",
            "CUDA C++ kernels",
            "kernels in Triton or PyTorch instead",
        ),
        "GPUs": ("\n".join(facts.gpus), "training at speed", "tiny recipes only, with gloo"),
    }
    return rows + [
        Row(name=name, version=version, gives=gives, without=without)
        for name, (version, gives, without) in optional.items()
    ]


def show(rows: list[Row], problems: list[Problem]) -> None:
    """Print the table, then each problem with what mends it."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # itself one of the packages that may be missing
        for row in rows:
            print(f"{row.name}: {row.version or f'absent; {row.without}'}")
    else:
        table = Table("part", "found", "gives", "without it", title="megatron_keye")
        for row in rows:
            found = row.version or "[yellow]absent[/]"
            table.add_row(row.name, found, row.gives, "" if row.version else row.without)
        Console().print(table)
    for problem in problems:
        print(f"{'broken' if problem.breaks_training else 'note'}: {problem.what}")
        print(f"  mend: {problem.mend}")
    if not any(problem.breaks_training for problem in problems):
        print("training works here")


def main(arguments: list[str] | None = None) -> int:
    """Examine the machine, print the findings, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    facts = gather_facts()
    problems: list[Problem] = []
    transformer_engine = or_problem(backends.transformer_engine_version, problems)
    apex = or_problem(backends.apex_version, problems)
    problems += find_problems(facts)
    rows = make_rows(facts, transformer_engine, apex)
    works = not any(problem.breaks_training for problem in problems)
    if options.json:
        report = {
            "works": works,
            "parts": [asdict(row) for row in rows],
            "problems": [asdict(problem) for problem in problems],
        }
        print(json.dumps(report, indent=2))
    else:
        show(rows, problems)
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())

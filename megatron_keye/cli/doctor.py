"""Says what the training stack finds on this machine, what is missing, and what that costs.

    megatron-keye doctor [--json]

A wrong combination of GPU packages shows up far from its cause, often as a failed import of
Megatron-Core. Exit status 0 when training works here, 1 when something broken was found.
"""

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.machine import OPTIONAL, REQUIRED, Facts, gather_facts
from megatron_keye.cli.status import FAILED
from megatron_keye.config import backends

EXTENSION_BUILD = "MEGATRON_KEYE_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e ."


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


def pinned_version(name: str) -> str:
    """Return the version that megatron_keye pins the distribution `name` to."""
    pins = [line for line in _dependencies() if line.startswith(f"{name}==")]
    assert len(pins) == 1, f"megatron_keye pins {name} {len(pins)} times"
    return pins[0].removeprefix(f"{name}==")


def _dependencies() -> list[str]:
    """Return what the package requires: of the repository it lies in, else as it was installed."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        return metadata.requires("megatron-keye") or []
    dependencies: list[str] = tomllib.loads(project.read_text())["project"]["dependencies"]
    return dependencies


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


def main(arguments: Sequence[str]) -> int:
    """Examine the machine, print the findings, return the exit status."""
    parser = make_parser("megatron-keye doctor", __doc__)
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
    return 0 if works else FAILED

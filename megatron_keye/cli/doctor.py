# SPDX-License-Identifier: Apache-2.0
"""Reports what the training stack finds on this machine, what is missing, and the consequences.

    megatron-keye doctor [--json]
    megatron-keye doctor --rates rates.json [--ranks N]

GPU packages that do not fit together often fail far from the cause, as in an import of
Megatron-Core. Exit status 0 when training works here, 1 when something is broken.

--rates measures, in less than a minute, how fast this machine multiplies, copies, gathers,
reduces and decodes, and with several ranks how fast they exchange, for megatron-keye plan --rates.
torchrun may start its ranks, on several nodes too.
"""

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from megatron_keye.cli.arguments import add_count, add_json, make_parser
from megatron_keye.cli.doctor_rates import write_rates
from megatron_keye.cli.machine import OPTIONAL, REQUIRED, Facts, gather_facts
from megatron_keye.cli.status import FAILED, reports_user_errors
from megatron_keye.config import TrainingConfig, backends
from megatron_keye.config.fused_kernels import choose_fusions
from megatron_keye.config.fusions import Fusion, FusionsConfig

EXTENSION_BUILD = "MEGATRON_KEYE_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e ."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; an empty `version` means that the component is absent."""

    name: str
    version: str
    provides: str
    if_absent: str = "training does not start"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A defect and its fix; `breaks_training` decides the exit status."""

    what: str
    fix: str
    breaks_training: bool = True


def pinned_version(name: str) -> str:
    """Return the version to which megatron_keye pins the distribution `name`."""
    pins = [line for line in _dependencies() if line.startswith(f"{name}==")]
    assert len(pins) == 1, f"megatron_keye pins {name} {len(pins)} times"
    return pins[0].removeprefix(f"{name}==")


def _dependencies() -> list[str]:
    """Return the requirements of the package's repository or, outside one, of its installation."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        lines = metadata.requires("megatron-keye") or []
        return [line.partition(";")[0].strip() for line in lines]
    declared = tomllib.loads(project.read_text())["project"]
    dependencies: list[str] = declared["dependencies"] + declared["optional-dependencies"]["train"]
    return dependencies


def version_or_problem(version: Callable[[], str | None], problems: list[Problem]) -> str:
    """Return the version; on a RuntimeError add it to `problems` and return ""."""
    try:
        return version() or ""
    except RuntimeError as error:
        what, _, fix = str(error).partition(". ")
        problems.append(Problem(what=what, fix=fix))
        return ""


def find_problems(facts: Facts) -> list[Problem]:
    """Return what fails to import, is missing or conflicts; optional backends may be absent."""
    problems = [
        Problem(
            what=f"{name} is not installed", fix="pip install -c constraints.txt -e '.[train]'"
        )
        for name in REQUIRED
        if facts.versions[name] is None
    ]
    for name, error in facts.import_errors.items():
        fix = EXTENSION_BUILD if name == "megatron_keye._C" else "resolve this import error first"
        if facts.versions["torch"] is not None:
            problems.append(Problem(what=f"import {name} fails: {error}", fix=fix))
    pinned = pinned_version("megatron-core")
    version = facts.versions["megatron-core"]
    if version not in (None, pinned):
        problems.append(
            Problem(
                what=f"megatron-core: got {version}, expected {pinned}",
                fix=f"pip install megatron-core=={pinned}",
            )
        )
    return problems + find_cuda_problems(facts)


def find_cuda_problems(facts: Facts) -> list[Problem]:
    """Return conflicts between torch's CUDA and cuDNN and those of other packages."""
    torch = facts.torch
    if torch is None:
        return []
    if torch.cuda is None:
        what = f"torch {torch.version} is built without CUDA, but there are {len(facts.gpus)} GPUs"
        fix = "pip install --force-reinstall -c constraints.txt torch"
        return [Problem(what=what, fix=fix)] if facts.gpus else []
    problems = []
    major = torch.cuda.split(".")[0]
    if facts.gpus and torch.num_gpus == 0:
        what = f"torch sees none of the {len(facts.gpus)} GPUs"
        fix = f"unset CUDA_VISIBLE_DEVICES, or install a driver for CUDA {major}"
        problems.append(Problem(what=what, fix=fix))
    if facts.nvcc is not None and facts.nvcc.split(".")[0] != major:
        problems.append(
            Problem(
                what=f"nvcc is CUDA {facts.nvcc}, torch is built for CUDA {torch.cuda}: "
                "extensions cannot be built",
                fix=f"put the toolkit of CUDA {major} first in PATH, or set CUDA_HOME to it",
                breaks_training=False,
            )
        )
    if facts.cudnn_error:
        problems.append(
            Problem(
                what=f"{facts.cudnn_error}: FlashAttention runs in its place, which takes 1.7 "
                "times as long on rows of 128K tokens",
                fix="unset CUDNN_HOME, so that a run sets it to the cuDNN that torch brings, and "
                "take folders with another one out of LD_LIBRARY_PATH",
                breaks_training=False,
            )
        )
    engine_cuda = backends.transformer_engine_cuda()
    if engine_cuda is not None and str(engine_cuda) != major:
        problems.append(
            Problem(
                what=f"Transformer Engine is for CUDA {engine_cuda}, torch for CUDA {torch.cuda}",
                fix=f"pip uninstall -y transformer-engine-cu{engine_cuda} && "
                + backends.TRANSFORMER_ENGINE_INSTALL,
            )
        )
    return problems


def cudnn_version(number: int | None) -> str:
    """Return cuDNN's version as text, such as 9.15.1 for 91501; "" for None."""
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}" if number else ""


def fused_kernels(facts: Facts) -> str:
    """Return the fused kernels of the decoder that can run here in bf16."""
    wanted: Fusion = "auto"
    everything = FusionsConfig(**dict.fromkeys((f.name for f in fields(FusionsConfig)), wanted))
    training = TrainingConfig(steps=1, fusions=everything)
    has_gpu = bool(facts.torch and facts.torch.num_gpus)
    engine = backends.uses_transformer_engine(training, has_gpu=has_gpu)
    return ", ".join(
        choose_fusions(training, has_gpu=has_gpu, uses_transformer_engine=engine).names()
    )


def make_rows(facts: Facts, transformer_engine: str, apex: str, fused: str) -> list[Row]:
    """Return the lines of the table: required components, then optional ones."""
    torch = facts.torch
    versions = {name: version or "" for name, version in facts.versions.items()}
    if torch is not None:
        versions["torch"] = f"{torch.version} ({f'CUDA {torch.cuda}' if torch.cuda else 'CPU'})"
    rows = [Row(name=name, version=versions[name], provides=REQUIRED[name]) for name in REQUIRED]
    optional = {
        "transformer-engine": (
            transformer_engine,
            "fused layers, grouped GEMM, FP8",
            "Megatron-Core's own layers: same results, slower on GPUs",
        ),
        "NVIDIA apex": (
            apex,
            "fused optimizer and norms",
            "those of torch or Transformer Engine",
        ),
        "fused kernels": (
            fused,
            "fewer passes over memory in experts, norms and weight gradients",
            "plain forms: same results, slower on GPUs",
        ),
        **{name: (versions[name], *texts) for name, texts in OPTIONAL.items()},
        "nvcc": (
            facts.nvcc or "",
            "builds megatron_keye._C",
            "kernels in Triton or PyTorch instead of CUDA C++",
        ),
        "cuDNN": (
            cudnn_version(facts.cudnn),
            "dense attention of long rows",
            "FlashAttention in its place",
        ),
        "NVDEC": (
            "libnvcuvid loads" if facts.has_nvdec else "",
            "hardware video decoder for DALI",
            "video is decoded on the CPU",
        ),
        "megatron_keye._C": (
            "built" if facts.has_extension else "",
            "CUDA C++ kernels",
            f"kernels in Triton or PyTorch instead; {build_report()}",
        ),
        "GPUs": ("\n".join(facts.gpus), "training at full speed", "tiny recipes only, with gloo"),
    }
    return rows + [
        Row(name=name, version=version, provides=provides, if_absent=if_absent)
        for name, (version, provides, if_absent) in optional.items()
    ]


def build_report() -> str:
    """Return what the installation said of the extension."""
    report = Path(__file__).parents[1] / "extension_build.txt"
    return report.read_text().strip() if report.is_file() else "the package was not installed"


def show(rows: list[Row], problems: list[Problem]) -> None:
    """Print the table, then each problem with its fix."""
    try:
        from rich.console import Console
        from rich.table import Column, Table
    except ImportError:  # itself one of the packages that may be missing
        for row in rows:
            print(f"{row.name}: {row.version or f'absent; {row.if_absent}'}")
    else:
        columns = Column("component", no_wrap=True), "found", "provides", "if absent"
        table = Table(*columns, title="megatron_keye")
        for row in rows:
            found = row.version or "[yellow]absent[/]"
            table.add_row(row.name, found, row.provides, "" if row.version else row.if_absent)
        Console().print(table)
    for problem in problems:
        print(f"{'broken' if problem.breaks_training else 'note'}: {problem.what}")
        print(f"  fix: {problem.fix}")
    if not any(problem.breaks_training for problem in problems):
        print("training works here")


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Examine the machine, print the findings and return the exit status."""
    parser = make_parser("megatron-keye doctor", __doc__)
    add_json(parser)
    parser.add_argument("--rates", type=Path, metavar="FILE", help="measure rates, as JSON")
    add_count(parser, "--ranks", "processes of --rates; default: the number of GPUs, else 1")
    options = parser.parse_args(arguments)
    if options.rates is not None:
        return write_rates(options.rates, options.ranks)
    if options.ranks is not None:
        parser.error("--ranks needs --rates")
    facts = gather_facts()
    problems: list[Problem] = []
    transformer_engine = version_or_problem(backends.transformer_engine_version, problems)
    apex = version_or_problem(backends.apex_version, problems)
    # A package that is broken has raised above, and is a problem already.
    fused = "" if problems else fused_kernels(facts)
    problems += find_problems(facts)
    rows = make_rows(facts, transformer_engine, apex, fused)
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

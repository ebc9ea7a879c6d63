# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources compile for Hopper without a warning, within their registers.

Needs nvcc, and no GPU. What ptxas only notes is a defect here too: matrix products that it makes
wait for each other, and a register hand-over between warpgroups that it ignores.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
HOST_PROGRAMS = sorted(Path(__file__).parent.glob("*.cu"))
SPILL_LIMITS_BYTES = {"backward_kernel": 28}
"""Of a thread, by kernel; others spill nothing. The sparse attention's backward pass with 128
channels and two consumers does once in a tile of 64 keys, beside 192 registers of accumulators."""
REGISTERS_OF_MULTIPROCESSOR = 65536

NVCC = shutil.which("nvcc")


class Kernel(NamedTuple):
    """What ptxas and the PTX text say of one kernel."""

    spilled_bytes: int
    registers: int
    threads: int | None
    """Of a block at most, where its launch bounds say so."""
    blocks: int
    """That a multiprocessor holds at least."""

    @property
    def registers_of_blocks(self) -> int:
        """Registers that its blocks take of a multiprocessor."""
        each = -(-self.registers // 8) * 8
        return each * (self.threads or 0) * self.blocks


def read_kernels(report: str, ptx: str) -> dict[str, Kernel]:
    """Return the kernels by name.

    Args:
        report: What `ptxas -v` printed.
        ptx: What it compiled.
    """
    bounds: dict[str, tuple[int | None, int]] = {}
    for entry in re.split(r"\.visible \.entry |\.entry ", ptx)[1:]:
        head = entry[: entry.index("{")]
        threads = re.search(r"\.maxntid (\d+)", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        name = re.split(r"\W", head, maxsplit=1)[0]
        bounds[name] = int(threads[1]) if threads else None, int(blocks[1]) if blocks else 1
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes spill stores", part)
        used = re.search(r"Used (\d+) registers", part)
        assert spilled and used, f"ptxas says something else now: {part[:500]}"
        name = part[: part.index("'")]
        kernels[name] = Kernel(int(spilled[1]), int(used[1]), *bounds[name])
    return kernels


def spill_limit_bytes(name: str) -> int:
    """Return what a thread of a kernel may spill, by its mangled name."""
    return max(
        (limit for kernel, limit in SPILL_LIMITS_BYTES.items() if kernel in name), default=0
    )


def test_a_report_is_read_right() -> None:
    report = (
        "ptxas info    : Compiling entry function 'wide' for 'sm_90a'\n"
        "    32 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 165 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function 'free' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 10 registers, used 0 barriers\n"
    )
    ptx = ".visible .entry wide(\n)\n.maxntid 384\n.minnctapersm 2\n{ }\n.entry free()\n{ }\n"
    kernels = read_kernels(report, ptx)
    assert kernels == {"wide": Kernel(28, 165, 384, 2), "free": Kernel(0, 10, None, 1)}
    assert kernels["wide"].registers_of_blocks == 168 * 384 * 2, "in steps of 8"
    assert (spill_limit_bytes("wide"), spill_limit_bytes("_Z15backward_kernelv")) == (0, 28)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_compiles_cleanly_within_its_registers(source: Path, tmp_path: Path) -> None:
    if NVCC is None or torch.version.cuda is None:
        pytest.skip("no nvcc, or a torch without CUDA's headers")
    command = [NVCC, "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-std=c++20"]
    command += ["-Xptxas=-v", "-Werror=all-warnings", "--keep", f"--keep-dir={tmp_path}"]
    command += [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in include_paths("cuda"))]
    command += ["-o", str(tmp_path / "out.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert not re.search(r"\(C75\d\d\)|serialized|setmaxnreg", report), report
    (ptx,) = tmp_path.glob("*.ptx")
    kernels = read_kernels(report, ptx.read_text())
    assert kernels, report
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes <= spill_limit_bytes(name), f"{name}: {kernel}"
        assert kernel.registers_of_blocks <= REGISTERS_OF_MULTIPROCESSOR, f"{name}: {kernel}"


@pytest.mark.slow
@pytest.mark.parametrize("program", HOST_PROGRAMS, ids=lambda path: path.stem)
def test_a_host_program_finds_nothing_wrong(program: Path, tmp_path: Path) -> None:
    if NVCC is None:
        pytest.skip("no nvcc")
    command = [NVCC, "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20"]
    command += ["-Werror=all-warnings", f"-I{ROOT / 'csrc'}", "-o", "program", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    done = subprocess.run(tmp_path / "program", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

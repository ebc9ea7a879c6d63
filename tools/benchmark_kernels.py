"""Times the operators of a sparse layer beside torch's dense attention, on one GPU.

    python -m tools.benchmark_kernels --length 131072 --selection local --out results.jsonl

Useful FLOP count selected keys only, with 2 FLOP a multiplication and addition; the backward of
the attention counts 2.5 times its forward. Dense attention is torch's cuDNN backend, in the same
process. Every case prints one line and writes one JSON line.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_keye.kernels.indexer_loss import sparse_indexer_loss
from megatron_keye.kernels.indexer_scores import selected_indexer_scores
from megatron_keye.kernels.lightning_indexer import lightning_indexer
from megatron_keye.kernels.sparse_attention import sparse_attention
from megatron_keye.kernels.union_lists import union_lists
from tests.support.numerics import make_selection

HEADS, GROUPS, CHANNELS = 32, 4, 128
INDEXER_HEADS, INDEXER_CHANNELS = 16, 64
TOP_K = 2048
SCALE = CHANNELS**-0.5

ThreeTensors = tuple[Tensor, Tensor, Tensor]


class Report:
    """Times cases and writes one JSON line for each."""

    def __init__(self, repeats: int, fields: dict[str, Any], path: Path | None) -> None:
        self.repeats, self.fields, self.path = repeats, fields, path
        self.medians: dict[str, float] = {}

    def time(self, op: str, impl: str, run: Callable[[], object], flop: float = 0.0) -> None:
        """Time `run`, after two calls that compile and warm up, and report it as `op`."""
        for _ in range(2):
            run()
        milliseconds = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            milliseconds.append(start.elapsed_time(end))
        ordered = torch.tensor(milliseconds, dtype=torch.float64)
        p10, median, p90 = ordered.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
        self.medians[op] = median
        line = {
            "op": op,
            "impl": impl,
            **self.fields,
            "median_us": round(median * 1e3, 1),
            "p10_us": round(p10 * 1e3, 1),
            "p90_us": round(p90 * 1e3, 1),
            "tflop_per_s": round(flop / median / 1e9, 1),
        }
        self.write(line)
        print(f"{op:28} {impl:7} {median:9.2f} ms  {line['tflop_per_s']:7.1f} useful TFLOP/s")

    def write(self, line: dict[str, Any]) -> None:
        """Append a JSON line to the file, if there is one."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    """Time every operator at one length and selection."""
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmark_kernels: no CUDA device; there is nothing to time on a CPU")
    for length in arguments.length:
        for kind in arguments.selection:
            benchmark(length, kind, arguments)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--selection", nargs="+", default=["local", "uniform"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file that JSON lines are added to")
    return parser.parse_args()


def benchmark(length: int, kind: str, arguments: argparse.Namespace) -> None:
    """Time every operator on a causal row of `length` tokens."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    heads = (
        normal(length, HEADS, CHANNELS),
        normal(length, GROUPS, CHANNELS),
        normal(length, GROUPS, CHANNELS),
    )
    indexer = (
        normal(length, INDEXER_HEADS, INDEXER_CHANNELS),
        normal(length, INDEXER_CHANNELS),
        normal(length, INDEXER_HEADS),
    )
    indices_TK = make_selection(kind, length, length, TOP_K, seed=1).cuda()
    num_selected = int((indices_TK >= 0).sum())
    counts_B = union_lists(indices_TK, length).counts_B.double()
    fields = describe(length, kind, num_selected, counts_B)
    print(
        f"\n{length} tokens, {kind}: {num_selected / length:.0f} keys a query, union of 16 "
        f"{counts_B.mean():.0f} on average, {counts_B.max():.0f} at most"
    )
    report = Report(arguments.repeats, fields, arguments.out)
    time_dense(report, heads, length)
    time_indexer(report, indexer, length)
    time_sparse(report, heads, indexer, indices_TK, num_selected)
    summarize(report)


def describe(length: int, kind: str, num_selected: int, counts_B: Tensor) -> dict[str, Any]:
    """Return the fields that all lines of a run share."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "shape": {
            "T": length,
            "S": length,
            "H": HEADS,
            "G": GROUPS,
            "C": CHANNELS,
            "I": INDEXER_HEADS,
            "J": INDEXER_CHANNELS,
            "K": TOP_K,
        },
        "dtype": "bfloat16",
        "selection": kind,
        "selected_mean": round(num_selected / length, 1),
        "union_mean": round(float(counts_B.mean()), 1),
        "union_max": int(counts_B.max()),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
        "command": " ".join(["python -m tools.benchmark_kernels", *sys.argv[1:]]),
    }


def time_dense(report: Report, heads: ThreeTensors, length: int) -> None:
    """Time causal dense attention, the unit of every ratio; keys repeated for each head."""
    flop = 4 * HEADS * CHANNELS * length * (length + 1) / 2
    q, k, v = (t.transpose(0, 1)[None] for t in heads)
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=1).requires_grad_() for t in (k, v))
    inputs = q.detach().requires_grad_(), k, v

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*inputs, is_causal=True)

    report.time("dense_attention_forward", "cudnn", forward, flop)
    out = forward()
    dout = torch.randn_like(out)
    report.time(
        "dense_attention_backward",
        "cudnn",
        lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True),
        2.5 * flop,
    )


def time_indexer(report: Report, indexer: ThreeTensors, length: int) -> None:
    """Time scores and top-k together."""
    end_T = torch.arange(1, length + 1, device="cuda")
    start_T = torch.zeros_like(end_T)
    flop = 2 * INDEXER_HEADS * INDEXER_CHANNELS * length * (length + 1) / 2
    is_built = import_module("megatron_keye.kernels.select_top_k.cuda").is_built()
    report.time(
        "lightning_indexer",
        "triton+cuda" if is_built else "triton",
        lambda: lightning_indexer(*indexer, start_T, end_T, TOP_K, impl="triton"),
        flop,
    )


def time_sparse(
    report: Report,
    heads: ThreeTensors,
    indexer: ThreeTensors,
    indices_TK: Tensor,
    num_selected: int,
) -> None:
    """Time what follows the selection, forward and backward."""
    flop = 4 * HEADS * CHANNELS * num_selected
    report.time("union_lists", "triton", lambda: union_lists(indices_TK.detach(), len(heads[1])))

    def attend(with_target: bool) -> tuple[Tensor, Tensor]:
        return sparse_attention(*heads, indices_TK, scale=SCALE, with_target=with_target)

    report.time("sparse_attention_forward", "triton", lambda: attend(False), flop)
    report.time("sparse_attention_with_target", "triton", lambda: attend(True), 1.5 * flop)
    for tensor in (*heads, *indexer):
        tensor.requires_grad_()
    out_THC, target_TGK = attend(True)
    dout_THC = torch.randn_like(out_THC)
    report.time(
        "sparse_attention_backward",
        "triton",
        lambda: torch.autograd.grad(out_THC, heads, dout_THC, retain_graph=True),
        2.5 * flop,
    )
    index_flop = 2 * INDEXER_HEADS * INDEXER_CHANNELS * num_selected

    def loss() -> Tensor:
        return sparse_indexer_loss(selected_indexer_scores(*indexer, indices_TK), target_TGK)

    report.time("indexer_loss_forward", "triton", loss, index_flop)
    kl_TG = loss()
    dkl_TG = torch.ones_like(kl_TG)
    report.time(
        "indexer_loss_backward",
        "triton",
        lambda: torch.autograd.grad(kl_TG, indexer, dkl_TG, retain_graph=True),
        3 * index_flop,
    )


def summarize(report: Report) -> None:
    """Print the ratios that the goals are stated in."""
    took = report.medians
    dense = took["dense_attention_forward"], took["dense_attention_backward"]
    forward = (
        took["lightning_indexer"]
        + took["union_lists"]
        + took["sparse_attention_with_target"]
        + took["indexer_loss_forward"]
    )
    backward = took["sparse_attention_backward"] + took["indexer_loss_backward"]
    ratios = {
        "attention_forward": dense[0] / took["sparse_attention_forward"],
        "attention_backward": dense[1] / took["sparse_attention_backward"],
        "layer_forward_and_backward": sum(dense) / (forward + backward),
    }
    report.write({"op": "ratios_to_dense", **report.fields, **ratios})
    print("times faster than dense: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))


if __name__ == "__main__":
    main()

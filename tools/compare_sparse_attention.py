# SPDX-License-Identifier: Apache-2.0
"""Compares the CUDA sparse attention with its definition, piece by piece, on a Hopper GPU.

    python -m tools.compare_sparse_attention [--all] [--backward {bulk,pairs}] [--cases N]
    compute-sanitizer --tool memcheck python -m tools.compare_sparse_attention --cases 8
    NVCC_APPEND_FLAGS=-DMEGATRON_KEYE_EVERY_LANE_ARRIVES MEGATRON_KEYE_BUILD_CUDA=1 \\
        python setup.py build_ext --inplace
    compute-sanitizer --tool racecheck --racecheck-indirect-barrier-dependency \\
        python -m tools.compare_sparse_attention --cases 8

Cases grow from one tile of keys and one group to many of both; each is announced before it runs,
so that one that hangs is known. Three comparisons tell where an error comes from: the log-sum-exp
depends on queries, keys and masks alone; with queries of 0 the output is the mean of the selected
values, whatever the keys; last comes the whole. --backward compares the gradients instead, which
depend on each other as little: those of values on weights alone, those of queries on gradients of
logits, those of keys on how these lie in shared memory, too. It ends at the first difference, with
status 1.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_keye.cli.arguments import add_count, make_parser
from megatron_keye.kernels.sparse_attention import cuda
from megatron_keye.kernels.union_lists import UnionLists, union_lists

SCALE = 0.1


class Case(NamedTuple):
    """Sizes of a comparison; every query selects `selected` of the keys at random."""

    queries: int
    keys: int
    selected: int
    groups: int = 1
    heads: int = 8
    channels: int = 128


CASES = [
    Case(1, 1, 1),
    Case(1, 64, 64),
    Case(16, 64, 64),
    Case(16, 64, 20),
    Case(16, 63, 20),
    Case(16, 128, 128),  # two tiles: the first overlapped softmax
    Case(16, 300, 100),
    Case(16, 384, 384),  # as many tiles as stages
    Case(16, 448, 448),  # the first stage that is filled again
    Case(16, 2000, 1000),
    Case(40, 2000, 500, groups=2),
    *(Case(40, 700, 100, 2, heads, channels) for heads in (4, 8, 16) for channels in (64, 128)),
    Case(4096, 8192, 1024, groups=4),
]


def main() -> int:
    """Run the cases; return 1 when one differs."""
    parser = make_parser("python -m tools.compare_sparse_attention", __doc__)
    parser.add_argument("--all", action="store_true", help="go on after a difference")
    parser.add_argument(
        "--backward", choices=["bulk", "pairs"], help="compare gradients, whose sums leave so"
    )
    add_count(parser, "--cases", "only so many, the smallest", default=len(CASES))
    options = parser.parse_args()
    status = 0
    for case in CASES[: options.cases]:
        print(f"{case}", flush=True)
        drawn = draw(case)
        agrees = compare_gradients(drawn, options.backward) if options.backward else compare(drawn)
        status |= not agrees
        if status and not options.all:
            break
    return status


class Drawn(NamedTuple):
    """Tensors of a case."""

    heads: tuple[Tensor, Tensor, Tensor]
    selected_TS: Tensor
    lists: UnionLists


def draw(case: Case) -> Drawn:
    """Return random tensors of a case on the GPU."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    q_THC = normal(case.queries, case.groups * case.heads, case.channels)
    k_SGC, v_SGC = (normal(case.keys, case.groups, case.channels) for _ in range(2))
    order_TS = torch.rand((case.queries, case.keys), generator=generator, device="cuda").argsort(1)
    indices_TK = order_TS[:, : case.selected].sort(1).values.int()
    is_selected_TS = torch.zeros_like(order_TS, dtype=torch.bool).scatter_(1, indices_TK.long(), 1)
    return Drawn((q_THC, k_SGC, v_SGC), is_selected_TS, union_lists(indices_TK, case.keys))


def compare(drawn: Drawn) -> bool:
    """Return whether the forward pass of a case agrees, and print each of its comparisons."""
    (q_THC, k_SGC, v_SGC), is_selected_TS, lists = drawn

    def run(q: Tensor) -> tuple[Tensor, Tensor]:
        out_THC, lse_TH = cuda.attend(q, k_SGC, v_SGC, lists, scale=SCALE)
        torch.cuda.synchronize()
        return out_THC, lse_TH

    zero_THC = torch.zeros_like(q_THC)
    wanted_THC, wanted_TH = define(q_THC, k_SGC, v_SGC, is_selected_TS)
    mean_THC, _ = define(zero_THC, k_SGC, v_SGC, is_selected_TS)
    out_THC, lse_TH = run(q_THC)
    agree = report("log-sum-exp", lse_TH[..., None], wanted_TH[..., None], 1e-3)
    agree &= report("mean of values", run(zero_THC)[0], mean_THC, 2e-2)
    return report("output", out_THC, wanted_THC, 2e-2) and agree


def compare_gradients(drawn: Drawn, form: str) -> bool:
    """Return whether the gradients of a case agree, and print each of their comparisons."""
    q_THC, k_SGC, v_SGC = exact = [tensor.float().requires_grad_() for tensor in drawn.heads]
    wanted_THC, _ = define(q_THC, k_SGC, v_SGC, drawn.selected_TS)
    dout_THC = torch.randn_like(wanted_THC).bfloat16()
    wanted = torch.autograd.grad(wanted_THC, exact, dout_THC.float())
    out_THC, lse_TH = cuda.attend(*drawn.heads, drawn.lists, scale=SCALE)
    saved = *drawn.heads, out_THC, lse_TH, drawn.lists
    got = cuda.attend_backward(dout_THC, *saved, scale=SCALE, in_bulk=form == "bulk")
    torch.cuda.synchronize()
    agree = True
    for place, name in ((2, "values"), (0, "queries"), (1, "keys")):
        agree &= report(f"gradient of {name}", got[place], wanted[place], 3e-2)
    return agree


def define(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, selected_TS: Tensor) -> tuple[Tensor, ...]:
    """Return the output and log2 of the sums of exponentials, in float32 by whole matrices."""
    outs, lses = [], []
    heads = q_THC.shape[1] // k_SGC.shape[1]
    for head in range(q_THC.shape[1]):
        k_SC, v_SC = (each[:, head // heads].float() for each in (k_SGC, v_SGC))
        logits_TS = (q_THC[:, head].float() @ k_SC.T * SCALE).masked_fill(~selected_TS, -torch.inf)
        outs.append(logits_TS.softmax(1) @ v_SC)
        lses.append(logits_TS.logsumexp(1) / torch.tensor(2.0).log().item())
    return torch.stack(outs, 1), torch.stack(lses, 1)


def report(name: str, got_THC: Tensor, wanted_THC: Tensor, tolerance: float) -> bool:
    """Print where two tensors differ first, and along which of their places; return if not."""
    is_close_THC = (got_THC.float() - wanted_THC).abs() <= tolerance * (1 + wanted_THC.abs())
    wrong = (~is_close_THC).nonzero()  # NaN is wrong, too
    if len(wrong) == 0:
        print(f"  {name}: agrees", flush=True)
        return True
    query, head, channel = (int(each) for each in wrong[0])
    got, wanted = (float(each[query, head, channel]) for each in (got_THC, wanted_THC))
    queries, heads, channels = (wrong[:, dim].unique().tolist() for dim in range(3))
    print(
        f"  {name}: {len(wrong)} of {is_close_THC.numel()} differ; query {query} head {head} "
        f"channel {channel} got {got:.5f}, expected {wanted:.5f};\n    all queries "
        f"{queries}, heads {heads}, channels {channels}",
        flush=True,
    )
    return False


if __name__ == "__main__":
    sys.exit(main())

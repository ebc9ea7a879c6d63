"""Compares the CUDA sparse attention with its definition, piece by piece, on a Hopper GPU.

    python -m tools.compare_sparse_attention [--all]

Cases grow from one tile of keys and one group to many of both; each is announced before it runs,
so that one that hangs is known. Three comparisons tell where an error comes from: the log-sum-exp
depends on queries, keys and masks alone; with queries of 0 the output is the mean of the selected
values, whatever the keys; last comes the whole. It ends at the first difference, with status 1.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_keye.cli.arguments import make_parser
from megatron_keye.kernels.sparse_attention import cuda
from megatron_keye.kernels.union_lists import union_lists

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
    goes_on = parser.parse_args().all
    status = 0
    for case in CASES:
        print(f"{case}", flush=True)
        status |= not compare(case)
        if status and not goes_on:
            break
    return status


def compare(case: Case) -> bool:
    """Return whether a case agrees, and print each of its comparisons."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    q_THC = normal(case.queries, case.groups * case.heads, case.channels)
    k_SGC, v_SGC = (normal(case.keys, case.groups, case.channels) for _ in range(2))
    order_TS = torch.rand((case.queries, case.keys), generator=generator, device="cuda").argsort(1)
    indices_TK = order_TS[:, : case.selected].sort(1).values.int()
    is_selected_TS = torch.zeros_like(order_TS, dtype=torch.bool).scatter_(1, indices_TK.long(), 1)
    lists = union_lists(indices_TK, case.keys)

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

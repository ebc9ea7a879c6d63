# SPDX-License-Identifier: Apache-2.0
"""Which module and pass each operator and kernel of a trace belongs to.

Events at the borders of modules would time only what their stream does between two borders: other
streams, and backward passes that autograd orders by itself, would go to whichever module stands
beside them. A trace knows for each kernel the operator that launched it, and for each operator of
a backward pass the forward operator that made it, in a recomputed layer that of the second pass.
Modules are therefore timed by kernels, whichever stream they run in.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_keye.estimate.account import MODULES
from megatron_keye.profiling.trace import Node, Trace, is_engine

Pass = Literal["forward", "backward", "recomputed"]
PASSES: tuple[Pass, ...] = get_args(Pass)

OUTSIDE = {
    "vision.other": "the ViT's rotary tables, and what else chunks need",
    "decoder.other": "rotary embedding, layouts and gathers of attention; the row's tables",
    "decoder.dispatch": "tokens to experts and back",
    "transport": "features from vision ranks to decoder ranks, and their gradients back",
    "data": "waiting for decoded pictures",
    "other": "what no module or phase does: planning, metrics, exchanges of the pipeline",
}
"""Places of a step that the account has no work for, with their meaning."""
PLACES = (*MODULES, *OUTSIDE)
"""All places, those of the account first, in the order in which they run."""
OPERATORS = {
    "select_top_k": "decoder.indexer.top_k",
    "selected_indexer_scores": "decoder.indexer.loss",
    "sparse_indexer_loss": "decoder.indexer.loss",
}
"""Operators in `kernels/` that name themselves in traces, by the module that they belong to."""
PHASES = {
    "decode": "data",
    "encode": "vision.other",
    "vision": "vision.other",
    "send": "transport",
    "return": "transport",
    "wait": "transport",
    "forward": "decoder.other",
    "optimizer": "optimizer",
}
"""Spans of the timeline, by the place of what no module in them does."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where time or memory goes."""

    module: str
    """One of PLACES."""
    in_pass: Pass
    """Pass of the module; "forward" where there are none."""


ELSEWHERE = Place("other", "forward")


def find_places(trace: Trace) -> dict[Node, Place]:
    """Return the place of every operator and range of a trace."""
    places: dict[Node, Place] = {}
    newest: dict[int, Place] = {}
    for node in trace.nodes:
        around = places[node.parent] if node.parent is not None else ELSEWHERE
        if node.is_range:
            places[node] = _of_range(node, around)
        elif node.forward is not None:
            places[node] = Place(places[node.forward].module, "backward")
            newest[node.thread] = places[node]
        elif is_engine(node):
            # The sum into a weight's gradient has no forward operator; it follows the node that
            # made the gradient.
            places[node] = newest.get(node.thread, around)
        else:
            places[node] = around
    return places


def _of_range(node: Node, around: Place) -> Place:
    if node.name in PHASES:
        return Place(PHASES[node.name], "recomputed" if node.name == "vision" else "forward")
    module = OPERATORS.get(node.name, node.name)
    if module not in PLACES:
        return around
    return Place(module, "recomputed" if _is_recomputed(node) else around.in_pass)


def _is_recomputed(node: Node) -> bool:
    """Return whether a range runs in the backward pass of a checkpoint (recomputation)."""
    above = node.parent
    while above is not None:
        if not above.is_range and above.name.startswith("CheckpointFunctionBackward"):
            return True
        above = above.parent
    return False

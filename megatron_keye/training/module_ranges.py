# SPDX-License-Identifier: Apache-2.0
"""Names the modules of a step in traces, by the words of the account of FLOPs and bytes.

Modules are torch's or Megatron's, so hooks around their forward passes name them, and only while
a step is traced. What is a function and no module names itself (`record_function` in `decoder/`
and `kernels/`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from megatron_keye.model import KeyeModel

_LAYER = r"block\.layers\.\d+"
_VISION_LAYER = r"encoder\.encoder\.layers\.\d+"
_NAMES = {
    # Residual sums are what a layer computes itself.
    _LAYER: "decoder.norms",
    rf"{_LAYER}\.(input|pre_mlp)_layernorm": "decoder.norms",
    r"block\.final_layernorm": "decoder.norms",
    rf"{_LAYER}\.self_attention": "decoder.other",
    rf"{_LAYER}\.self_attention\.(linear_qkv|linear_proj)": "decoder.attention.projections",
    rf"{_LAYER}\.self_attention\.[qk]_layernorm": "decoder.norms",
    rf"{_LAYER}\.self_attention\.indexer": "decoder.indexer.projections",
    # Beside router and experts it dispatches tokens to experts and combines what they return.
    rf"{_LAYER}\.mlp": "decoder.dispatch",
    rf"{_LAYER}\.mlp\.router": "decoder.router",
    rf"{_LAYER}\.mlp\.experts": "decoder.experts",
    r"encoder": "vision.other",
    r"encoder\.embeddings": "vision.linear",
    _VISION_LAYER: "vision.norms",
    rf"{_VISION_LAYER}\.layer_norm[12]": "vision.norms",
    r"encoder\.post_layernorm": "vision.norms",
    rf"{_VISION_LAYER}\.self_attn": "vision.attention",
    rf"{_VISION_LAYER}\.self_attn\.\w+_proj": "vision.linear",
    rf"{_VISION_LAYER}\.mlp": "vision.linear",
    r"projector": "projector",
}
"""By the module's name in a virtual stage or in the vision tower."""


def range_name(module_name: str) -> str:
    """Return the name of a module's range, "" where it belongs to the module around it.

    Args:
        module_name: Its name in a virtual stage or in the vision tower, wrapped or not.
    """
    bare = module_name.removeprefix("module.")
    return next((name for each, name in _NAMES.items() if re.fullmatch(each, bare)), "")


@contextmanager
def module_ranges(model: KeyeModel) -> Iterator[None]:
    """Name the forward passes of a rank's modules in traces, until the context ends.

    A recomputed module runs forward again and is named again; the operators of its backward pass
    are told by the forward operators that made their nodes of autograd.
    """
    opened: list[record_function] = []
    handles = []

    def name_range(module: nn.Module, name: str) -> None:
        def enter(*_: Any) -> None:
            opened.append(record_function(name))
            opened[-1].__enter__()

        def leave(*_: Any) -> None:
            opened.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))

    for wrapped in model.wrapped():
        for module_name, module in wrapped.named_modules():
            name = range_name(module_name)
            if name:
                name_range(module, name)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

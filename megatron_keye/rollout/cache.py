# SPDX-License-Identifier: Apache-2.0
"""The tensors of the cache on one rank, and how many pages of them fit."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.decoder.key_cache import LayerCache
from megatron_keye.errors import UserError

_CPU_TOKENS = 65_536
_E4M3_NAN = 0x7F
_E4M3_CAPABILITY = (8, 9)


def check_cache(run: RunConfig, device: torch.device) -> None:
    """Check that a GPU has the numbers that the cache keeps.

    Args:
        run: What the user wants.
        device: Where this rank computes.

    Raises:
        UserError: When it has not.
    """
    if run.rollout.cache_quantization == "none" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _E4M3_CAPABILITY:
        got, wanted = (".".join(map(str, each)) for each in (capability, _E4M3_CAPABILITY))
        raise UserError(
            f"rollout.cache_quantization: got 'fp8' on a GPU of compute capability {got}, "
            f"expected {wanted} or more, which has e4m3; set it to none"
        )


def count_pages(run: RunConfig, device: torch.device) -> int:
    """Return how many pages the cache of every replica has. Collective over all ranks.

    Args:
        run: Sizes, and what the user wants.
        device: Where this rank computes, with its weights on it.
    """
    rollout = run.rollout
    tokens = rollout.cache_tokens or _CPU_TOKENS
    if rollout.cache_tokens == 0 and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        tokens = int(free * rollout.cache_share / bytes_per_token(run))
    pages = torch.tensor(-(-tokens // rollout.page_tokens), device=device)
    dist.all_reduce(pages, op=dist.ReduceOp.MIN)
    return int(pages)


def bytes_per_token(run: RunConfig) -> int:
    """Return the bytes that one token takes on one rank, in all layers."""
    decoder, size = run.model.decoder, weight_dtype(run).itemsize
    is_rounded = run.rollout.cache_quantization == "fp8"
    head = decoder.head_dim + 4 if is_rounded else decoder.head_dim * size
    heads = 2 * decoder.num_kv_heads // run.parallel.decoder.tensor * head
    channels = decoder.indexer.head_dim
    index_key = channels + 4 if decoder.indexer.quantization == "fp8" else channels * size
    return decoder.num_layers * (heads + index_key)


def allocate(run: RunConfig, num_pages: int, device: torch.device) -> list[LayerCache]:
    """Return the pages of all layers, with one more that takes what padding writes.

    Args:
        run: Sizes and degrees.
        num_pages: Pages that sequences use, 0 to num_pages - 1.
        device: Where they are.
    """
    decoder, dtype = run.model.decoder, weight_dtype(run)
    page = (num_pages + 1, run.rollout.page_tokens)
    groups = decoder.num_kv_heads // run.parallel.decoder.tensor
    is_quantized = decoder.indexer.quantization == "fp8"
    is_rounded = run.rollout.cache_quantization == "fp8"
    type_of_heads = torch.float8_e4m3fn if is_rounded else dtype
    layers = []
    for _ in range(decoder.num_layers):
        heads = torch.empty(*page, 2, groups, decoder.head_dim, dtype=type_of_heads, device=device)
        scales = torch.empty(*page, 2, groups, device=device) if is_rounded else None
        layers.append(
            LayerCache(
                keys_PLGC=heads[:, :, 0],
                values_PLGC=heads[:, :, 1],
                key_scales_PLG=None if scales is None else scales[:, :, 0],
                value_scales_PLG=None if scales is None else scales[:, :, 1],
                index_keys_PLJ=torch.empty(
                    *page,
                    decoder.indexer.head_dim,
                    dtype=torch.float8_e4m3fn if is_quantized else dtype,
                    device=device,
                ),
                index_scales_PL=torch.empty(page, device=device) if is_quantized else None,
            )
        )
    forget(layers)
    return layers


def forget(layers: list[LayerCache]) -> None:
    """Fill the cache with NaN, so that no key of earlier weights is read without being seen."""
    for layer in layers:
        for tensor in _tensors(layer):
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.uint8).fill_(_E4M3_NAN)
            else:
                tensor.fill_(torch.nan)


def copy_pages(layers: list[LayerCache], copies: dict[int, int]) -> None:
    """Copy pages in all layers, all of them at once.

    Args:
        layers: The cache.
        copies: Source by destination.
    """
    if not copies:
        return
    device = layers[0].keys_PLGC.device
    to = torch.tensor(list(copies.keys()), device=device)
    origin = torch.tensor(list(copies.values()), device=device)
    for layer in layers:
        for tensor in _tensors(layer):
            if tensor.dtype == torch.float8_e4m3fn:
                tensor = tensor.view(torch.uint8)  # Not every type can be moved by index.
            tensor[to] = tensor[origin]


def _tensors(layer: LayerCache) -> list[Tensor]:
    """Return all that a layer keeps."""
    return [each for each in vars(layer).values() if each is not None]

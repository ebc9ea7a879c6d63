# SPDX-License-Identifier: Apache-2.0
"""Dumps what a model computes on one row, under names that other implementations can use.

The language loss and both losses of the indexer come from separate passes, so that each
gradient belongs to one loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout
from megatron_keye.config.training import Phase
from megatron_keye.errors import UserError
from megatron_keye.verify.dump_inputs import DumpInputs, Pictures
from megatron_keye.verify.layer_recorder import LayerRecorder
from megatron_keye.verify.one_process import OneProcessModel

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Pass:
    """Results of one forward pass."""

    loss_sum: Tensor
    """Language loss, summed over the targets."""
    image_embeds: Tensor
    video_embeds: Tensor
    layers: LayerRecorder


def dump(
    model: OneProcessModel, inputs: DumpInputs, *, gradients_as: ExpertLayout | None = None
) -> Arrays:
    """Run the model and return what it computed.

    Args:
        model: With its weights loaded.
        inputs: One row.
        gradients_as: Expert layout that names the gradients; None for no gradients.

    Returns:
        `logits` [T, V], `image_embeds` and `video_embeds` [M, D], `hidden` [layers, T, D] (after
        each layer), `position_ids` int64 [3, T] and `topk_indices` int32 [layers, T, K]
        (ascending, then -1), from the sparse forward. With targets also `lm_loss` (mean; NaN
        without any label), `sparse_kl` and, from a dense forward, `warmup_kl`, both
        [layers, G]: in nats, summed over queries. With gradients also, for every NAME of the
        Hugging Face checkpoint, `grad.lm.NAME` of lm_loss, and `grad.sparse.NAME` and
        `grad.warmup.NAME` of the sum of each KL over layers and groups.

    Raises:
        UserError: When gradients are asked for without targets.
    """
    if gradients_as is not None and inputs.targets is None:
        raise UserError(
            "--gradients: got inputs without targets, expected int64 [T]; add them to --inputs"
        )
    with sdpa_kernel(SDPBackend.MATH):  # the other float32 kernels may use TF32
        if inputs.targets is None:
            with torch.no_grad():
                return _activations(model, inputs, _forward(model, inputs, "sparse", 0.0))
        return _with_losses(model, inputs, gradients_as)


def _with_losses(
    model: OneProcessModel, inputs: DumpInputs, gradients_as: ExpertLayout | None
) -> Arrays:
    """Return activations, losses and, if asked for, gradients, from separate passes."""
    model.clear_gradients()
    num_labels = len(inputs.batch().labels_L)
    model.stage.eval()  # in training the KL may come with the backward pass
    with torch.no_grad():
        alone = _forward(model, inputs, "sparse", 0.0)
    model.stage.train()
    arrays = _activations(model, inputs, alone)
    arrays["lm_loss"] = _array(alone.loss_sum / num_labels)
    arrays["sparse_kl"] = _array(alone.layers.stacked("indexer_kl"))
    if gradients_as is not None:
        sparse = _forward(model, inputs, "sparse", 0.0)
        arrays |= _gradients(model, sparse.loss_sum / max(num_labels, 1), "lm", gradients_as)
        with_indexer = _forward(model, inputs, "sparse", 1.0)
        arrays |= _gradients(model, 0 * with_indexer.loss_sum, "sparse", gradients_as)
    dense = _forward(model, inputs, "indexer_warmup", 1.0)
    arrays["warmup_kl"] = _array(dense.layers.stacked("indexer_kl"))
    if gradients_as is not None:
        arrays |= _gradients(model, 0 * dense.loss_sum, "warmup", gradients_as)
    return arrays


def _forward(
    model: OneProcessModel, inputs: DumpInputs, phase: Phase, indexer_loss_weight: float
) -> _Pass:
    """Run vision and decoder; the loss's backward pass adds the indexer's loss by its weight."""
    images, videos = _embed(model, inputs.images), _embed(model, inputs.videos)
    features = torch.cat([images, videos])[inputs.feature_order().to(model.device)]
    layers = LayerRecorder()
    with layers.recording(model.stage):
        loss_sum = model.stage(
            inputs.batch().to(model.device),
            features,
            indexer_loss_weight=indexer_loss_weight,
            meter=layers,
            where="verify_checkpoint",
            phase=phase,
        )
    return _Pass(loss_sum, images, videos, layers)


def _embed(model: OneProcessModel, pictures: Pictures) -> Tensor:
    patches = pictures.patches.to(device=model.device, dtype=model.dtype)
    embeddings: Tensor = model.tower(patches, pictures.patch_grids)
    return embeddings


@torch.no_grad()
def _activations(model: OneProcessModel, inputs: DumpInputs, run: _Pass) -> Arrays:
    final_TD = run.layers.stacked("final")[0]
    tensors = {
        "logits": model.stage.logits(final_TD[:, None]).squeeze(1),
        "image_embeds": run.image_embeds,
        "video_embeds": run.video_embeds,
        "hidden": run.layers.stacked("hidden"),
        "position_ids": inputs.position_ids,
        "topk_indices": run.layers.stacked("topk_indices"),
    }
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _gradients(model: OneProcessModel, loss: Tensor, kind: str, layout: ExpertLayout) -> Arrays:
    """Run the backward pass of `loss` and return the gradients, cleared from the model."""
    loss.backward()
    found = model.gradients(layout)
    arrays = {f"grad.{kind}.{name}": _array(gradient) for name, gradient in found.items()}
    model.clear_gradients()
    return arrays


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array

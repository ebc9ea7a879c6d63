"""What a run takes of a device's memory, before it runs: counted from sizes and degrees.

Activations are what autograd keeps in this code, tensor by tensor, with Megatron's own linear
layers; test_memory.py holds the counts against what GPUs measured. Not counted are the context of
CUDA and NCCL and what the allocator cannot use, together a few GiB. Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_keye.config.model import DecoderConfig, VisionConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import Part

_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_MASTER, _MOMENTS, _SUM = 4, 8, 4
"""Bytes per parameter in bf16: master weight, both moments, summed gradient."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Parameters of one kind on one rank."""

    part: Part
    """Whose they are."""
    is_expert: bool
    """Whether they are spread over the expert axis."""
    count: int
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    weights: float = 0.0
    """In the type of the run."""
    gradients: float = 0.0
    """Sums over micro-batches, of what learns."""
    optimizer: float = 0.0
    """Moments, and master weights in bf16."""
    activations: float = 0.0
    """Kept from forward to backward passes: of layers, or of a chunk of pictures."""
    features: float = 0.0
    """Of pictures, as they travel: a step's to the decoder, a row's from the ViT."""
    workspace: float = 0.0
    """What one layer, or the logits, need for a moment."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def decoder_memory(
    run: RunConfig, stage: int, held: Sequence[Held], *, num_labels: int, num_patches: int
) -> Memory:
    """Return what a rank of the decoder takes, with a share of the ViT where it is colocated.

    Args:
        run: Sizes and degrees.
        stage: Pipeline stage.
        held: Parameters on the rank.
        num_labels: Tokens of a row that have a label; logits are made of these only.
        num_patches: Patches of a row's pictures.
    """
    degrees, training, decoder = run.parallel.decoder, run.training, run.model.decoder
    states = _states(run, held)
    num_tokens = run.data.row_tokens / degrees.context / degrees.tensor
    kept, moment = layer_bytes(run), _layer_workspace(run)
    layers = _layers_in_flight(run, stage)
    activations, workspace = layers * kept * num_tokens, moment * num_tokens
    if training.recompute_layers or training.only_indexers_learn:
        # Of most layers only the input is kept, and one layer is whole at a time.
        workspace += kept * num_tokens
        activations = layers * _kept_input(run) * num_tokens
    if stage == degrees.pipeline - 1:
        # Logits, their float32 copy and its gradient.
        width = decoder.vocab_size / degrees.tensor
        logits = num_labels / degrees.context * width * (_BYTES[training.precision] + 8)
        workspace = max(workspace, logits)
    features = 0.0
    if stage == 0:
        features = _feature_bytes(run, num_patches / degrees.context / degrees.tensor)
        features *= training.rows_per_step / degrees.data
    if run.parallel.vision.placement == "colocated":
        # Pictures are encoded before the decoder runs, and learn after it.
        activations = max(activations, _chunk_bytes(run))
    return Memory(**states, activations=activations, features=features, workspace=workspace)


def vision_memory(run: RunConfig, held: Sequence[Held], *, num_patches: int) -> Memory:
    """Return what a rank takes that encodes and nothing else.

    Args:
        run: Sizes and degrees.
        held: Parameters on the rank.
        num_patches: Patches of a row's pictures.
    """
    features = _feature_bytes(run, num_patches)
    workspace = 2 * run.model.vision.intermediate_size * run.parallel.vision.chunk_patches
    return Memory(
        **_states(run, held),
        activations=_chunk_bytes(run),
        features=features,
        workspace=workspace * _BYTES[run.training.precision],
    )


def layer_bytes(run: RunConfig) -> float:
    """Return what autograd keeps of one decoder layer and own token, without tensor parallelism.

    Under tensor parallelism each rank takes a share of all but the indexer, which runs whole on
    every rank; that is counted as if it were shared, too, but for the lists of selected keys.
    """
    decoder, size = run.model.decoder, _BYTES[run.training.precision]
    numbers = _kept_by_attention(decoder, run.parallel.decoder.context)
    return size * (numbers + _kept_by_experts(decoder)) + _selection(run)


def _kept_input(run: RunConfig) -> float:
    """Return what is kept of a layer and token if it runs again, or if only its indexer learns."""
    decoder = run.model.decoder
    width = decoder.hidden_size
    if run.training.only_indexers_learn:
        # Its queries and their gradients, which the loss makes at once.
        width += 2 * decoder.indexer.num_heads * decoder.indexer.head_dim
    return float(_BYTES[run.training.precision] * width)


def _kept_by_attention(decoder: DecoderConfig, context: int) -> float:
    """Count numbers: the residual stream and its norm, twice; queries, keys and values as they are
    projected, as norms take them and as attention takes them, gathered over the context axis; its
    output; the indexer's queries.
    """
    heads = decoder.num_heads * decoder.head_dim
    groups = decoder.num_kv_heads * decoder.head_dim
    projected = heads + 2 * groups
    indexer = 2 * decoder.indexer.num_heads * decoder.indexer.head_dim
    gathered = (1 + 2 * context) * groups
    return 4 * decoder.hidden_size + projected + 2 * heads + gathered + heads + indexer


def _kept_by_experts(decoder: DecoderConfig) -> float:
    """Count numbers of each expert that a token visits: its input, gate and value, their product,
    the output, and that once more when outputs are joined.
    """
    experts = decoder.experts
    width = 3 * decoder.hidden_size + 3 * experts.intermediate_size
    return experts.num_experts_per_token * width


def _selection(run: RunConfig) -> float:
    """Return the bytes per token for its selected keys: indices, scores, the target of each group,
    and a share of the union of neighbours, which is largest where they have nothing in common.
    """
    if run.training.phase != "sparse":
        return 0.0
    decoder, degrees = run.model.decoder, run.parallel.decoder
    targets = _BYTES[run.training.precision] * decoder.num_kv_heads / degrees.tensor
    return decoder.indexer.top_k * (4 + 4 + targets + 6) * degrees.tensor


def _layer_workspace(run: RunConfig) -> float:
    """Return what experts need per token while they run: inputs and outputs in another order."""
    decoder = run.model.decoder
    experts = decoder.experts
    width = 2 * decoder.hidden_size + experts.intermediate_size
    return _BYTES[run.training.precision] * experts.num_experts_per_token * width


def _layers_in_flight(run: RunConfig, stage: int) -> float:
    """Return how many layers' activations a stage holds at most, under (interleaved) 1F1B."""
    degrees = run.parallel.decoder
    micro_batches = run.training.rows_per_step // degrees.data
    parts = degrees.virtual_stages
    behind = degrees.pipeline - stage - 1
    warm_up = behind if parts == 1 else 2 * behind + (parts - 1) * degrees.pipeline
    held = min(warm_up + 1, micro_batches * parts)
    layers = [
        len(degrees.virtual_stage_layers(run.model.decoder.num_layers, stage, part))
        for part in range(parts)
    ]
    return held * sum(layers) / parts


def _chunk_bytes(run: RunConfig) -> float:
    """Return what a chunk of pictures takes: to learn, its layers' activations."""
    vision, learning = run.model.vision, run.training.trained_parts
    size = _BYTES[run.training.precision]
    if not {"vision", "projector"} & set(learning):
        return run.parallel.vision.chunk_patches * size * 4 * vision.intermediate_size
    layers = vision.num_layers if "vision" in learning else 1
    return run.parallel.vision.chunk_patches * size * layers * _kept_by_vision_layer(vision)


def _kept_by_vision_layer(vision: VisionConfig) -> float:
    """Count numbers per patch: the residual stream and its norm, twice; rotated queries and keys,
    values, attention's output and that once more when frames are joined; both sides of the GELU.
    """
    return 9 * vision.hidden_size + 2 * vision.intermediate_size


def _feature_bytes(run: RunConfig, num_patches: float) -> float:
    """Return the size of so many patches' features, of which gradients take the place later."""
    tokens = num_patches / run.model.vision.merge_size**2
    return float(tokens * run.model.decoder.hidden_size * _BYTES[run.training.precision])


def _states(run: RunConfig, held: Sequence[Held]) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer."""
    size, rounded = _BYTES[run.training.precision], run.training.precision == "bf16"
    trained = [each for each in held if each.part in run.training.trained_parts]
    summed = _SUM if rounded else size
    updated = _MASTER + _MOMENTS if rounded else 2 * size
    return {
        "weights": size * sum(each.count for each in held),
        "gradients": summed * sum(each.count for each in trained),
        "optimizer": updated * sum(each.count / _sharers(run, each) for each in trained),
    }


def _sharers(run: RunConfig, held: Held) -> int:
    """Return how many ranks share the optimizer of these parameters."""
    degrees = run.parallel.decoder
    if not run.training.distributes_optimizer:
        return 1
    if held.part in ("vision", "projector"):
        return run.parallel.vision.num_ranks or degrees.num_ranks
    replicas = degrees.context * degrees.data
    return replicas * degrees.tensor // degrees.expert if held.is_expert else replicas

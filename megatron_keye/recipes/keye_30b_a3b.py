"""Keye-VL-2.0-30B-A3B at full size: 31,122,082,160 parameters, rows of 256K tokens.

The sizes are the released checkpoint's; the degrees are a start for 64 GPUs of 80 GB, 8 a node.
"""

from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DecoderParallel,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)

_ROW_TOKENS = 262_144
_RANKS_PER_REPLICA = 64


def keye_30b_a3b(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the recipe for the ranks that were started.

    Args:
        num_ranks: A multiple of 64; every 64 ranks more are one more replica.
        has_gpu: Decides the precision; the model itself needs GPUs.
    """
    replicas = max(1, num_ranks // _RANKS_PER_REPLICA)
    return RunConfig(
        name="keye_30b_a3b",
        model=ModelConfig(vision=_vision(), decoder=_decoder()),
        # There is no default data of this size: --set data.samples=FILE names the run's own.
        data=DataConfig(samples="data/train.jsonl", row_tokens=_ROW_TOKENS),
        parallel=ParallelConfig(decoder=_degrees(replicas)),
        training=TrainingConfig(
            steps=10_000,
            # Four rows for each of the four stages: the pipeline idles 3 of 19 slots.
            rows_per_step=16 * replicas,
            precision="bf16" if has_gpu else "fp32",
            # 12 layers of 16K tokens a rank fit only as their inputs.
            recompute_layers=True,
            optimizer=OptimizerConfig(
                learning_rate=1e-5, min_learning_rate=1e-6, warmup_steps=200
            ),
            checkpoint=CheckpointConfig(interval_steps=500),
        ),
    )


def _degrees(replicas: int) -> DecoderParallel:
    """Spread weights, gradients and optimizer (18 bytes a parameter) and the tokens of a row.

    Experts are 29.0 of the 30.5 billion parameters: over 4 stages x 8 expert ranks they take
    16 GB a GPU. tensor 2 halves the rest and the logits. tensor 2 x context 8 leaves 16K tokens a
    rank. Tensor and expert neighbours are consecutive ranks and so stay within a node of 8; only
    context and pipeline, which can hide behind computation, cross nodes.
    """
    return DecoderParallel(tensor=2, pipeline=4, context=8, expert=8, data=replicas)


def _vision() -> VisionConfig:
    return VisionConfig(
        num_layers=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        num_packing_positions=32_768,
    )


def _decoder() -> DecoderConfig:
    return DecoderConfig(
        num_layers=48,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=151_936,
        experts=ExpertsConfig(num_experts=128, num_experts_per_token=8, intermediate_size=768),
        indexer=IndexerConfig(num_heads=16, head_dim=64, top_k=2048),
    )

# SPDX-License-Identifier: Apache-2.0
"""Configuration of a run: frozen dataclasses, validated when they are made."""

from megatron_keye.config.data import DataConfig, DecodeConfig, FrameConfig, RemoteConfig
from megatron_keye.config.evaluation import EvaluationConfig
from megatron_keye.config.fusions import FusionsConfig
from megatron_keye.config.health import HealthConfig
from megatron_keye.config.judge import JudgeConfig
from megatron_keye.config.lora import LoraConfig
from megatron_keye.config.model import (
    DecoderConfig,
    ExpertsConfig,
    IndexerConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_keye.config.optimizer import OptimizerConfig
from megatron_keye.config.parallel import DecoderParallel, ParallelConfig, VisionParallel
from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.config.rollout import RolloutConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.config.training import (
    CheckpointConfig,
    LoggingConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DecodeConfig",
    "DecoderConfig",
    "DecoderParallel",
    "EvaluationConfig",
    "ExpertsConfig",
    "FrameConfig",
    "FusionsConfig",
    "HealthConfig",
    "IndexerConfig",
    "JudgeConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PostTrainingConfig",
    "RemoteConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainingConfig",
    "ValidationConfig",
    "VisionConfig",
    "VisionParallel",
]

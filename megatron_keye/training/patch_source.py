# SPDX-License-Identifier: Apache-2.0
"""Opens what supplies the encoder's input on this rank: decoded pictures, or cached features."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from megatron_keye.config.backends import decode_backend
from megatron_keye.config.run import RunConfig
from megatron_keye.data.video.decode_service import DecodeService
from megatron_keye.data.video.frame_decoder import make_decoder
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.model import KeyeModel
from megatron_keye.parallel.grid import Grid
from megatron_keye.training.cached_features import CachedFeatures
from megatron_keye.training.chunk_encoder import PatchSource

_logger = logging.getLogger(__name__)


def open_patch_source(
    run: RunConfig,
    model: KeyeModel,
    device: torch.device,
    probe_video: Callable[[Path], VideoInfo],
) -> PatchSource | None:
    """Return the source of this rank's encoder, to be closed; None on a rank that has none.

    Args:
        run: Decoder of pictures, copies of remote media, feature cache, what to do with bad
            samples.
        model: This rank's modules.
        device: Where this rank computes.
        probe_video: Tells what a video file holds; called by the threads that decode.
    """
    if model.vision is None:
        return None
    decode, backend = run.data.decode, video_decoder(run, device)
    decoding = DecodeService(
        make_decoder(backend, device, decode.num_threads, probe_video),
        run.model.vision,
        decode,
        remote=run.data.remote,
        skips_bad=run.data.on_bad_sample == "skip",
    )
    if not run.data.feature_cache:
        return decoding
    encoder = model.vision.module.encoder
    return CachedFeatures(
        run,
        encoder,
        decoding,
        decoder_name=backend,
        device=device,
        probe_video=probe_video,
    )


def log_video_decoder(run: RunConfig, grid: Grid, device: torch.device) -> None:
    """Log once, on the first rank that encodes, what decodes video."""
    if grid.rank == grid.vision_ranks[0]:
        setting, backend = run.data.decode.backend, video_decoder(run, device)
        _logger.info("decoding video with %s (data.decode.backend=%s)", backend, setting)


def video_decoder(run: RunConfig, device: torch.device) -> Literal["pyav", "dali"]:
    """Return the video decoder of ranks that encode."""
    return decode_backend(run.data.decode.backend, has_gpu=device.type == "cuda")

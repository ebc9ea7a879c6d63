# SPDX-License-Identifier: Apache-2.0
"""Caches a frozen ViT's features on disk, so that each picture is encoded once.

Cached is the input of the projector, so that a projector that is trained gets the same input as
without the cache, and its weights are no part of a key.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.feature_cache import FeatureCache
from megatron_keye.data.row import Picture
from megatron_keye.data.video.decode_service import DecodeService, DecodeStatistics
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.video_info import VideoInfo


class CachedFeatures:
    """A `PatchSource` of ViT features instead of patches, of which only the projector runs.

    Args:
        run: A run whose vision is frozen and whose data.feature_cache is set.
        encoder: The ViT; its weights are hashed when the first step starts.
        decoding: Decodes pictures that are not cached.
        decoder_name: Name of the video decoder; pixels differ slightly between decoders.
        device: Where the ViT runs.
        probe_video: Tells what a file holds.
    """

    def __init__(
        self,
        run: RunConfig,
        encoder: nn.Module,
        decoding: DecodeService,
        *,
        decoder_name: str,
        device: torch.device,
        probe_video: Callable[[Path], VideoInfo] = probe,
    ) -> None:
        self._run, self._encoder, self._decoding = run, encoder, decoding
        self._decoder_name, self._device, self._probe_video = decoder_name, device, probe_video
        self._dtype = weight_dtype(run)
        self._cache: FeatureCache | None = None
        self._due: deque[tuple[Sequence[Picture], bool]] = deque()
        self._failed: dict[str, str] = {}

    def start_step(self, chunks: Sequence[Sequence[Picture]]) -> None:
        """Announce the chunks of one more step; only those not cached in full are decoded."""
        cache = self._open()
        due = [(chunk, all(map(cache.has, chunk))) for chunk in chunks]
        self._due.extend(due)
        self._decoding.start_step([chunk for chunk, is_cached in due if not is_cached])

    def wait_until_decoded(self) -> dict[str, str]:
        """Return the files of the next step that could not be decoded, as `DecodeService` does."""
        self._failed = self._decoding.wait_until_decoded()
        return self._failed

    @torch.no_grad()
    def take(self) -> Tensor:
        """Return the features [P, W] of the next chunk, read or else encoded and cached.

        Raises:
            UserError: As `DecodeService.take`; also for damaged features in the cache.
        """
        cache = self._open()
        # A chunk that fails stays in the queue, so that the next call raises the same error.
        pictures, is_cached = self._due[0]
        if is_cached:
            features_PW = torch.cat([cache.read(picture) for picture in pictures])
            self._due.popleft()
            return features_PW
        patches = self._decoding.take().to(self._device, self._dtype)
        self._due.popleft()
        features_PW = cast(Tensor, self._encoder(patches, [p.patch_grid for p in pictures]))
        parts = features_PW.split([picture.num_patches for picture in pictures])
        for picture, part in zip(pictures, parts, strict=True):
            if picture.medium.path not in self._failed:
                cache.write(picture, part)
        return features_PW

    def statistics(self) -> DecodeStatistics:
        """Return statistics of decoding since the last call; cached pictures are not decoded."""
        return self._decoding.statistics()

    def close(self) -> None:
        """Close the decoding."""
        self._decoding.close()

    def _open(self) -> FeatureCache:
        """Open the cache for the ViT's weights, which are loaded when the first step starts."""
        if self._cache is None:
            maker = f"{weights_digest(self._encoder)}-{self._decoder_name}"
            width = self._run.model.vision.hidden_size
            data = self._run.data
            self._cache = FeatureCache(
                Path(data.feature_cache),
                maker,
                width,
                self._dtype,
                probe_video=self._probe_video,
                remote=data.remote,
            )
        return self._cache


def weights_digest(module: nn.Module) -> str:
    """Return a digest of a module's weights: names, types, shapes and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        bits = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()

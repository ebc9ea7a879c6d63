# SPDX-License-Identifier: Apache-2.0
"""Cached features equal the ViT's, and are used only while nothing they depend on changes."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from megatron_keye.config import RunConfig
from megatron_keye.data.feature_cache import FeatureCache
from megatron_keye.data.media import Medium
from megatron_keye.data.row import PackedRow, Picture
from megatron_keye.data.video.decode_service import DecodeService
from megatron_keye.data.video.pyav import PyavDecoder
from megatron_keye.observe.recorder import Recorder
from megatron_keye.plan.step import Chunk, PictureSlot, StepPlan
from megatron_keye.training.cached_features import CachedFeatures, weights_digest
from megatron_keye.training.chunk_encoder import ChunkEncoder
from megatron_keye.vision import VisionTower
from tests.support.clips import make_clip
from tests.support.tiny import tiny_run

CPU = torch.device("cpu")
PATCH_GRID = (4, 6)


class CountingService(DecodeService):
    """Counts the chunks that are announced for decoding."""

    announced = 0

    def start_step(self, chunks: Sequence[Sequence[Picture]]) -> None:
        self.announced += len(chunks)
        super().start_step(chunks)


def run_with_cache(folder: Path, precision: str = "fp32") -> RunConfig:
    run = tiny_run(training={"frozen": ("vision",), "precision": precision})
    return replace(run, data=replace(run.data, feature_cache=str(folder)))


def tower(run: RunConfig, seed: int = 1) -> VisionTower:
    made = VisionTower(run.model.vision, run.model.decoder.hidden_size)
    made.reset_parameters(seed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.training.precision]
    return made.to(dtype)


@pytest.fixture
def chunks(tmp_path: Path) -> list[list[Picture]]:
    clip = make_clip(tmp_path / "clip.mp4", 8)
    image = tmp_path / "image.png"
    Image.effect_noise((40, 30), 50).save(image)
    frames = [
        Picture(medium=Medium(str(clip), "video"), frame=f, patch_grid=PATCH_GRID)
        for f in range(0, 8, 2)
    ]
    still = Picture(medium=Medium(str(image), "image"), frame=0, patch_grid=(2, 4))
    return [frames[:2], [*frames[2:], still]]


def take_all(
    run: RunConfig, encoder: nn.Module, chunks: list[list[Picture]], decoder_name: str = "pyav"
) -> tuple[list[Tensor], int]:
    """Return the features of all chunks, and how many of them were decoded."""
    with CountingService(PyavDecoder(), run.model.vision, run.data.decode) as service:
        cached = CachedFeatures(run, encoder, service, decoder_name=decoder_name, device=CPU)
        cached.start_step(chunks)
        return [cached.take() for _ in chunks], service.announced


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_equal_the_vits_bit_for_bit(
    tmp_path: Path, chunks: list[list[Picture]], precision: str
) -> None:
    run = run_with_cache(tmp_path / "cache", precision)
    encoder = tower(run).encoder
    made, num_decoded = take_all(run, encoder, chunks)
    assert num_decoded == 2
    kept, num_decoded = take_all(run, encoder, chunks)
    assert num_decoded == 0, "cached pictures were decoded again"
    for first, second in zip(made, kept, strict=True):
        assert first.dtype == second.dtype and torch.equal(first, second)
    # Pictures are found one by one, whatever chunk they are in.
    (mixed,), num_decoded = take_all(run, encoder, [[chunks[1][2], *chunks[0]]])
    assert num_decoded == 0 and torch.equal(mixed, torch.cat([made[1][-2 * 4 :], made[0]]))


@pytest.mark.parametrize("what", ["weight", "file", "patch grid", "decoder", "precision"])
def test_a_change_misses_the_cache(tmp_path: Path, chunks: list[list[Picture]], what: str) -> None:
    run = run_with_cache(tmp_path / "cache")
    encoder, decoder_name = tower(run).encoder, "pyav"
    take_all(run, encoder, chunks)
    if what == "weight":
        with torch.no_grad():
            next(iter(encoder.parameters())).view(-1)[0] += 1e-6
    elif what == "file":
        make_clip(Path(chunks[0][0].medium.path), 9)
    elif what == "patch grid":
        chunks = [[replace(picture, patch_grid=(6, 4)) for picture in chunk] for chunk in chunks]
    elif what == "decoder":
        decoder_name = "dali"
    else:
        run = run_with_cache(tmp_path / "cache", "bf16")
        encoder = tower(run).encoder
    assert take_all(run, encoder, chunks, decoder_name)[1] == 2
    assert take_all(run, encoder, chunks, decoder_name)[1] == 0


def test_features_of_a_picture_that_failed_are_not_cached(
    tmp_path: Path, chunks: list[list[Picture]]
) -> None:
    run = run_with_cache(tmp_path / "cache")
    encoder = tower(run).encoder
    image = Path(chunks[1][-1].medium.path)
    content = image.read_bytes()
    image.write_bytes(content[:100])
    with DecodeService(
        PyavDecoder(), run.model.vision, run.data.decode, skips_bad=True
    ) as service:
        cached = CachedFeatures(run, encoder, service, decoder_name="pyav", device=CPU)
        cached.start_step(chunks)
        assert list(cached.wait_until_decoded()) == [str(image)]
        assert [len(cached.take()) for _ in chunks] == [48, 56]
    with pytest.raises(ValueError, match=r"image\.png: cannot be read"):
        take_all(run, encoder, chunks)
    image.write_bytes(content)
    assert take_all(run, encoder, chunks)[1] == 1


def test_the_projector_learns_as_without_the_cache(
    tmp_path: Path, chunks: list[list[Picture]]
) -> None:
    run = run_with_cache(tmp_path / "cache")
    plan = plan_of(chunks)
    gradients = []
    for uses_cache in (False, True, True):
        vision = tower(run)
        vision.encoder.requires_grad_(False)
        with CountingService(PyavDecoder(), run.model.vision, run.data.decode) as service:
            cached = CachedFeatures(run, vision.encoder, service, decoder_name="pyav", device=CPU)
            encoder = (
                ChunkEncoder(run, vision.projector, cached, CPU, rank=0, learns=True)
                if uses_cache
                else ChunkEncoder(run, vision, service, CPU, rank=0, learns=True)
            )
            rows = cast("list[PackedRow]", [Row(chunk) for chunk in chunks])
            encoder.announce(plan, rows)
            encoder.start_step(plan, rows, Recorder())
            features = [encoder.encode(number) for number in range(len(chunks))]
            for number, made in enumerate(features):
                encoder.backward(number, torch.ones_like(made))
        gradients.append([weight.grad for weight in vision.projector.parameters()])
    for plain, *with_cache in zip(*gradients, strict=True):
        assert plain is not None and all(torch.equal(plain, other) for other in with_cache)


class Row:
    """What `ChunkEncoder` needs of a packed row."""

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures = pictures


def plan_of(chunks: list[list[Picture]]) -> StepPlan:
    planned = []
    for row, chunk in enumerate(chunks):
        slots = [
            PictureSlot(row, index, 0, picture.num_patches, picture.num_tokens(2))
            for index, picture in enumerate(chunk)
        ]
        planned.append(Chunk(vision_rank=0, pictures=tuple(slots)))
    return StepPlan(chunks=tuple(planned), transfers=(), exchanges=(), num_micro_batches=1)


def test_writers_at_once_leave_whole_features(tmp_path: Path, chunks: list[list[Picture]]) -> None:
    pictures = [picture for chunk in chunks for picture in chunk]
    features = {
        picture: torch.full((picture.num_patches, 16), float(number))
        for number, picture in enumerate(pictures)
    }
    errors: list[Exception] = []

    def write() -> None:
        try:
            cache = FeatureCache(tmp_path / "cache", "maker", 16, torch.float32)
            for _ in range(5):
                for picture in pictures:
                    cache.write(picture, features[picture])
                    assert cache.has(picture)
                    assert torch.equal(cache.read(picture), features[picture])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not list((tmp_path / "cache").rglob("*.partial")), "a writer left a temporary file"


def test_damaged_features_are_refused(tmp_path: Path, chunks: list[list[Picture]]) -> None:
    run = run_with_cache(tmp_path / "cache")
    encoder = tower(run).encoder
    take_all(run, encoder, chunks)
    (file,) = (tmp_path / "cache").rglob("c/4/0/0")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"read as features of frame 4 of .*clip\.mp4 \("):
        take_all(run, encoder, chunks)


def test_a_missing_file_is_named(tmp_path: Path, chunks: list[list[Picture]]) -> None:
    run = run_with_cache(tmp_path / "cache")
    Path(chunks[0][0].medium.path).unlink()
    with pytest.raises(ValueError, match=r"clip\.mp4: is not there"):
        take_all(run, tower(run).encoder, chunks)


def test_a_trained_vit_is_not_cached() -> None:
    run = tiny_run()
    with pytest.raises(ValueError, match=r"data\.feature_cache: got 'x'.*vision learns"):
        replace(run, data=replace(run.data, feature_cache="x"))


def test_any_bit_of_a_weight_counts() -> None:
    module = nn.Linear(3, 2)
    before = weights_digest(module)
    assert weights_digest(module) == before
    with torch.no_grad():
        module.weight[1, 2] = -module.weight[1, 2]
    assert weights_digest(module) != before


def test_a_broken_file_raises_whenever_its_chunk_is_taken(
    tmp_path: Path, chunks: list[list[Picture]]
) -> None:
    run = run_with_cache(tmp_path / "cache")
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    broken = replace(chunks[0][0], medium=Medium(str(tmp_path / "broken.mp4"), "video"))
    with DecodeService(PyavDecoder(), run.model.vision, run.data.decode) as service:
        cached = CachedFeatures(run, tower(run).encoder, service, decoder_name="pyav", device=CPU)
        cached.start_step([[broken], *chunks])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"broken\.mp4"):
                cached.take()

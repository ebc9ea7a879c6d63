# SPDX-License-Identifier: Apache-2.0
"""Samples that name media by URL are those that name the files themselves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_keye.config import DataConfig, FrameConfig, RemoteConfig
from megatron_keye.data.feature_cache import FeatureCache
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.row import Picture
from megatron_keye.data.store.make import make_store
from megatron_keye.data.video.chunk_patches import decode_chunks
from megatron_keye.data.video.pyav import PyavDecoder
from megatron_keye.errors import UserError
from tests.support.clips import make_clip, tiny_model
from tests.support.shelf import num_transfers

MODEL = tiny_model()


def write_samples(path: Path, prefix: str) -> DataConfig:
    parts = [
        {"type": "video", "video": f"{prefix}v.mp4"},
        {"type": "image", "image": f"{prefix}i.png"},
        {"type": "video", "video": [f"{prefix}i.png"] * 2, "sample_fps": 2},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return DataConfig(
        samples=str(path),
        row_tokens=256,
        frames=FrameConfig(min_tokens_per_frame=1, max_tokens_per_frame=4),
        remote=RemoteConfig(cache_folder=str(path.parent / "cache"), num_retries=0),
    )


def pictures(config: DataConfig) -> tuple[Picture, ...]:
    (row,) = RowLoader(config, MODEL, seed=0).next_rows(1)
    return row.pictures


@pytest.mark.parametrize("is_prepared", [False, True])
def test_urls_give_the_same_patches_as_files(tmp_path: Path, is_prepared: bool) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    make_clip(folder / "v.mp4", 60)
    Image.radial_gradient("L").save(folder / "i.png")
    of_files = write_samples(tmp_path / "files.jsonl", f"{folder}/")
    of_urls = write_samples(tmp_path / "urls.jsonl", f"shelf://{folder}/")
    expected = pictures(of_files)
    if is_prepared:
        store = tmp_path / "store"
        make_store(Path(of_urls.samples), store, of_urls, MODEL, num_workers=1, skips_bad=False)
        of_urls = replace(of_urls, samples=str(store))
    got = pictures(of_urls)
    for mine, other in zip(got, expected, strict=True):
        assert mine.medium.path == f"shelf://{other.medium.path}"
        assert (mine.frame, mine.patch_grid, mine.seconds) == (
            *(other.frame, other.patch_grid, other.seconds),
        )
        assert bool(mine.medium.content_key) == is_prepared
    decoder, vision = PyavDecoder(), MODEL.vision
    patches = decode_chunks([got], decoder, vision, remote=of_urls.remote)
    assert torch.equal(next(patches), next(decode_chunks([expected], decoder, vision)))
    assert [num_transfers(folder / name) for name in ("v.mp4", "i.png")] == [1, 1]
    cache = FeatureCache(tmp_path / "features", "maker", 4, torch.float32, remote=of_urls.remote)
    features = torch.ones(got[0].num_patches, 4)
    cache.write(got[0], features)
    assert cache.has(got[0]) and not cache.has(got[1])
    assert torch.equal(cache.read(got[0]), features)


def test_a_remote_file_that_changed_since_it_was_prepared_is_refused(tmp_path: Path) -> None:
    make_clip(tmp_path / "v.mp4", 30)
    Image.new("L", (28, 28)).save(tmp_path / "i.png")
    config = write_samples(tmp_path / "s.jsonl", f"shelf://{tmp_path}/")
    store = tmp_path / "store"
    make_store(Path(config.samples), store, config, MODEL, num_workers=1, skips_bad=False)
    make_clip(tmp_path / "v.mp4", 40)
    shown = pictures(replace(config, samples=str(store)))
    elsewhere = RemoteConfig(cache_folder=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"^shelf://.*/v\.mp4: has changed since the samples"):
        next(decode_chunks([shown], PyavDecoder(), MODEL.vision, remote=elsewhere))


def test_a_bad_remote_file_is_named_with_its_sample(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"no video")
    config = write_samples(tmp_path / "s.jsonl", f"shelf://{tmp_path}/")
    with pytest.raises(UserError, match=rf"s\.jsonl:1: shelf://{tmp_path}/v\.mp4: .*as a video"):
        pictures(config)

# SPDX-License-Identifier: Apache-2.0
"""Data whose files would run code when read is refused, or made anew, and nothing runs."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_keye.data.feature_cache import FeatureCache
from megatron_keye.data.media import Medium
from megatron_keye.data.row import Picture
from megatron_keye.data.store.block_metadata import BlockMetadata
from megatron_keye.data.tokens import load_tokenizer
from megatron_keye.data.video.probe_cache import ProbeCache
from megatron_keye.errors import UserError
from megatron_keye.verify.dump_inputs import read_inputs
from tests.support.attack import Attack, pickled
from tests.support.clips import make_clip
from tests.support.tiny import tiny_model

CODE = """
import os
os.mkdir({mark!r})
from transformers import PreTrainedTokenizer
class Tokenizer(PreTrainedTokenizer):
    pass
"""


def objects(mark: Path) -> dict[str, object]:
    """Return the arrays of an .npz that numpy can only unpickle."""
    return {"samples": np.array([Attack(mark)], dtype=object)}


def test_code_of_a_tokenizers_folder_is_never_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on standard input"))
    folder, mark = tmp_path / "tokenizer", tmp_path / "mark"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.Config"}}))
    described = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"tokenizer_config.json: names a .*never run"):
        load_tokenizer(str(folder))
    assert not mark.exists()


def test_pickled_objects_of_an_archive_are_refused(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "inputs.npz"
    np.savez(file, allow_pickle=True, **objects(mark))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"inputs.npz: got a file that NumPy cannot read"):
        read_inputs(file, tiny_model())
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, **objects(mark))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allow_pickle=False"):
        BlockMetadata.from_bytes(stream.getvalue())
    assert not mark.exists()


@pytest.mark.parametrize("pack", [bytes, zlib.compress], ids=["plain", "compressed"])
def test_what_is_kept_of_a_video_is_never_unpickled(pack: type[bytes], tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", make_clip(tmp_path / "clip.mp4", 5)
    ProbeCache(tmp_path / "probes").probe(path)
    (kept,) = (
        file for file in (tmp_path / "probes").rglob("*") if file.is_file() and file.stat().st_size
    )
    kept.write_bytes(pack(pickled(mark)))
    ProbeCache(tmp_path / "probes", max_bytes=2**20).probe(path)  # not in memory
    assert not mark.exists() and pickled(mark) != kept.read_bytes()


def test_pickled_features_are_refused(tmp_path: Path) -> None:
    """zarr's format 2 keeps objects as pickles."""
    mark, image = tmp_path / "mark", tmp_path / "image.png"
    image.touch()
    picture = Picture(medium=Medium(str(image), "image"), frame=0, patch_grid=(2, 2))
    cache = FeatureCache(tmp_path / "cache", "maker", 4, torch.float32)
    cache.write(picture, torch.zeros(4, 4))
    (file,) = (tmp_path / "cache").rglob("zarr.json")
    file.unlink()
    described = {
        "zarr_format": 2,
        **{"shape": [1, 4, 4], "chunks": [1, 4, 4], "order": "C", "fill_value": None},
        **{"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "compressor": None},
    }
    (file.parent / ".zarray").write_text(json.dumps(described))
    (file.parent / "0.0.0").write_bytes(pickled(mark))
    with pytest.raises(UserError, match="is not there, expected features of frame 0"):
        cache.read(picture)
    assert not mark.exists()

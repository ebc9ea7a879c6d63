# SPDX-License-Identifier: Apache-2.0
"""Files of a checkpoint that would run code are refused by name, or are not read at all."""

import os
import pickle
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_keye.checkpoint.convert.convert import Options, native_to_hf
from megatron_keye.checkpoint.convert.native_folder import NativeFolder
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.checkpoint.progress import PROGRESS
from megatron_keye.checkpoint.safe_metadata import METADATA, read_metadata
from megatron_keye.checkpoint.training_checkpoint import load, load_weights
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.estimate.disk_room import saved_bytes
from tests.support.attack import Attack, pickled, saved
from tests.support.ranks import run_on_ranks
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import build_step, let_go, train

RUN = tiny_run()
WEIGHT = "decoder.embedding.weight"
MOMENT = "optimizer.exp_avg.decoder.embedding.weight"
MARK = "code_has_run"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(RUN, [mixed_rows(0)], save_to=folder)
    return folder / "tiny" / "checkpoints" / "step-00000001"


def poison_list(folder: Path, mark: Path) -> None:
    metadata = read_metadata(folder)
    metadata.planner_data = Attack(mark)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def poison_whole_list(folder: Path, mark: Path) -> None:
    (folder / METADATA).write_bytes(pickled(mark))


def poison_part(key: str) -> Callable[[Path, Path], None]:
    """Let a tensor's first shard, or an object that may be new, be a pickle."""

    def poison(folder: Path, mark: Path) -> None:
        metadata = read_metadata(folder)
        stored = metadata.state_dict_metadata.setdefault(key, BytesStorageMetadata())
        is_tensor = isinstance(stored, TensorStorageMetadata)
        index = MetadataIndex(key, stored.chunks[0].offsets if is_tensor else None)
        some = next(iter(metadata.storage_data.values()))
        info = metadata.storage_data.setdefault(index, type(some)(some.relative_path, 0, 0))
        with (folder / info.relative_path).open("ab") as file:
            info.offset = file.tell()
            info.length = file.write(saved(mark))
        (folder / METADATA).write_bytes(pickle.dumps(metadata))

    return poison


def poison_file(name: str) -> Callable[[Path, Path], None]:
    """Let a file be a pickle."""

    def poison(folder: Path, mark: Path) -> None:
        (folder / name).write_bytes(pickled(mark))

    return poison


def lead_outside(folder: Path, mark: Path) -> None:
    metadata = read_metadata(folder)
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


MKDIR = f"{os.mkdir.__module__}.mkdir"
EXTRA_STATE = "decoder.output_layer._extra_state/shard_0_1"
ATTACKS = {
    "the list of tensors": (poison_list, f"{METADATA}: got {MKDIR}, expected the tensors"),
    "no list at all": (poison_whole_list, f"{METADATA}: got {MKDIR}"),
    "a list of files elsewhere": (lead_outside, f"{METADATA}: got a part in '../elsewhere"),
    "a weight": (poison_part(WEIGHT), f".distcp: got {MKDIR}, expected tensors"),
    "a moment": (poison_part(MOMENT), f".distcp: got {MKDIR}"),
    "random states": (poison_part("random/shard_0_1"), f".distcp: got {MKDIR}"),
    "progress": (poison_file(PROGRESS), f"{PROGRESS}: cannot be read"),
    # What Megatron-Core's own loading unpickles.
    "an extra state": (poison_part(EXTRA_STATE), ""),
    "the common state": (poison_part("common_state/shard_0_1"), ""),
    "an older common state": (poison_file("common.pt"), ""),
}


@pytest.fixture(scope="module")
def outcomes(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str, bool]]:
    """Return what resuming and loading weights said, and whether code ran, by attack."""
    parent, folders = tmp_path_factory.mktemp("attacks"), {}
    for number, (name, (poison, _)) in enumerate(ATTACKS.items()):
        folders[name] = parent / str(number) / checkpoint.name
        shutil.copytree(checkpoint, folders[name])
        poison(folders[name], folders[name].parent / MARK)
        # Who can change a file can change the manifest.
        write_manifest(folders[name], {})
    (said,) = run_on_ranks(1, _load_each, RUN.to_json(), list(folders.values()))
    marks = [(folder.parent / MARK).exists() for folder in folders.values()]
    pairs = zip(said, marks, strict=True)
    return dict(zip(folders, [(*both, ran) for both, ran in pairs], strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_resuming_runs_no_code(name: str, outcomes: dict[str, tuple[str, str, bool]]) -> None:
    resumed, weights, has_run = outcomes[name]
    _, says = ATTACKS[name]
    assert not has_run
    assert says in resumed and (says or resumed == "loaded")
    assert weights == (resumed if name in list(ATTACKS)[:4] else "loaded")


def _load_each(run_json: str, folders: list[Path]) -> list[tuple[str, str]]:
    """Return what resuming from each folder says, and what taking its weights alone."""
    run = RunConfig.from_json(run_json)
    grid, model, optimizer, _ = build_step(run)
    said = []
    for folder in folders:
        answers = []
        for read in (load, load_weights):
            try:
                read(folder, run, model, optimizer, grid)
                answers.append("loaded")
            except UserError as error:
                answers.append(str(error))
        said.append((answers[0], answers[1]))
    let_go(model)
    return said


def test_a_checkpoint_takes_what_is_asked_of_the_disk(checkpoint: Path) -> None:
    tensors = NativeFolder(checkpoint, has_optimizer=True).tensors
    sizes = {key: prod(each.shape) * each.dtype.itemsize for key, each in tensors.items()}
    weights = sum(size for key, size in sizes.items() if not key.startswith("optimizer."))
    assert saved_bytes(RUN) == (weights, sum(sizes.values()))


def test_an_attack_would_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(saved(tmp_path / MARK))
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / MARK).exists()


@pytest.mark.parametrize("name", ["the list of tensors", "a weight"])
def test_an_export_runs_no_code(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, folder)
    poison, says = ATTACKS[name]
    poison(folder, tmp_path / MARK)
    write_manifest(folder, {})
    with pytest.raises(UserError) as refusal:
        native_to_hf(folder, tmp_path / "out", Options())
    assert says in str(refusal.value)
    assert not list(tmp_path.glob("out*")) and not (tmp_path / MARK).exists()

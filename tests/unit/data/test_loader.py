"""Packing and loading: nothing is lost, nothing crosses documents, every stop resumes exactly."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data import IGNORED_LABEL, PackedRow, RowLoader, Sample, pack
from tests.support.clips import tiny_model

MODEL = tiny_model()
RECIPE_SAMPLES = Path(__file__).parents[3] / "launch" / "recipes" / "keye_tiny.jsonl"


def made_sample(length: int, name: str = "s") -> Sample:
    token_ids = np.arange(1, length + 1)
    labels = np.append(token_ids[1:], IGNORED_LABEL)
    return Sample(name=name, token_ids=token_ids, labels=labels, pictures=(), picture_starts=())


def same(left: list[PackedRow], right: list[PackedRow]) -> bool:
    return len(left) == len(right) and all(
        a.sample_names == b.sample_names
        and a.pictures == b.pictures
        and a.picture_starts == b.picture_starts
        and np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.document_bounds, b.document_bounds)
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    path = tmp_path / "samples.jsonl"
    lines = []
    for number in range(7):
        question = {"role": "user", "content": "word " * number}
        answer = {"role": "assistant", "content": f"answer {number}"}
        lines.append(json.dumps({"messages": [question, answer]}))
    path.write_text("\n".join(lines))
    return DataConfig(samples=str(path), row_tokens=50)


@pytest.mark.parametrize("lengths", [[5], [16], [5, 7], [5, 7, 4], [1, 1]])
def test_rows_hold_documents_and_one_of_padding(lengths: list[int]) -> None:
    row = pack([made_sample(length) for length in lengths], 16, pad_token_id=99)
    ends = np.cumsum([0, *lengths]).tolist()
    assert row.document_bounds.tolist() == (ends if ends[-1] == 16 else [*ends, 16])
    assert row.num_real_tokens == ends[-1]
    assert (row.token_ids[ends[-1] :] == 99).all()
    assert (row.labels[ends[-1] :] == IGNORED_LABEL).all()
    assert all(row.labels[end - 1] == IGNORED_LABEL for end in ends[1:])
    assert row.num_loss_tokens == sum(lengths) - len(lengths)
    for start, stop in zip(ends, ends[1:], strict=False):
        assert row.token_ids[start:stop].tolist() == list(range(1, stop - start + 1))


def test_labels_that_cross_documents_are_refused() -> None:
    sample = dataclasses.replace(made_sample(4), labels=np.arange(4))
    with pytest.raises(AssertionError, match="crosses"):
        pack([sample], 8, pad_token_id=0)


@pytest.mark.parametrize("shuffles", [False, True])
def test_every_epoch_has_every_sample_once(config: DataConfig, shuffles: bool) -> None:
    loader = RowLoader(dataclasses.replace(config, shuffles=shuffles), MODEL, seed=3)
    names = [name for row in loader.next_rows(30) for name in row.sample_names]
    epochs = [tuple(names[start : start + 7]) for start in range(0, len(names) - 6, 7)]
    assert len(epochs) > 5
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs)) == (len(epochs) if shuffles else 1)


def test_order_depends_on_the_seed_alone(config: DataConfig) -> None:
    rows = [RowLoader(config, MODEL, seed=seed).next_rows(20) for seed in (1, 1, 2)]
    assert same(rows[0], rows[1])
    assert not same(rows[0], rows[2])


def test_rows_are_the_same_however_they_are_asked_for(config: DataConfig) -> None:
    one, other = RowLoader(config, MODEL, seed=1), RowLoader(config, MODEL, seed=1)
    assert same(one.next_rows(12), [row for _ in range(4) for row in other.next_rows(3)])


@pytest.mark.parametrize("stop", range(0, 12))
def test_any_stop_resumes_exactly(config: DataConfig, stop: int) -> None:
    unbroken = RowLoader(config, MODEL, seed=5)
    unbroken.next_rows(stop)
    state = json.loads(json.dumps(unbroken.state_dict()))
    resumed = RowLoader(config, MODEL, seed=5)
    resumed.next_rows(3)
    resumed.load_state_dict(state)
    assert same(unbroken.next_rows(9), resumed.next_rows(9))
    assert unbroken.state_dict() == resumed.state_dict()


def test_state_of_other_samples_or_seed_is_refused(config: DataConfig) -> None:
    state = RowLoader(config, MODEL, seed=5).state_dict()
    with pytest.raises(ValueError, match="training.seed: got 6, expected 5"):
        RowLoader(config, MODEL, seed=6).load_state_dict(state)
    path = Path(config.samples)
    path.write_text(path.read_text().replace("answer 3", "answer 4"))
    with pytest.raises(ValueError, match=r"data.samples: .*samples.jsonl has content"):
        RowLoader(config, MODEL, seed=5).load_state_dict(state)


def test_a_refused_sample_leaves_the_position_alone(config: DataConfig) -> None:
    loader = RowLoader(dataclasses.replace(config, row_tokens=15), MODEL, seed=5)
    with pytest.raises(ValueError, match=r"samples.jsonl:\d: is \d+ tokens long"):
        loader.next_rows(20)
    assert loader.state_dict() == RowLoader(config, MODEL, seed=5).state_dict()


def test_a_vocabulary_that_is_too_small_is_refused(config: DataConfig) -> None:
    decoder = dataclasses.replace(MODEL.decoder, vocab_size=151_668)
    with pytest.raises(ValueError, match="vocab_size: got 151668, expected at least the 151669"):
        RowLoader(config, dataclasses.replace(MODEL, decoder=decoder), seed=0)


def test_the_recipe_samples_are_real() -> None:
    frames = FrameConfig(min_tokens_per_frame=4, max_tokens_per_frame=8)
    config = DataConfig(samples=str(RECIPE_SAMPLES), row_tokens=512, frames=frames)
    loader = RowLoader(config, MODEL, seed=0)
    rows = loader.next_rows(loader.num_samples)
    assert len({name for row in rows for name in row.sample_names}) == loader.num_samples == 8
    for row in rows:
        spans = zip(row.pictures, row.picture_starts, strict=True)
        placeholders = [
            place
            for picture, start in spans
            for place in range(start, start + picture.num_tokens(2))
        ]
        assert np.flatnonzero(row.token_ids == 151_656).tolist() == placeholders
        assert row.num_loss_tokens > 0

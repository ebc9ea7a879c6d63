# SPDX-License-Identifier: Apache-2.0
"""Packing and loading: nothing is lost, labels stay in documents, every stop resumes exactly."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_keye.config import DataConfig, FrameConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.packing import pack
from megatron_keye.data.row import IGNORED_LABEL, PackedRow, Sample
from megatron_keye.data.store.make import make_store
from tests.support.clips import tiny_model

MODEL = tiny_model()
RECIPE_SAMPLES = Path(__file__).parents[3] / "megatron_keye" / "recipes" / "keye_tiny.jsonl"


def made_sample(length: int, name: str = "s") -> Sample:
    token_ids = np.arange(1, length + 1)
    labels = np.append(token_ids[1:], IGNORED_LABEL)
    weights = (labels != IGNORED_LABEL).astype(np.float32)
    return Sample(
        name=name,
        token_ids=token_ids,
        labels=labels,
        weights=weights,
        pictures=(),
        picture_starts=(),
    )


def same(left: list[PackedRow], right: list[PackedRow]) -> bool:
    return len(left) == len(right) and all(
        a.sample_names == b.sample_names
        and a.pictures == b.pictures
        and a.picture_starts == b.picture_starts
        and np.array_equal(a.token_ids, b.token_ids)
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.weights, b.weights)
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


def test_rows_do_not_depend_on_how_many_are_requested_at_once(config: DataConfig) -> None:
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
    with pytest.raises(ValueError, match=r"lacks num_drawn, .*training.checkpoint.weights"):
        RowLoader(config, MODEL, seed=5).load_state_dict({"epoch": 0, "position": 3, "seed": 5})


def test_a_refused_sample_leaves_the_position_alone(config: DataConfig) -> None:
    loader = RowLoader(dataclasses.replace(config, row_tokens=15), MODEL, seed=5)
    with pytest.raises(ValueError, match=r"samples.jsonl:\d: is \d+ tokens long"):
        loader.next_rows(20)
    assert loader.state_dict() == RowLoader(config, MODEL, seed=5).state_dict()


def test_a_vocabulary_that_is_too_small_is_refused(config: DataConfig) -> None:
    decoder = dataclasses.replace(MODEL.decoder, vocab_size=151_668)
    with pytest.raises(ValueError, match="vocab_size: got 151668, expected at least the 151669"):
        RowLoader(config, dataclasses.replace(MODEL, decoder=decoder), seed=0)


@pytest.fixture(scope="module")
def blends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return sources: a file, its store, and a blend of the store with another file.

    Two samples of the other file are bad: one has a missing video, one is very long.
    """
    folder = tmp_path_factory.mktemp("blends")
    for name, num_samples in (("a", 9), ("b", 5)):
        lines = [
            {"messages": [{"role": "assistant", "content": f"{name} {'word ' * (7 * n % 23)}"}]}
            for n in range(num_samples)
        ]
        lines[3]["messages"][0]["content"] = "long " * 500
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        if name == "a":
            arguments = (folder / "a.jsonl", folder / "a.zarr", SKIPPING, MODEL)
            make_store(*arguments, num_workers=1, skips_bad=False)
    file, store = str(folder / "a.jsonl"), str(folder / "a.zarr")
    bad = str(folder / "b.jsonl")
    text = (folder / "b.jsonl").read_text().splitlines()
    text[1] = '{"messages": [{"role": "assistant", "content": "<video>"}], "videos": ["gone"]}'
    (folder / "b.jsonl").write_text("\n".join(text))
    return {"file": file, "store": store, "blend": f"{store}=0.7,{bad}=0.3"}


SKIPPING = DataConfig(samples="none", row_tokens=60, on_bad_sample="skip")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from(["file", "store", "blend"]),
    window=st.integers(1, 7),
    stop=st.integers(0, 20),
    num_ranks=st.sampled_from([1, 2, 3, 4, 6]),
    seed=st.integers(0, 2),
)
def test_any_stop_resumes_exactly_on_any_number_of_ranks(
    blends: dict[str, str], source: str, window: int, stop: int, num_ranks: int, seed: int
) -> None:
    config = dataclasses.replace(SKIPPING, samples=blends[source], packing_window=window)
    unbroken = RowLoader(config, MODEL, seed)
    before = unbroken.next_rows(stop)
    state = json.dumps(unbroken.state_dict())
    expected = unbroken.next_rows(12)
    shares = []
    for rank in range(num_ranks):
        loader = RowLoader(config, MODEL, seed)
        loader.load_state_dict(json.loads(state))
        rows = [row for _ in range(12 // num_ranks) for row in loader.next_rows(num_ranks)]
        shares.append(rows[rank::num_ranks])
        assert loader.state_dict() == unbroken.state_dict()
        assert loader.num_skipped == unbroken.num_skipped
    assert same([row for turn in zip(*shares, strict=True) for row in turn], expected)
    in_rows = [name for row in before + expected for name in row.sample_names]
    assert not any(name.endswith((":2", ":4")) for name in in_rows if "b.jsonl" in name)


def test_a_file_and_its_store_give_the_same_rows(blends: dict[str, str]) -> None:
    config = dataclasses.replace(SKIPPING, packing_window=3)
    rows = [
        RowLoader(dataclasses.replace(config, samples=blends[name]), MODEL, seed=1).next_rows(25)
        for name in ("file", "store")
    ]
    assert same(*rows)


def test_a_window_loses_and_repeats_nothing(blends: dict[str, str]) -> None:
    config = dataclasses.replace(SKIPPING, samples=blends["store"], packing_window=4)
    loader = RowLoader(config, MODEL, seed=1)
    names = [name for row in loader.next_rows(60) for name in row.sample_names]
    waiting = len(loader.state_dict()["waiting"])
    num_epochs, rest = divmod(sum(loader.state_dict()["num_drawn"]), 9)
    assert num_epochs > 10 and waiting <= 4
    # One of the nine is longer than a row.
    assert len(set(names)) == 8
    counts = [names.count(name) for name in set(names)]
    assert num_epochs - waiting <= min(counts) and max(counts) <= num_epochs + (rest > 0)
    assert len(names) + waiting + loader.num_skipped == sum(loader.state_dict()["num_drawn"])


def test_skipped_samples_are_counted_and_named(
    blends: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(SKIPPING, samples=blends["blend"], shuffles=False)
    loader = RowLoader(config, MODEL, seed=1)
    with caplog.at_level(logging.WARNING):
        while loader.num_skipped < 3:
            loader.next_rows(1)
    reasons = loader.take_skipped()
    assert len(reasons) == loader.num_skipped == len(caplog.messages) == 3
    assert sum("gone is not there" in r or "gone: " in r for r in reasons) == 1
    assert sum("tokens long, expected at most data.row_tokens = 60" in r for r in reasons) == 2
    assert loader.take_skipped() == []


def test_a_source_of_bad_samples_alone_ends_the_run(blends: dict[str, str]) -> None:
    config = dataclasses.replace(SKIPPING, samples=blends["store"], row_tokens=4)
    with pytest.raises(ValueError, match="a.zarr: all 9 samples were skipped.*tokens long"):
        RowLoader(config, MODEL, seed=1).next_rows(1)


def test_state_of_another_blend_is_refused(blends: dict[str, str]) -> None:
    config = dataclasses.replace(SKIPPING, samples=blends["blend"])
    state = RowLoader(config, MODEL, seed=1).state_dict()
    for samples in (blends["store"], blends["blend"].replace("0.7", "0.6")):
        other = dataclasses.replace(config, samples=samples)
        with pytest.raises(ValueError, match=r"data.samples: got .*weights \[0.7, 0.3\] as when"):
            RowLoader(other, MODEL, seed=1).load_state_dict(state)


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


def test_malformed_records_are_skipped_where_samples_are(config: DataConfig) -> None:
    path = Path(config.samples)
    whole = path.read_text()
    path.write_text(f"{{oops\n{whole}\n" + '{"messages": [], "label": true}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl:1: is not valid JSON"):
        RowLoader(config, MODEL, 0)
    loader = RowLoader(dataclasses.replace(config, on_bad_sample="skip", shuffles=False), MODEL, 0)
    names = {name for row in loader.next_rows(6) for name in row.sample_names}
    assert names == {f"{path}:{line}" for line in range(2, 9)}
    assert loader.num_skipped >= 2


def test_keys_that_nothing_reads_are_told_once(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(config.samples)
    records = [json.loads(line) | {"source": "web"} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, records)))
    loader = RowLoader(config, MODEL, 0)
    loader.next_rows(3)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{path}: keys that were not read: source (7)"]

# SPDX-License-Identifier: Apache-2.0
"""When rows end: with the epochs, or where a source has no usable sample."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_keye.config import DataConfig
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.row import PackedRow
from tests.support.clips import tiny_model

MODEL = tiny_model()
SKIPPING = DataConfig(samples="", row_tokens=60, on_bad_sample="skip")


def answers(path: Path, *lengths: int) -> str:
    """Write samples of about so many words; 0 is one with a missing file."""
    missing = {"messages": [{"role": "assistant", "content": "<image>"}], "images": ["gone.png"]}
    lines = [
        {"messages": [{"role": "assistant", "content": "word " * length}]} if length else missing
        for length in lengths
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.mark.parametrize("seed", range(4))
def test_skipping_goes_on_while_a_source_has_one_good_sample(tmp_path: Path, seed: int) -> None:
    half, good = answers(tmp_path / "half", 0, 5), answers(tmp_path / "good", 3, 4, 5)
    mostly_bad = answers(tmp_path / "bad", *[0] * 9, 7)
    for samples in (half, mostly_bad, f"{good}=0.5,{mostly_bad}=0.5"):
        loader = RowLoader(dataclasses.replace(SKIPPING, samples=samples), MODEL, seed)
        loader.next_rows(25)
        assert loader.num_skipped >= 25


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_skipping_ends_with_the_first_epoch_without_a_good_sample(
    tmp_path: Path, stop: int
) -> None:
    good, bad = answers(tmp_path / "good", 50, 50, 50), answers(tmp_path / "bad", *[0] * 6)
    config = dataclasses.replace(SKIPPING, samples=f"{good}=0.5,{bad}=0.5")
    loader = RowLoader(config, MODEL, seed=1)
    loader.next_rows(stop)
    state = loader.state_dict()
    loader = RowLoader(config, MODEL, seed=1)
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match="bad: all 6 samples were skipped in a whole epoch"):
        loader.next_rows(20)
    assert loader.num_skipped == 6 and loader.state_dict()["num_drawn"] == state["num_drawn"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any),
    epochs=st.sampled_from([1.0, 2.0, 3.0]),
    window=st.integers(1, 4),
    count=st.integers(1, 3),
    stop=st.integers(0, 5),
)
def test_epochs_hold_every_good_sample_equally_often(
    tmp_path: Path, lengths: list[int], epochs: float, window: int, count: int, stop: int
) -> None:
    samples = answers(tmp_path / "s.jsonl", *lengths)
    config = dataclasses.replace(SKIPPING, samples=samples, packing_window=window)
    loader = RowLoader(config, MODEL, seed=2, epochs=epochs)
    rows: list[PackedRow] = []
    while not loader.is_exhausted:
        if stop == 0:
            state = json.loads(json.dumps(loader.state_dict()))
            loader = RowLoader(config, MODEL, seed=2, epochs=epochs)
            loader.load_state_dict(state)
        stop -= 1
        some = loader.next_rows(count)
        assert 0 < len(some) <= count, "the end was not seen before"
        rows += some
    assert loader.next_rows(count) == [] and loader.share_done == 1
    names = [name for row in rows for name in row.sample_names]
    good = [f"{samples}:{line}" for line, length in enumerate(lengths, start=1) if length]
    assert sorted(names) == sorted(good * int(epochs))


def test_a_part_of_an_epoch_is_rounded_to_samples(tmp_path: Path) -> None:
    config = dataclasses.replace(SKIPPING, samples=answers(tmp_path / "s", *range(1, 8)))
    loader = RowLoader(config, MODEL, seed=1, epochs=0.5)
    names = [name for row in loader.next_rows(9) for name in row.sample_names]
    assert len(names) == 4 and loader.is_exhausted


def test_a_padding_row_has_no_sample(tmp_path: Path) -> None:
    config = dataclasses.replace(SKIPPING, samples=answers(tmp_path / "s", 3))
    row = RowLoader(config, MODEL, seed=1).padding_row()
    assert row.num_real_tokens == row.num_loss_tokens == 0 and row.sample_names == ()
    assert row.document_bounds.tolist() == [0, 60]

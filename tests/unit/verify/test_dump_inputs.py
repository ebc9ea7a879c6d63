# SPDX-License-Identifier: Apache-2.0
"""Inputs of verify_checkpoint: positions computed by hand, and one sentence for each mistake."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_keye.verify.dump_inputs import inputs_from_arrays, read_inputs
from megatron_keye.verify.sample_inputs import sample_multimodal, sample_text
from tests.support.dumping import mixed_inputs
from tests.support.tiny import END, IMAGE, PATCH, START, VIDEO, tiny_model

MODEL = tiny_model()


def arrays(token_ids: list[int], **patch_grids: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Return inputs of given tokens with blank pictures of the given patch grids."""
    found: dict[str, Any] = {"input_ids": np.array(token_ids)}
    pixels = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
    for name, rows in patch_grids.items():
        num_patches = sum(height * width for _, height, width in rows)
        found[name] = np.array(rows)
        found[pixels[name]] = np.zeros((num_patches, 3, PATCH, PATCH), dtype=np.float32)
    return found


def positions(found: dict[str, Any]) -> list[list[int]]:
    """Return the three positions of each token, as three lists."""
    ids: list[list[int]] = inputs_from_arrays(found, MODEL).position_ids.tolist()
    return ids


def test_text_advances_all_three_positions_by_one() -> None:
    assert positions(arrays([1, 2, 3])) == [[0, 1, 2]] * 3


def test_an_image_between_text_spans_its_longer_side() -> None:
    # 4 x 6 patches are 2 x 3 tokens from position 2 on; the text continues at 2 + 3.
    found = arrays([7, START, *[IMAGE] * 6, END, 8], image_grid_thw=[(1, 4, 6)])
    assert positions(found) == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_each_frame_has_a_patch_grid_of_its_own_after_its_timestamp() -> None:
    # Two frames of 2 x 1 tokens, each after a text token for its time.
    found = arrays([5, VIDEO, VIDEO, 6, VIDEO, VIDEO, 7], video_grid_thw=[(1, 4, 2)] * 2)
    assert positions(found) == [
        [0, 1, 1, 3, 4, 4, 6],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 1, 3, 4, 4, 6],
    ]


def test_adjacent_pictures_are_separated_by_their_patch_grids() -> None:
    found = arrays([IMAGE] * 3 + [1], image_grid_thw=[(1, 2, 4), (1, 2, 2)])
    assert positions(found) == [[0, 0, 2, 3], [0, 0, 2, 3], [0, 1, 2, 3]]


def test_images_and_frames_are_taken_in_row_order() -> None:
    found = arrays(
        [VIDEO, VIDEO, 1, IMAGE, 2],
        image_grid_thw=[(1, 2, 2)],
        video_grid_thw=[(1, 2, 4)],
    )
    assert positions(found) == [[0, 0, 2, 3, 4], [0, 0, 2, 3, 4], [0, 1, 2, 3, 4]]
    row = inputs_from_arrays(found, MODEL)
    assert row.feature_order().tolist() == [1, 2, 0], "the image's feature comes last"
    assert row.batch().feature_positions_M.tolist() == [0, 1, 3]


def test_positions_start_again_in_each_document() -> None:
    found = arrays([1, IMAGE, IMAGE, 2, 3, IMAGE, 4], image_grid_thw=[(1, 2, 4), (1, 2, 2)])
    found["cu_seqlens"] = np.array([0, 4, 7])
    assert positions(found) == [
        [0, 1, 1, 3, 0, 1, 2],
        [0, 1, 1, 3, 0, 1, 2],
        [0, 1, 2, 3, 0, 1, 2],
    ]
    batch = inputs_from_arrays(found, MODEL).batch()
    assert batch.key_start_T.tolist() == [0, 0, 0, 0, 4, 4, 4]
    assert batch.key_end_T.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_given_positions_are_taken_as_they_are() -> None:
    found = arrays([1, 2]) | {"position_ids": np.array([[4, 9], [5, 8], [6, 7]])}
    assert positions(found) == [[4, 9], [5, 8], [6, 7]]


def test_targets_name_the_positions_that_are_predicted() -> None:
    found = arrays([1, 2, 3]) | {"targets": np.array([-100, 5, -100])}
    batch = inputs_from_arrays(found, MODEL).batch()
    assert (batch.label_positions_L.tolist(), batch.labels_L.tolist()) == ([1], [5])


@pytest.mark.parametrize("sample", [sample_text, sample_multimodal])
def test_samples_fit_the_model_they_are_drawn_for(sample: Any) -> None:
    row = inputs_from_arrays(sample(MODEL, 3), MODEL)
    assert row.targets is not None and len(row.targets) == len(row.token_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "no input_ids"),
        ({"pixel_value": np.zeros(1)}, "array 'pixel_value'"),
        ({"input_ids": np.zeros((1, 38), dtype=int)}, r"input_ids: got shape \[1, 38\]"),
        ({"input_ids": np.zeros(38)}, "input_ids: got type float64"),
        ({"input_ids": np.full(38, 96)}, "input_ids: got 96, expected ids from 0 to 95"),
        ({"targets": np.full(38, -1)}, "targets: got -1"),
        ({"targets": np.zeros(3, dtype=int)}, r"targets: got shape \[3\]"),
        ({"cu_seqlens": np.array([0, 37])}, r"cu_seqlens: got \[0, 37\]"),
        ({"cu_seqlens": np.array([0, 8, 38])}, "placeholders spread from 6 to 11"),
        ({"position_ids": np.zeros((2, 38), dtype=int)}, "position_ids: got shape"),
        ({"image_grid_thw": None}, "pixel_values: got only pixel_values"),
        ({"image_grid_thw": np.array([[2, 4, 3]])}, r"image_grid_thw: got \[2, 4, 3\]"),
        ({"image_grid_thw": np.array([[1, 4, 4]])}, "pixel_values: got 24 patches, expected 16"),
        ({"video_grid_thw": np.array([[1, 4, 4]])}, "2 placeholders|side by side"),
        ({"pixel_values": np.zeros((24, 3, 4, 5))}, "pixel_values: got shape"),
        ({"pixel_values": None, "image_grid_thw": None}, "got 6 placeholders 90, expected 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    found = {n: a for n, a in (mixed_inputs() | changes).items() if a is not None}
    with pytest.raises(ValueError, match=message) as failure:
        inputs_from_arrays(found, MODEL)
    assert "\n" not in str(failure.value), "one line"


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"inputs\.npz: got a file that NumPy cannot read"):
        read_inputs(path, MODEL)

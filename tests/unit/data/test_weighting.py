# SPDX-License-Identifier: Apache-2.0
"""Loss weightings: what a sample adds to the loss, whatever its length."""

import numpy as np
import pytest

from megatron_keye.config.data import LossWeighting
from megatron_keye.data.packing import pack
from megatron_keye.data.row import IGNORED_LABEL, Sample, labels_of
from megatron_keye.data.weighting import loss_weights


def weights_of(*parts: tuple[int, float]) -> np.ndarray:
    return np.concatenate([np.full(count, weight, np.float32) for count, weight in parts])


@pytest.mark.parametrize(
    ("weighting", "total"), [("token", lambda n: n), ("sample", lambda n: 1), ("root", np.sqrt)]
)
def test_a_samples_weight_follows_its_labels(weighting: LossWeighting, total: object) -> None:
    assert callable(total)
    for count in (1, 7, 1000):
        weighted = loss_weights(weights_of((5, 0), (count, 1)), weighting)
        assert weighted.dtype == np.float32
        assert weighted.sum(dtype=np.float64) == pytest.approx(total(count), rel=1e-6)
        assert not weighted[:5].any()


def test_turns_keep_their_weights_relative_to_other_samples() -> None:
    plain, halved = weights_of((3, 0), (4, 1)), weights_of((3, 0), (4, 0.5))
    for weighting in ("token", "sample", "root"):
        np.testing.assert_array_equal(
            loss_weights(halved, weighting), 0.5 * loss_weights(plain, weighting)
        )
    assert not loss_weights(weights_of((3, 0)), "sample").any()


def test_a_row_weighs_each_sample_by_itself() -> None:
    samples = []
    for length in (3, 9):
        token_ids, weights = np.arange(length), weights_of((length - 1, 1), (1, 0))
        labels = labels_of(token_ids, weights)
        assert labels.tolist() == [*range(1, length), IGNORED_LABEL]
        samples.append(
            Sample(
                name="s",
                token_ids=token_ids,
                labels=labels,
                weights=weights,
                pictures=(),
                picture_starts=(),
            )
        )
    for weighting, total in (("token", 10), ("sample", 2), ("root", 2**0.5 + 8**0.5)):
        row = pack(samples, 16, pad_token_id=0, weighting=weighting)
        assert row.loss_weight == pytest.approx(total, rel=1e-6)
        assert row.num_loss_tokens == 10

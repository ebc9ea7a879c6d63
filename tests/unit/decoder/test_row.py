# SPDX-License-Identifier: Apache-2.0
"""A meter takes the sums that the metrics read, and no others."""

import pytest
import torch

from megatron_keye.decoder.row import METER_NAMES, RowMeter


def test_sums_add_up_in_float64_without_a_graph() -> None:
    meter = RowMeter()
    for value in (1.0, 2.0**-40):
        meter.accumulate("recall", torch.tensor(value, requires_grad=True))
    total = meter.sums["recall"]
    assert float(total) == 1.0 + 2.0**-40 and not total.requires_grad


def test_a_misspelt_name_is_refused() -> None:
    meter = RowMeter()
    with pytest.raises(ValueError, match=r"got 'recal', expected one of \('language_loss', "):
        meter.accumulate("recal", torch.tensor(1.0))  # type: ignore[arg-type]
    assert not meter.sums and "recall" in METER_NAMES

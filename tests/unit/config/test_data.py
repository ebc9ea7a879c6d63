# SPDX-License-Identifier: Apache-2.0
"""Sources of validation are read with their names, and refused where these say nothing."""

import pytest

from megatron_keye.config import DataConfig


@pytest.mark.parametrize(
    ("validation", "expected"),
    [
        ("", []),
        ("sets/held,out.jsonl", [("held,out", "sets/held,out.jsonl")]),
        ("sets/v.zarr", [("v", "sets/v.zarr")]),
        ("a=x/v.jsonl", [("a", "x/v.jsonl")]),
        (
            "text=a.jsonl, long-video.2h=b=c.zarr",
            [("text", "a.jsonl"), ("long-video.2h", "b=c.zarr")],
        ),
    ],
)
def test_sources_of_validation_are_read_with_their_names(
    validation: str, expected: list[tuple[str, str]]
) -> None:
    config = DataConfig(samples="s.jsonl", row_tokens=8, validation=validation)
    assert [(source.name, source.path) for source in config.validation_sources] == expected


@pytest.mark.parametrize(
    ("validation", "words"),
    [
        ("a.jsonl=0.7,b.jsonl=0.3", "there are no weights"),
        ("x/a=b.jsonl", "names of letters"),
        ("a=", "NAME=PATH"),
        ("a=b.jsonl,c.jsonl", "NAME=PATH"),
        ("a=b.jsonl,a=c.jsonl", "a name of its own"),
        ("a=b.jsonl,all=c.jsonl", "other than 'all'"),
    ],
)
def test_other_forms_are_refused(validation: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"data.validation: got .*{words}"):
        DataConfig(samples="s.jsonl", row_tokens=8, validation=validation)

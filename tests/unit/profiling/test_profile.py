# SPDX-License-Identifier: Apache-2.0
"""Profiles are written, read, compared and drawn."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from math import isnan, nan
from pathlib import Path

import pytest

from megatron_keye.errors import UserError
from megatron_keye.observe.span import Span
from megatron_keye.profiling.communication import ExchangeSum
from megatron_keye.profiling.compare import compare
from megatron_keye.profiling.memory import KINDS, StepMemory
from megatron_keye.profiling.page import draw_page
from megatron_keye.profiling.places import PLACES
from megatron_keye.profiling.profile import (
    FORMAT,
    Extrapolation,
    ModuleTime,
    Profile,
    RankProfile,
    read_profile,
)
from megatron_keye.profiling.rank_step import KernelSum
from megatron_keye.profiling.roofline import roofline_seconds
from megatron_keye.profiling.spread import Spread
from megatron_keye.profiling.units import duration, percent, rate, size

VOID = {"meta"}


def module(name: str, *seconds: float) -> ModuleTime:
    return ModuleTime(
        module=name,
        seconds=Spread.of(seconds),
        passes={"forward": seconds[0]},
        share=0.04,
        flops=2e9,
        flops_per_second=1e9,
        moved_bytes=3e6,
        bytes_per_second=2e6,
        roofline=0.5,
    )


def profile(
    *, experts: tuple[float, ...] = (0.2, 0.3), step: tuple[float, ...] = (1, 2)
) -> Profile:
    times = [
        module(name, *(experts if name == "decoder.experts" else (0.1, 0.2))) for name in PLACES
    ]
    kernel = KernelSum(
        name="void f<int, 3>(T&)", module="optimizer", in_pass="forward", count=3, seconds=0.1
    )
    exchange = ExchangeSum(
        kind="all_reduce",
        module="vocabulary",
        count=2,
        num_bytes=2**20,
        seconds=0.2,
        exposed_seconds=0.1,
    )
    memory = StepMemory(
        held={"weights": 2**20},
        seconds=[0.5, 1.0],
        kinds={kind: [1, 2**20] for kind in KINDS},
        kept={"vocabulary": 2**20},
    )
    rank = RankProfile(
        rank=0,
        role="decoder stage 0",
        phases={"forward": Spread.of([0.5])},
        idle=Spread.of([0.1]),
        peak_memory_mib=0,
        modules=times,
        kernels=[kernel],
        exchanges=[exchange],
        exposed_share=0.1,
        busy_share=0.8,
        memory=memory,
    )
    return Profile(
        format=FORMAT,
        name="a <run> & its name",
        layout="tensor 1",
        settings=["data.row_tokens=8192"],
        device="NVIDIA H100 80GB HBM3",
        versions={"torch": "2"},
        num_warm_up=1,
        num_traced=2,
        step_seconds=Spread.of(step),
        tokens_per_second=Spread.of([5.0]),
        mfu=Spread.of([0.4]),
        data_wait_seconds=Spread.of([0.0]),
        save_seconds=Spread.of([0.0]),
        traced_ratio=1.1,
        documents=[[3, 4]],
        ranks=[rank, replace(rank, rank=1), replace(rank, rank=2, role="vision 0 of 1")],
        extrapolation=Extrapolation(
            measured_layers=2,
            whole_layers=48,
            layer_seconds=1.0,
            update_seconds=0.5,
            rest_seconds=2.0,
            weight_ratio=10.0,
        ),
    )


class Balance(HTMLParser):
    """Notes tags that are closed in another order than they are opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_json_holds_a_whole_profile(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(profile().to_json())
    assert read_profile(file) == profile()


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"format": 0})])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(UserError, match="other.json: got"):
        read_profile(file)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = draw_page(profile(), {0: [Span(name="forward", label="<0>", start=0, end=1)]})
    balance = Balance()
    balance.feed(page)
    assert not balance.faults and not balance.open
    for word in (*PLACES, "a <run> & its name", "void f<int, 3>(T&)", "48 layers", "1.00 MiB"):
        assert word in balance.text, word
    outside = page.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in outside and "src=" not in outside and "<script" not in outside
    assert "prefers-color-scheme: dark" in page


def test_a_difference_within_the_noise_is_none() -> None:
    before = profile(experts=(0.2, 0.3))
    slower, alike = profile(experts=(0.4, 0.5)), profile(experts=(0.29, 0.5))
    assert {each.what for each in compare(before, slower) if each.is_real} == {"decoder.experts"}
    (found,) = (each for each in compare(before, slower) if each.is_real)
    assert found.verdict == "1.80x"
    assert not any(each.is_real for each in compare(before, alike))
    once = profile(step=(9.0,))
    assert compare(before, once)[0].verdict == "measured once"


def test_the_whole_model_is_layers_times_their_ratio_and_the_rest_once() -> None:
    whole = profile().extrapolation
    assert whole is not None and whole.whole_seconds == 24 * 1.0 + 10 * 0.5 + 2.0


def test_the_roofline_is_the_longer_of_products_and_memory() -> None:
    def work(flops: float, moved: float, precision: str = "bf16") -> dict[str, object]:
        passes = {"executed_flops": {"forward": flops}, "moved_bytes": {"forward": moved}}
        return {"precision": precision, **passes}

    h100 = "NVIDIA H100 80GB HBM3"
    assert roofline_seconds([work(989.4e12, 3.35e11)], h100, 989.4) == pytest.approx(1)
    assert roofline_seconds([work(1, 3.35e12)], h100, 989.4) == pytest.approx(1)
    assert roofline_seconds([work(66.9e12, 0, "fp32")], h100, 989.4) == pytest.approx(1)
    assert roofline_seconds([work(1, 2e12)], "NVIDIA H100 PCIe", 756.0) == pytest.approx(1)
    assert isnan(roofline_seconds([work(1, 1)], "CPU", nan))


def test_numbers_have_three_digits_and_a_unit() -> None:
    assert [duration(each) for each in (2.5, 0.0123, 99.96, 1e-6)] == [
        "2.50 s",
        "12.3 ms",
        "100 s",
        "1.00 us",
    ]
    assert (size(1536), size(0), rate(3.12e14, "FLOP/s"), percent(0.1234)) == (
        "1.50 KiB",
        "0 B",
        "312 TFLOP/s",
        "12.3 %",
    )

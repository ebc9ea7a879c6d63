# SPDX-License-Identifier: Apache-2.0
"""Predicted times and memory agree with measured runs, and the page shows what they are today."""

from tools.compare_predictions import PAGE, compare_memory, compare_times, renewed

_PLAIN = "1 H100: two layers, dense (plain Megatron-Core, permutation alone fused)"
MISSES = {
    "1 H100: two layers, independent tokens, 128K, recompute selective",
    "2 H200: two layers, context 2, expert 2, no fused kernels, 256K, recompute full",
    f"{_PLAIN}, 8K, recompute none",
    f"{_PLAIN}, 32K, recompute experts",
    f"{_PLAIN}, 64K, recompute experts",
    # Bound by their host, which the rates of a GPU do not know.
    *(
        f"1 H200: two layers, {what}, {tokens}, recompute none"
        for what in ("CUDA attention", "dense (plain Megatron-Core)")
        for tokens in ("8K", "32K")
    ),
}
"""Runs whose time is predicted less well than within 15 %; docs/plan.md says why."""


def test_times_are_within_15_percent_but_for_named_runs() -> None:
    predicted = [each for each in compare_times() if not each.calibrates]
    assert {each.run for each in predicted if abs(each.error) > 0.15} == MISSES
    blind = [each for each in predicted if not each.shaped and each.run not in MISSES]
    assert len(blind) >= 8, "none of their constants or formulas was chosen by these"


def test_memory_is_within_5_percent() -> None:
    memory = compare_memory()
    assert len(memory) >= 8
    assert max(abs(each.error) for each in memory) < 0.05


def test_the_page_shows_todays_tables() -> None:
    page = PAGE.read_text()
    assert renewed(page) == page, "run python -m tools.compare_predictions --write"
    outdated = page.replace("| 1 H100: two layers, 128K", "| 1 H100: three layers, 128K")
    assert outdated != page and renewed(outdated) == page

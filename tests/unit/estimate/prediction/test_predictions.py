"""Predicted times and memory agree with measured runs, and the page shows what they are today."""

from tools.compare_predictions import PAGE, compare_memory, compare_times, renewed

MISSES = {
    "1 H100: two layers, independent tokens, 128K, recompute selective",
    "2 H200: two layers, context 2, expert 2, no fused kernels, 256K, recompute full",
}
"""Runs whose time is predicted less well than within 15 %; docs/plan.md says why."""


def test_times_are_within_15_percent_but_for_two_named_runs() -> None:
    times = compare_times()
    predicted = [each for each in times if not each.calibrates]
    assert len(predicted) >= 8 and len(times) - len(predicted) == 2
    assert {each.run for each in predicted if abs(each.error) > 0.15} == MISSES
    assert max(abs(each.error) for each in times) < 0.18


def test_memory_is_within_5_percent() -> None:
    memory = compare_memory()
    assert len(memory) >= 8
    assert max(abs(each.error) for each in memory) < 0.05


def test_the_page_shows_todays_tables() -> None:
    page = PAGE.read_text()
    assert renewed(page) == page, "run python -m tools.compare_predictions --write"
    outdated = page.replace("| 1 H100: two layers, 128K", "| 1 H100: three layers, 128K")
    assert outdated != page and renewed(outdated) == page

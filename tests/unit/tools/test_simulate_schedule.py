"""The schedule keeps its promises on a realistic mix of lengths."""

import pytest

from launch.recipe import load_recipe
from tools.simulate_schedule import Speeds, compare, draw_rows, np, with_grid


@pytest.mark.slow
def test_balance_pays_and_ranks_hardly_idle_at_64_ranks() -> None:
    run = with_grid(load_recipe("keye_30b_a3b")(num_ranks=64, has_gpu=True), 64)
    results = {result["schedule"]: result for result in compare(run, 1, Speeds())}
    assert results["colocated, balanced"]["idle_share"] <= 0.08
    assert results["colocated, pictures by document"]["rank_seconds_over_balanced"] >= 1.2
    assert results["ViT on the first stage"]["rank_seconds_over_balanced"] > 1.1


def test_rows_are_full_and_pictures_lie_inside_documents() -> None:
    rows = draw_rows(np.random.default_rng(0), 4, 262_144)
    for row in rows:
        assert sum(row.document_lengths) == 262_144
        ends = [picture.start + picture.num_tokens for picture in row.pictures]
        starts = [picture.start for picture in row.pictures]
        assert all(end < start for end, start in zip(ends, starts[1:], strict=False))

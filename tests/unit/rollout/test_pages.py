# SPDX-License-Identifier: Apache-2.0
"""Pages are neither lost nor given twice, and nobody writes into one that others read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_keye.rollout.pages import PagePool, PageTable

PAGE = 4


def check(pool: PagePool, tables: list[PageTable]) -> None:
    """Compare the pool's count with what the tables hold, and each table with its length."""
    held = {page for table in tables for page in table.pages}
    assert pool.num_free == pool.num_pages - len(held)
    for table in tables:
        assert len(set(table.pages)) == len(table.pages) == -(-table.num_tokens // PAGE)


@settings(max_examples=100)
@given(st.data())
def test_tables_read_what_was_written_through_any_forks(data: st.DataObject) -> None:
    """Writes numbers into slots as the cache does keys, and compares with plain lists."""
    pool = PagePool(12)
    memory = np.full(pool.num_pages * PAGE, -1)
    tables, contents, number = [PageTable(pool, PAGE)], [[]], 0
    for _ in range(data.draw(st.integers(1, 30))):
        chosen = data.draw(st.integers(0, len(tables) - 1))
        table, content = tables[chosen], contents[chosen]
        action = data.draw(st.sampled_from(["grow", "grow", "fork", "release"]))
        if action == "grow":
            count = data.draw(st.integers(0, 6))
            wanted, before = table.num_wanted(count), pool.num_free
            if wanted > before:
                continue
            for to, origin in table.grow(count).items():
                memory[to * PAGE : (to + 1) * PAGE] = memory[origin * PAGE : (origin + 1) * PAGE]
            assert before - pool.num_free == wanted, "it takes what it says"
            slots = table.slots(len(content), len(content) + count)
            memory[slots] = np.arange(number, number + count)
            content += range(number, number + count)
            number += count
        elif action == "fork":
            length = data.draw(st.integers(0, len(content)))
            tables.append(table.fork(length))
            contents.append(content[:length])
        elif len(tables) > 1:
            table.release()
            del tables[chosen], contents[chosen]
        check(pool, tables)
        for each, wanted_content in zip(tables, contents, strict=True):
            assert memory[each.slots(0, each.num_tokens)].tolist() == wanted_content
    for table in tables:
        table.release()
    assert pool.num_free == pool.num_pages


def test_a_fork_shares_all_pages_until_it_grows() -> None:
    pool = PagePool(4)
    table = PageTable(pool, PAGE)
    table.grow(6)
    others = [table.fork(6) for _ in range(2)]
    assert pool.num_free == 2
    assert [other.num_wanted(1) for other in others] == [1, 1]
    (copy,) = others[0].grow(1).items()
    assert copy == (others[0].pages[1], table.pages[1])
    table.release()
    assert others[1].grow(1) == {}, "the last one that has a page need not copy it"


def test_a_page_is_not_released_twice() -> None:
    pool = PagePool(1)
    page = pool.take()
    pool.release(page)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(page)

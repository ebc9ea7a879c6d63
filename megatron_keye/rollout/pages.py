# SPDX-License-Identifier: Apache-2.0
"""Pages of the cache: which are free, how many sequences hold one, who may write into it.

Bookkeeping alone, without tensors; every rank does that of all replicas and comes to the same.
"""

import numpy as np
from numpy.typing import NDArray


class PagePool:
    """The pages of one replica, each counted by the tables that hold it."""

    def __init__(self, num_pages: int) -> None:
        """Start with all pages free.

        Args:
            num_pages: Pages 0 to num_pages - 1.
        """
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Return a free page, held once."""
        page = self._free.pop()
        self._num_holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Count one more holder of a page that is held."""
        assert self._num_holders[page] > 0, f"page {page} is free"
        self._num_holders[page] += 1

    def release(self, page: int) -> None:
        """Count one holder less; the last one frees the page."""
        assert self._num_holders[page] > 0, f"page {page} is free already"
        self._num_holders[page] -= 1
        if self._num_holders[page] == 0:
            self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Return whether a page has several holders, so that none may write into it."""
        return self._num_holders[page] > 1


class PageTable:
    """The pages of one sequence, in the order of its tokens."""

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        """Start without pages.

        Args:
            pool: Where pages come from.
            page_tokens: Tokens L of a page.
        """
        self._pool, self._page_tokens = pool, page_tokens
        self.pages: list[int] = []
        self.num_tokens = 0
        """Tokens that have a place."""

    def num_wanted(self, num_tokens: int) -> int:
        """Return how many free pages `grow` takes."""
        end = -(-(self.num_tokens + num_tokens) // self._page_tokens)
        return end - len(self.pages) + (num_tokens > 0 and self._writes_into_shared())

    def grow(self, num_tokens: int) -> dict[int, int]:
        """Make places for more tokens.

        Args:
            num_tokens: How many; the pool has `num_wanted` free pages.

        Returns:
            The copy to make before they are written, if the last page was shared: its source by
            its destination.
        """
        copies: dict[int, int] = {}
        if num_tokens > 0 and self._writes_into_shared():
            shared = self.pages[-1]
            self.pages[-1] = self._pool.take()
            self._pool.release(shared)
            copies[self.pages[-1]] = shared
        self.num_tokens += num_tokens
        while len(self.pages) * self._page_tokens < self.num_tokens:
            self.pages.append(self._pool.take())
        return copies

    def fork(self, num_tokens: int) -> "PageTable":
        """Return a table that shares the first tokens; whoever writes behind them first copies.

        Args:
            num_tokens: Tokens to share, at most those of this table.
        """
        assert num_tokens <= self.num_tokens, "a fork has no tokens of its own"
        table = PageTable(self._pool, self._page_tokens)
        table.pages = self.pages[: -(-num_tokens // self._page_tokens)]
        table.num_tokens = num_tokens
        for page in table.pages:
            self._pool.hold(page)
        return table

    def release(self) -> None:
        """Give all pages back."""
        for page in self.pages:
            self._pool.release(page)
        self.pages, self.num_tokens = [], 0

    def slots(self, start: int, end: int) -> NDArray[np.int64]:
        """Return the places of tokens `start` to `end` - 1: page * L + place within it."""
        first, last = start // self._page_tokens, -(-end // self._page_tokens)
        pages = np.array(self.pages[first:last], dtype=np.int64)
        tokens = np.arange(start, end)
        page = pages[tokens // self._page_tokens - first]
        return page * self._page_tokens + tokens % self._page_tokens

    def _writes_into_shared(self) -> bool:
        """Return whether the next token lies in a page that others hold too."""
        is_partial = self.num_tokens % self._page_tokens > 0
        return is_partial and self._pool.is_shared(self.pages[-1])

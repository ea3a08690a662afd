"""Contexts by index: of a pool's slots, or of the environments of one mode. Knows page ids."""
from typing import Optional, Sequence, Union

import numpy as np

from .pages import NULL_PAGE, PageAllocator, Rows


class Contexts:
    """One context for each index, which holds a reference to each of its pages: tables of pages
    ``[size, context_pages]``, and pages in use ``[size]``, 0 where there is none."""

    def __init__(self, pages: PageAllocator, size: int, context_pages: int) -> None:
        self._pages = pages
        self.tables = np.full((size, context_pages), NULL_PAGE, dtype=np.int64)
        self.counts = np.zeros(size, dtype=np.int64)

    def find(self, indices: Union[Sequence[int], np.ndarray]) -> Rows:
        """Copies of some contexts."""
        index = np.asarray(indices, dtype=np.int64)
        return self.tables[index], self.counts[index]

    def store(self, indices: Sequence[int], rows: Rows) -> None:
        """Replace some contexts, each index once, and give the pages of those before back."""
        index = np.asarray(indices, dtype=np.int64)
        replaced = self.tables[index] if self.counts[index].any() else None
        self._pages.retain(rows[0])
        self.tables[index], self.counts[index] = rows
        if replaced is not None:
            self._pages.release(replaced)

    def clear(self, index: Optional[int] = None) -> None:
        """Forget one context, or all."""
        cleared = slice(None) if index is None else slice(index, index + 1)
        if self.counts[cleared].any():
            self._pages.release(self.tables[cleared])
            self.tables[cleared], self.counts[cleared] = NULL_PAGE, 0

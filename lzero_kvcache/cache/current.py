"""The newest root of every environment of one mode. Tables of pages ``[B, R]``, pages in use ``[B]``."""
from typing import Optional, Sequence

import numpy as np

from .pages import NULL_PAGE, PageAllocator, Rows


class CurrentRoots:
    """One context for each environment; storing a newer one gives the older one's pages back."""

    def __init__(self, pages: PageAllocator, environments: int, width: int) -> None:
        self._pages = pages
        self.tables = np.full((environments, width), NULL_PAGE, dtype=np.int64)
        self.counts = np.zeros(environments, dtype=np.int64)

    def find(self, env_ids: Sequence[int]) -> Rows:
        """Copies of some environments' contexts; 0 pages where there is none."""
        index = np.asarray(env_ids)
        return self.tables[index], self.counts[index]

    def store(self, env_ids: Sequence[int], rows: Rows) -> None:
        """Replace some environments' contexts; no environment twice."""
        index = np.asarray(env_ids)
        replaced = self.tables[index]
        self._pages.retain(rows[0])
        self.tables[index], self.counts[index] = rows
        self._pages.release(replaced)

    def clear(self, env_id: Optional[int] = None) -> None:
        """Forget one environment's context, or all."""
        index = slice(None) if env_id is None else slice(env_id, env_id + 1)
        self._pages.release(self.tables[index])
        self.tables[index], self.counts[index] = NULL_PAGE, 0

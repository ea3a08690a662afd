"""Page ids with reference counts, and leases that own them. Knows numbers only, no tensors.

Page ids are int64. Tables of them may have any shape; where they are padded, it is with the null page.
"""
from collections import deque
from typing import Any, Callable, Deque, List, Optional, Tuple

import numpy as np

from ..copies import Turns

Rows = Tuple[np.ndarray, np.ndarray]
"""``(tables, counts)``: page ids ``[B, R]`` (int64, left-aligned, padded with the null page), pages in use ``[B]``."""

NULL_PAGE = 0
"""Padding of page tables; it exists in every slab, is never allocated and never written."""

SCRATCH_PAGE = 1
"""The page to which rows that only fill up a batch write; never allocated and never read."""

RESERVED_PAGES = 2


class OutOfPages(RuntimeError):
    """More pages were asked for than are free; the owner grows the slab or evicts, and asks again."""


class PageAllocator:
    """
    Hands out page ids and counts who refers to them; a page is free when nobody does. The capacity is how many pages
    there are, the reserved ones included.
    """

    def __init__(self, capacity: int) -> None:
        self.references = np.zeros(capacity, dtype=np.int64)
        self.references[:RESERVED_PAGES] = 1
        self._stack = np.arange(capacity - 1, RESERVED_PAGES - 1, -1, dtype=np.int64)
        self._top = capacity - RESERVED_PAGES
        self._mark = np.zeros(capacity, dtype=np.int64)
        self.returned: Deque[np.ndarray] = deque()
        self.turns = Turns()  # searches of several threads take pages and give them back

    @property
    def capacity(self) -> int:
        """How many pages there are, the reserved ones included."""
        return len(self.references)

    @property
    def free(self) -> int:
        """How many pages can be allocated."""
        self.collect()
        return self._top

    @property
    def used(self) -> int:
        """How many pages have a reference, without the reserved ones."""
        return self.capacity - RESERVED_PAGES - self.free

    def allocate(self, count: int) -> np.ndarray:
        """Take free pages ``[count]``, each with one reference; where fewer are free, :class:`OutOfPages`."""
        with self.turns.lock:
            if count > self.free:
                raise OutOfPages(f'{count} pages wanted, {self._top} of {self.capacity} free')
            pages = self._stack[self._top - count:self._top][::-1].copy()
            self.references[pages] = 1
            self._top -= count
            return pages

    def retain(self, pages: np.ndarray) -> None:
        """Add one reference for each mention of a page."""
        with self.turns.lock:
            np.add.at(self.references, pages.ravel(), 1)
            self.references[NULL_PAGE] = 1

    def release(self, pages: np.ndarray) -> None:
        """Take one reference away for each mention of a page; those without any are free again."""
        pages = pages.ravel()
        # Find each page once, without sorting: of equal pages, only the last one finds its own mark.
        order = np.arange(len(pages))
        with self.turns.lock:
            self._mark[pages] = order
            distinct = pages[self._mark[pages] == order]
            np.subtract.at(self.references, pages, 1)  # from here on nothing can raise
            self.references[NULL_PAGE] = 1
            freed = distinct[self.references[distinct] == 0]
            self._stack[self._top:self._top + len(freed)] = freed[::-1]
            self._top += len(freed)

    def lease(self, take: Optional[Callable[[int], np.ndarray]] = None) -> 'Lease':
        """A new owner of pages, which ``take`` gets for it; by default :meth:`allocate`."""
        return Lease(self, self.allocate if take is None else take)

    def collect(self) -> None:
        """Release the tables that leases have returned, all in one call."""
        if not self.returned:
            return
        with self.turns.lock:
            tables = list(self.returned)
            if tables:
                self.release(np.concatenate([table.ravel() for table in tables]))
            for _ in tables:
                self.returned.popleft()

    def grow(self, capacity: int) -> None:
        """Have so many pages; existing ones keep their ids and references."""
        with self.turns.lock:
            added = np.arange(capacity - 1, self.capacity - 1, -1, dtype=np.int64)
            free = np.concatenate([added, self._stack[:self._top]])
            grown = PageAllocator(capacity)
            grown.references[:self.capacity] = self.references
            self._stack, self._mark, self.references = grown._stack, grown._mark, grown.references
            self._stack[:len(free)], self._top = free, len(free)


class Lease:
    """
    The pages of one step or of one search. It gives them back when it ends: by ``release``, at the end of a ``with``,
    or at the latest when Python deletes it.
    """

    def __init__(self, pages: PageAllocator, take: Callable[[int], np.ndarray]) -> None:
        self._held: List[np.ndarray] = []
        self._pages, self._take = pages, take

    def allocate(self, count: int) -> np.ndarray:
        """New pages ``[count]``; what takes them may grow or evict before it raises :class:`OutOfPages`."""
        self._held.append(self._take(count))
        return self._held[-1]

    def hold(self, tables: np.ndarray) -> None:
        """Add a reference for each mention of a page, so that evictions do not free it."""
        kept = tables.copy()
        self._pages.retain(kept)
        self._held.append(kept)

    def release(self) -> None:
        """Give all pages back; to do it again does no harm."""
        self._leave()
        self._pages.collect()

    def __enter__(self) -> 'Lease':
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # The garbage collector may close a context in the middle of an allocation, when no page may be released; the
        # next allocation releases these.
        self._leave() if kind is GeneratorExit else self.release()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        held, self._held = self._held, []
        self._pages.returned.extend(held)


def extend(rows: Rows, pages: np.ndarray) -> Rows:
    """The contexts after a step: its page ``[B]`` is appended to each, and a full window drops its first one."""
    tables, counts = rows
    width = tables.shape[1]
    child = np.zeros((len(pages), width + 1), dtype=np.int64)
    child[:, :width] = tables
    child[np.arange(len(pages)), counts] = pages
    full = counts == width
    shifted = np.where(full[:, None], child[:, 1:], child[:, :width]) if full.any() else child[:, :width]
    return shifted, np.minimum(counts + 1, width)

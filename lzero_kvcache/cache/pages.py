"""Page ids with reference counts, and leases that own them. Knows numbers only, no tensors."""
from collections import deque
from typing import Any, Callable, Deque, List, Optional, Tuple

import numpy as np

Rows = Tuple[np.ndarray, np.ndarray]
"""``(tables, counts)``: page ids ``[B, R]`` (int64, left-aligned, padded with the null page), pages in use ``[B]``."""

NULL_PAGE = 0
"""Padding of page tables; it exists in every slab, is never allocated and never written."""

SCRATCH_PAGE = 1
"""What the rows that only fill up a batch write to; never allocated and never read."""

RESERVED_PAGES = 2


class OutOfPages(RuntimeError):
    """
    Overview:
        More pages were asked for than are free; the owner grows the slab or evicts, and asks again.
    """


class PageAllocator:
    """
    Overview:
        Hands out page ids and counts who refers to them. A page is free when nobody does.
    Arguments:
        - capacity (:obj:`int`): How many pages there are, the reserved ones included.
    """

    def __init__(self, capacity: int) -> None:
        self.references = np.zeros(capacity, dtype=np.int64)
        self.references[:RESERVED_PAGES] = 1
        self._stack = np.arange(capacity - 1, RESERVED_PAGES - 1, -1, dtype=np.int64)
        self._top = capacity - RESERVED_PAGES
        self._returned: Deque[np.ndarray] = deque()

    def lease(self, take: Optional[Callable[[int], np.ndarray]] = None) -> 'Lease':
        """A new owner of pages, which are taken by ``take``, here unless said otherwise."""
        return Lease(self, self.allocate if take is None else take)

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
        """How many pages somebody refers to, the reserved ones apart."""
        return self.capacity - RESERVED_PAGES - self.free

    def allocate(self, count: int) -> np.ndarray:
        """
        Overview:
            Take ``count`` free pages, each with one reference.
        Arguments:
            - count (:obj:`int`): How many.
        Returns:
            - pages (:obj:`np.ndarray`): Page ids ``[count]``.
        Raises:
            - OutOfPages: Fewer are free; nothing was taken.
        """
        if count > self.free:
            raise OutOfPages(f'{count} pages wanted, {self._top} of {self.capacity} free')
        self._top -= count
        pages = self._stack[self._top:self._top + count][::-1].copy()
        self.references[pages] = 1
        return pages

    def retain(self, pages: np.ndarray) -> None:
        """
        Overview:
            Add one reference for each mention of a page; padding is ignored.
        Arguments:
            - pages (:obj:`np.ndarray`): Page ids of any shape.
        """
        np.add.at(self.references, pages.ravel(), 1)
        self.references[NULL_PAGE] = 1

    def release(self, pages: np.ndarray) -> None:
        """
        Overview:
            Take one reference away for each mention of a page; those without any are free again.
        Arguments:
            - pages (:obj:`np.ndarray`): Page ids of any shape.
        """
        pages = pages.ravel()
        np.subtract.at(self.references, pages, 1)
        self.references[NULL_PAGE] = 1
        touched = np.zeros(self.capacity, dtype=bool)
        touched[pages] = True
        pages = np.flatnonzero(touched & (self.references == 0))
        self._stack[self._top:self._top + len(pages)] = pages[::-1]
        self._top += len(pages)

    def give_back(self, tables: List[np.ndarray]) -> None:
        """Leave tables to be released by :meth:`collect`; safe at any moment, as garbage collection needs it."""
        self._returned.extend(tables)

    def collect(self) -> None:
        """Release what was given back; what could not be released stays for the next time."""
        while self._returned:
            self.release(self._returned[0])
            self._returned.popleft()

    def grow(self, capacity: int) -> None:
        """
        Overview:
            Add pages; existing ones keep their ids and references.
        Arguments:
            - capacity (:obj:`int`): The new number of pages, the reserved ones included.
        """
        added = np.arange(capacity - 1, self.capacity - 1, -1, dtype=np.int64)
        stack = np.empty(capacity - RESERVED_PAGES, dtype=np.int64)
        stack[:len(added)] = added
        stack[len(added):len(added) + self._top] = self._stack[:self._top]
        self._stack, self._top = stack, self._top + len(added)
        self.references = np.concatenate([self.references, np.zeros(len(added), dtype=np.int64)])


class Lease:
    """
    The pages of one step, of one search, or of an entry in the making. They are given back when the lease ends: by
    ``release``, at the end of a ``with``, or at the latest when nobody refers to the lease any more.
    """

    def __init__(self, pages: PageAllocator, take: Callable[[int], np.ndarray]) -> None:
        self._held: List[np.ndarray] = []
        self._pages, self._take = pages, take

    def allocate(self, count: int) -> np.ndarray:
        """New pages ``[count]``; their owner may grow or evict to have them, and raises :class:`OutOfPages`."""
        self._held.append(self._take(count))
        return self._held[-1]

    def hold(self, tables: np.ndarray) -> None:
        """One more reference to each page that is mentioned, so that it stays as it is whatever is evicted."""
        kept = tables.copy()
        self._pages.retain(kept)
        self._held.append(kept)

    def hand_over(self) -> None:
        """Leave all pages, with their references, to an entry."""
        self._held = []

    def release(self) -> None:
        """Give all pages back; again and again does no harm."""
        self._leave()
        self._pages.collect()

    def __enter__(self) -> 'Lease':
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # Garbage may be collected in the middle of anything, an allocation too: the pages are only left to be released.
        self._leave() if kind is GeneratorExit else self.release()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        held, self._held = self._held, []
        self._pages.give_back(held)


def extend(rows: Rows, pages: np.ndarray) -> Rows:
    """
    Overview:
        The contexts that a step leaves: its page appended, and the first one dropped where the window is full.
    Arguments:
        - rows (:obj:`Rows`): The contexts before, tables ``[B, R]`` and counts ``[B]``.
        - pages (:obj:`np.ndarray`): The page that each row's step writes ``[B]``.
    Returns:
        - rows (:obj:`Rows`): The contexts after, of the same shapes.
    """
    tables, counts = rows
    width = tables.shape[1]
    child = np.zeros((len(pages), width + 1), dtype=np.int64)
    child[:, :width] = tables
    child[np.arange(len(pages)), counts] = pages
    full = counts == width
    shifted = np.where(full[:, None], child[:, 1:], child[:, :width]) if full.any() else child[:, :width]
    return shifted, np.minimum(counts + 1, width)

"""Page ids with reference counts. Knows numbers only: which tensor a page is in is the slab's matter."""
from typing import Tuple

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

    @property
    def capacity(self) -> int:
        """How many pages there are, the reserved ones included."""
        return len(self.references)

    @property
    def free(self) -> int:
        """How many pages can be allocated."""
        return self._top

    @property
    def used(self) -> int:
        """How many pages somebody refers to, the reserved ones apart."""
        return self.capacity - RESERVED_PAGES - self._top

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
        if count > self._top:
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

"""The contexts of one search by node: (index in the search path, row). Knows page ids.

``B`` rows, ``S`` simulations. Index 0 of the search path is the roots, index ``i + 1`` what simulation ``i`` made.
"""
import numpy as np

from .pages import Rows, extend


class NodeTable:
    """Begins with the roots, tables ``[B, R]`` and counts ``[B]``, and the pages of all nodes to come ``[S x B]``."""

    def __init__(self, roots: Rows, pages: np.ndarray) -> None:
        rows, width = roots[0].shape
        self.pages = pages.reshape(-1, rows)
        self._tables = np.empty((len(self.pages) + 1, rows, width), dtype=np.int64)
        self._counts = np.empty((len(self.pages) + 1, rows), dtype=np.int64)
        self._tables[0], self._counts[0] = roots
        self._longest_root = int(roots[1].max())

    def expand(self, simulation: int, path: np.ndarray, rows: np.ndarray) -> Rows:
        """
        The contexts of the nodes ``(path, rows)``, each ``[B]``, that a simulation expands; those of their children are
        noted. The pages to write are ``pages[simulation]``.
        """
        parents = self._tables[path, rows], self._counts[path, rows]
        self._tables[simulation + 1], self._counts[simulation + 1] = extend(parents, self.pages[simulation])
        return parents

    def longest(self, simulation: int) -> int:
        """A bound on the pages of the contexts that a simulation expands, without looking at them."""
        return min(self._tables.shape[2], self._longest_root + simulation)

"""Memory of searches in arrays: each has some to itself while it runs, and leaves it to the next of its size."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np

from ..config import MIB


class Space(NamedTuple):
    """What one search at a time works in."""
    tree: Any
    latents: np.ndarray  # [B, N, E], of the nodes of a reanalysis
    slab: np.ndarray  # the pages of a reanalysis

    @property
    def bytes(self) -> int:
        arrays = [*self.tree, self.latents, self.slab]
        return sum(array.nbytes for array in arrays)


class Spaces:
    """The memory of one model's searches, which may run in several threads."""

    def __init__(self) -> None:
        self._free: Dict[Tuple[int, ...], List[Space]] = {}
        self._leased: Dict[int, Space] = {}

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy begins without

    @property
    def memory_mb(self) -> float:
        free = [space for spaces in list(self._free.values()) for space in spaces]
        return sum(space.bytes for space in [*free, *list(self._leased.values())]) / MIB

    @contextmanager
    def lease(self, size: Tuple[int, ...], rows: int, make: Callable[[], Space]) -> Iterator[Space]:
        """Memory for so many rows at least."""
        free = self._free.setdefault(size, [])
        try:
            space = free.pop()
        except IndexError:
            space = make()
        if len(space.tree.depth) < rows:
            space = make()
        self._leased[id(space)] = space
        try:
            yield space
        finally:
            del self._leased[id(space)]
            free.append(space)

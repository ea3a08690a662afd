"""Memory of searches on the CPU: each search or thread leases some for itself; the next of the same size reuses it."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np

from ..config import MIB


class SearchMemory(NamedTuple):
    """Memory of one search at a time."""
    tree: Any
    latents: np.ndarray  # [B, N, E], of the nodes of a reanalysis
    slab: np.ndarray  # the pages of a reanalysis

    @property
    def bytes(self) -> int:
        arrays = [*self.tree, self.latents, self.slab]
        return sum(array.nbytes for array in arrays)


class Spaces:
    """Memory of one model, leased by size; several threads may lease at once."""

    def __init__(self) -> None:
        self._free: Dict[Tuple[int, ...], List[Any]] = {}
        self._leased: Dict[int, Any] = {}

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy begins without

    @property
    def memory_mb(self) -> float:
        free = [part for parts in list(self._free.values()) for part in list(parts)]
        return sum(part.bytes for part in [*free, *list(self._leased.values())]) / MIB

    @contextmanager
    def lease(self, size: Tuple[int, ...], count: int, make: Callable[[], Any],
              fits: Callable[[Any], bool] = lambda part: True) -> Iterator[List[Any]]:
        """Lease ``count`` parts of a size: free ones, or new ones. Free ones that do not fit are dropped."""
        free = self._free.setdefault(size, [])
        leased = []
        for _ in range(count):
            try:
                part = free.pop()
            except IndexError:
                part = None
            leased.append(part if part is not None and fits(part) else make())
        self._leased.update((id(part), part) for part in leased)
        try:
            yield leased
        finally:
            for part in leased:
                del self._leased[id(part)]
            free += leased

"""Memory on the CPU that steps and searches lease, and that the next ones of the same size reuse."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Hashable, Iterator, List

from ..config import MIB
from ..copies import MadeAnew


class MemoryPool(MadeAnew):
    """Memory of one model, leased by size; several threads may lease at once."""

    def __init__(self) -> None:
        self._free: Dict[Hashable, List[Any]] = {}
        self._leased: Dict[int, Any] = {}

    @property
    def memory_mb(self) -> float:
        free = [part for parts in list(self._free.values()) for part in list(parts)]
        return sum(part.nbytes for part in [*free, *list(self._leased.values())]) / MIB

    @contextmanager
    def lease(self, size: Hashable, count: int, make: Callable[[], Any],
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

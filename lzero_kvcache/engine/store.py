"""The memory behind a manager: its slab, and what else counts as the cache's memory."""
from typing import Any, List

import torch

from ..cache.pages import OutOfPages
from ..config import MIB
from .slab import Slab


class PageStore:
    """The slab of one manager, and all other memory that counts as its own."""

    def __init__(self, slab: Slab, advice: str) -> None:
        self.slab = slab
        self._advice = advice  # what to do where memory runs out
        self.counted: List[Any] = []  # windows, graphs, trees: with a memory_mb, and captures if they are captured

    @property
    def page_bytes(self) -> int:
        return self.slab.page_bytes

    @property
    def memory_mb(self) -> float:
        return self.slab.memory_mb + sum(part.memory_mb for part in self.counted)

    @property
    def captures(self) -> int:
        """How often something was captured as CUDA graphs."""
        return sum(getattr(part, 'captures', 0) for part in self.counted)

    def ready(self, pages: int, device: torch.device) -> Slab:
        """The slab on a device, with room for so many pages, or ``OutOfPages``."""
        try:
            self.slab.ensure(pages, device)
        except RuntimeError as error:
            if not any(words in str(error).lower() for words in ('out of memory', "can't allocate")):
                raise
            raise OutOfPages(
                f'no memory on {device} for {pages} pages, {pages * self.slab.page_bytes / MIB:.1f} MiB: {self._advice}'
            ) from error
        return self.slab

    def grow(self, pages: int) -> bool:
        """Make room for more pages; False where memory ran out and everything stays as it was."""
        if self.slab.data is None:
            return True
        try:
            self.ready(pages, self.slab.data.device)
        except OutOfPages:
            return False
        return True

"""The parts that all inference of one model shares: engine, pages, a step's weights, lost contexts, keys."""
from typing import Any, Dict, List, NamedTuple

import numpy as np
import torch
import xxhash

from ..cache.base import PagedCacheManager
from ..cache.pages import Lease, Rows
from ..engine.step import Engine
from ..engine.store import PageStore
from ..engine.weights import Source, Weights
from .guard import NanGuard
from .open_steps import OpenStep, OpenSteps
from .timesteps import observed_at
from .timing import Timing


class Shared(NamedTuple):
    """The parts that all inference of one model shares."""
    engine: Engine
    source: Source
    manager: PagedCacheManager
    store: PageStore
    guard: NanGuard
    open: OpenSteps
    timings: Dict[str, Timing]

    def slab(self) -> Any:
        """The slab, with as many pages as the manager has."""
        return self.store.ready(self.manager.page_capacity, self.source.device())

    def weights_of(self, step: OpenStep) -> Weights:
        """The current weights, read once for a step."""
        if step.weights is None:
            step.weights = self.source.read(False)
        return step.weights

    def take_pages(self, lease: Lease, rows: Rows, lost: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
        """Give each of the ``lost [K]`` rows a context of one page. Returns the inputs that rebuild these contexts in
        one forward pass: their pages, their observations' rotary positions and the rows, ``[3, K]``."""
        tables, counts = rows
        if not len(lost):
            return np.zeros((3, 0), dtype=np.int64)
        pages = lease.allocate(len(lost))
        tables[lost, 0], counts[lost] = pages, 1
        return np.stack([pages, observed_at(timesteps[lost]) % max(1, self.engine.geometry.rotary_positions), lost])


def hash_rows(latent: np.ndarray) -> List[int]:
    """The key of each row ``[B, E]``: XXH3's 64 bits of its bytes."""
    return list(map(xxhash.xxh3_64_intdigest, latent))


def zero_for_nan(part: torch.Tensor) -> torch.Tensor:
    """Replace nan and inf by 0: LightZero's trees cannot handle them."""
    return part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

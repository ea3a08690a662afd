"""Whole searches on a GPU. The CPU waits for nothing between the first simulation and the last: one copy sends the
roots, and one brings visits and values back.
"""
import logging
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Callable, Dict, Iterator, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..cache.stats import Timing
from ..engine.graphs import Graphs
from ..engine.slab import Slab
from ..engine.step import Engine
from ..engine.store import PageStore
from ..engine.transfer import to_cpu
from ..engine.weights import Source, Weights
from .device_space import GrownReanalysis, Reanalysis, Space
from .guard import NanGuard
from .tree_arrays import padded
from .whole import Found, Problem, WholeSearch, replayed

logger = logging.getLogger(__name__)

ROWS_APART = 8
"""Searches are captured for multiples of so many rows: products of fewer rows are no faster."""

MOST_ROWS = 256
"""Rows of a reanalysis that are searched at a time."""


class _Spaces(Graphs):
    """The spaces of one model, those that could not be captured among them."""

    @property
    def memory_mb(self) -> float:
        return sum(space.memory_mb for space in list(self.kept.values()))


class DeviceSearch(WholeSearch):
    """On a GPU."""

    def __init__(self, engine: Engine, source: Source, manager: PagedCacheManager, storage: PageStore, guard: NanGuard,
                 timings: Dict[str, Timing], matmul: str) -> None:
        if matmul != 'float32':
            source = source._replace(read=partial(_read, source, matmul))
        super().__init__(source, manager, storage, guard, timings)
        self._engine = engine
        self._spaces = _Spaces('A search cannot be captured here', 'it is launched from Python')
        storage.beside.append(self._spaces)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        device = self._source.device()
        with self._spaces.lock, torch.cuda.device(device) if device.type == 'cuda' else nullcontext():
            yield  # Triton launches on the current device

    def _rows_at_a_time(self, rows: int, within_limit: int) -> int:
        most = min(MOST_ROWS, max(ROWS_APART, within_limit - within_limit % ROWS_APART))
        count = -(-rows // most)
        return -(-rows // count)  # all need the same memory

    def _from_roots(self, served: Any, problem: Problem, slab: Slab,
                    pages: np.ndarray) -> Tuple[Found, np.ndarray, float]:
        (tables, counts), rows = served.roots, len(served.env_ids)
        width = tables.shape[1]
        make = partial(Space, self._engine, self._source, slab, width)
        space = self._space(problem, rows, served.addresses, (width, ), make)
        _give(space, problem, served.timesteps)
        given = space.given
        given.tables[:rows], given.counts[:rows] = tables, counts
        given.pages[:problem.simulations, :rows] = pages
        return (*_search(space, problem, rows, replayed(served)), 0.)

    def _from_states(self, problem: Problem, latents: np.ndarray, timesteps: np.ndarray, addresses: Tuple[int, ...],
                     grows: bool) -> Tuple[Found, np.ndarray]:
        rows, width = len(latents), self._manager.width if grows else 1
        kind = GrownReanalysis if grows else Reanalysis
        space = self._space(
            problem, rows, addresses, (kind, width), partial(kind, self._engine, self._source, width))
        _give(space, problem, timesteps)
        space.given.latents[:rows] = latents
        return _search(space, problem, rows, None)

    def _space(self, problem: Problem, rows: int, addresses: Tuple[int, ...], kind: Tuple[Any, ...],
               make: Callable[[Problem, int], Any]) -> Any:
        """A space that has room for the search, or else a new one, which is captured. ``kind`` and the problem tell
        which searches can share one."""
        spaces = self._spaces
        addresses += (self._storage.slab.address,)
        kind += (problem.slots, problem.action_size, *sorted(problem.rules.items()))
        space = spaces.find(
            rows, addresses, lambda others: others[0] >= problem.simulations and others[1:] == kind
        )
        if space is None:
            spaces.make_room()
            rows = -(-rows // ROWS_APART) * ROWS_APART
            space = make(problem, rows)
            if self._source.device().type == 'cuda' and spaces.usable:
                spaces.attempt(partial(_capture, space))
            spaces.kept[(rows, problem.simulations) + kind] = space
        return space


def _capture(space: Space) -> Space:
    space.capture()
    logger.info(f'Captured a simulation for {space.rows} rows ({space.memory_mb:.1f} MiB with the trees)')
    return space


def _read(source: Source, matmul: str, captured: bool) -> Weights:
    from ..engine.linear_kernels import computed_in

    return computed_in(source.read(captured), matmul)


def _search(space: Space, problem: Problem, rows: int, trace: Any) -> Tuple[Found, np.ndarray]:
    """Search with the inputs in ``space.given``, and note each simulation if there is a trace. Returns what was found,
    and ``broken [2, B]``."""
    space.begin()
    for _ in range(problem.simulations):
        space.simulate()
        if trace is not None:
            _note(trace, space, rows)
    visits, values, draws, broken = space.found(rows)
    found = [row[:len(legal) or problem.slots] for row, legal in zip(visits.tolist(), problem.legal)]
    return (found, values.tolist(), draws.tolist() if space.sampled else None), broken


def _give(space: Space, problem: Problem, timesteps: np.ndarray) -> None:
    """Write the inputs of a search to ``space.given``, its pages apart."""
    rows, given = len(timesteps), space.given
    if space.rows > rows:
        space.empty_rows(rows)
    given.key.view(np.uint32)[:] = problem.seed & 0xFFFFFFFF, problem.number & 0xFFFFFFFF
    given.timesteps[:rows], given.reward[:rows] = timesteps, problem.rewards
    if space.sampled:  # whose scores have no use for noise
        given.logits[:rows] = problem.logits
    else:
        _give_priors(given, problem, rows)


def _give_priors(given: Any, problem: Problem, rows: int) -> None:
    every = range(problem.slots)
    given.order[:rows] = order = padded([legal or every for legal in problem.legal], problem.slots, -1, np.int64)
    taken = order >= 0
    slots = np.maximum(order, 0)
    logits = np.where(taken, np.take_along_axis(np.asarray(problem.logits, np.float32), slots, 1), -np.inf)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    priors = powers / powers.sum(1, keepdims=True)
    weight = np.float32(problem.noise_weight)
    mixed = priors * (1 - weight) + problem.padded_noises() * weight
    given.prior[:rows] = 0
    where = np.nonzero(taken)
    given.prior[where[0], order[where]] = mixed[where]


def _note(trace: Any, space: Space, rows: int) -> None:
    """Note one simulation for validation."""
    predicted = to_cpu(torch.nan_to_num(space.predicted, 0.0, 0.0, 0.0)[:rows])
    parts = space.parents, space.actions, space.depths
    taken = [to_cpu(part[:rows].clone()) for part in parts]
    trace.note_scalars(*taken, predicted[:, 0], predicted[:, 1], predicted[:, 2:])

"""Whole searches on a GPU: trees as tensors, and the model's steps below them, without the CPU from a search's first
simulation to its last. Roots come to the device in one copy, and visits and values leave it in one.
"""
import logging
import threading
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..cache.stats import Timing
from ..engine.graphs import MAX_MOVES, make_room, smallest_fitting
from ..engine.slab import Slab
from ..engine.step import Engine
from ..engine.store import PageStore
from ..engine.transfer import to_cpu
from ..engine.weights import Source, Weights
from .arrays import padded
from .device_space import GrownReanalysis, Reanalysis, Space
from .guard import NanGuard
from .whole import Found, Problem, WholeSearch, replayed

logger = logging.getLogger(__name__)

MAX_SPACES = 8
"""Searches of so many sizes are captured; then the one that was not used for longest goes."""

ROWS_APART = 8
"""Searches are captured for multiples of so many rows, since a product of fewer is no quicker."""

MOST_ROWS = 256
"""Rows of a reanalysis that are searched at a time."""


class _Spaces:
    """The spaces of one model, the newest last; one search at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.kept: Dict[Tuple[Any, ...], Space] = {}
        self.addresses: Tuple[int, ...] = ()
        self.moves = 0
        self.captures = 0  # so far, those that went among them
        self.usable = True

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy begins without

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
        self._spaces = _Spaces()
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
        space.given.tables[:rows], space.given.counts[:rows] = tables, counts
        space.given.pages[:problem.simulations, :rows] = pages
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
        """A space of some kind that has room for a search; a new one is captured."""
        spaces = self._spaces
        addresses += (self._storage.slab.address, )
        if addresses != spaces.addresses:
            spaces.moves += bool(spaces.kept)
            spaces.kept.clear()
            spaces.addresses = addresses
        kind += (problem.slots, problem.action_size, *sorted(problem.rules.items()))
        found = smallest_fitting(
            spaces.kept, rows, lambda others: others[0] >= problem.simulations and others[1:] == kind)
        if found is not None:
            return found
        make_room(spaces.kept, MAX_SPACES)
        rows = -(-rows // ROWS_APART) * ROWS_APART
        space = make(problem, rows)
        if self._source.device().type == 'cuda' and spaces.usable:
            self._capture(space)
        spaces.kept[(rows, problem.simulations) + kind] = space
        return space

    def _capture(self, space: Space) -> None:
        reason: Optional[Any] = 'its storage keeps moving' if self._spaces.moves >= MAX_MOVES else None
        try:
            if reason is None:
                space.capture()
                self._spaces.captures += 1
                logger.info(
                    f'Captured a simulation for {space.rows} rows ({space.memory_mb:.1f} MiB with the trees)'
                )
        except Exception as error:  # Triton's, and its compiler's, have types of their own
            reason = str(error).split('\n', maxsplit=1)[0]
        if reason is not None:
            self._spaces.usable = False
            logger.warning(f'A search cannot be captured here ({reason}): it is launched from Python from now on')


def _read(source: Source, matmul: str, captured: bool) -> Weights:
    from ..engine.products import computed_in

    return computed_in(source.read(captured), matmul)


def _search(space: Space, problem: Problem, rows: int, trace: Any) -> Tuple[Found, np.ndarray]:
    """Run what was given to a space, and note each simulation if there is a trace; returns what was found, and how many
    predictions were no numbers, with the depth of the first ``[2, B]``."""
    space.begin()
    for _ in range(problem.simulations):
        space.simulate()
        if trace is not None:
            _note(trace, space, rows)
    visits, values, draws, broken = space.found(rows)
    found = [row[:len(legal) or problem.slots] for row, legal in zip(visits.tolist(), problem.legal)]
    return (found, values.tolist(), draws.tolist() if space.sampled else None), broken


def _give(space: Space, problem: Problem, timesteps: np.ndarray) -> None:
    """Lay out what a search begins with, but for its pages."""
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
    """What validation needs of one simulation."""
    predicted = to_cpu(torch.nan_to_num(space.predicted, 0.0, 0.0, 0.0)[:rows])
    parts = space.parents, space.actions, space.depths
    taken = [to_cpu(part[:rows].clone()) for part in parts]
    trace.note_scalars(*taken, predicted[:, 0], predicted[:, 1], predicted[:, 2:])

"""Searches in arrays on a GPU. The CPU waits for nothing between the first simulation and the last: one copy sends the
roots, and one brings visits and values back. Triton is imported with the first search.
"""
import logging
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Callable, Iterator, Tuple

import numpy as np
import torch

from ..engine.graphs import Graphs
from ..engine.slab import Slab
from ..engine.transfer import to_cpu
from .array_search import ArraySearch, Found, Problem, trace_of
from .gpu_memory import GpuMemory, GrownReanalysis, Reanalysis
from .shared import Shared
from .tree_arrays import padded

logger = logging.getLogger(__name__)

ROWS_APART = 8
"""Searches are captured for multiples of so many rows: products of fewer rows are no faster."""

MOST_ROWS = 256
"""Rows of a reanalysis that are searched at a time."""


class _Memories(Graphs):
    """The memory of one model's searches, of those that could not be captured too."""

    @property
    def memory_mb(self) -> float:
        return sum(memory.memory_mb for memory in list(self.kept.values()))


class GpuSearch(ArraySearch):
    """On a GPU."""

    def __init__(self, shared: Shared, matmul: str) -> None:
        super().__init__(shared)
        self._matmul = matmul
        self._memories = _Memories('A search cannot be captured here', 'it is launched from Python')
        shared.store.counted.append(self._memories)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        device = self._shared.source.device()
        with self._memories.lock, torch.cuda.device(device) if device.type == 'cuda' else nullcontext():
            yield  # Triton launches on the current device

    def _rows_at_a_time(self, rows: int, within_limit: int) -> int:
        most = min(MOST_ROWS, max(ROWS_APART, within_limit - within_limit % ROWS_APART))
        count = -(-rows // most)
        return -(-rows // count)  # all need the same memory

    def _from_roots(self, step: Any, problem: Problem, slab: Slab,
                    pages: np.ndarray) -> Tuple[Found, np.ndarray, float]:
        (tables, counts), rows = step.roots, len(step.env_ids)
        context_pages = tables.shape[1]
        make = partial(
            GpuMemory, self._shared.engine, self._shared.source, slab, context_pages, matmul=self._matmul)
        memory = self._memory(problem, rows, step.addresses, (context_pages, ), make)
        _give(memory, problem, step.timesteps)
        given = memory.given
        given.tables[:rows], given.counts[:rows] = tables, counts
        given.pages[:problem.simulations, :rows] = pages
        return (*_search(memory, problem, rows, trace_of(step)), 0.)

    def _from_states(self, problem: Problem, latents: np.ndarray, timesteps: np.ndarray, addresses: Tuple[int, ...],
                     grows: bool) -> Tuple[Found, np.ndarray]:
        rows, context_pages = len(latents), self._shared.manager.context_pages if grows else 1
        kind = GrownReanalysis if grows else Reanalysis
        make = partial(kind, self._shared.engine, self._shared.source, context_pages, matmul=self._matmul)
        memory = self._memory(problem, rows, addresses, (kind, context_pages), make)
        _give(memory, problem, timesteps)
        memory.given.latents[:rows] = latents
        return _search(memory, problem, rows, None)

    def _memory(self, problem: Problem, rows: int, addresses: Tuple[int, ...], kind: Tuple[Any, ...],
                make: Callable[[Problem, int], Any]) -> Any:
        """Memory that has room for the search, or else new memory, for which the search is captured. ``kind`` and the
        problem tell which searches can share it."""
        memories = self._memories
        addresses += (self._shared.store.slab.address,)
        kind += (problem.slots, problem.action_size, problem.rules)
        memory = memories.find(
            rows, addresses, lambda others: others[0] >= problem.simulations and others[1:] == kind
        )
        if memory is None:
            memories.make_room()
            rows = -(-rows // ROWS_APART) * ROWS_APART
            memory = make(problem, rows)
            if self._shared.source.device().type == 'cuda' and memories.usable:
                memories.attempt(partial(_capture, memory))
            memories.kept[(rows, problem.simulations) + kind] = memory
        return memory


def _capture(memory: GpuMemory) -> GpuMemory:
    memory.capture()
    logger.info(f'Captured a simulation for {memory.rows} rows ({memory.memory_mb:.1f} MiB with the trees)')
    return memory


def _search(memory: GpuMemory, problem: Problem, rows: int, trace: Any) -> Tuple[Found, np.ndarray]:
    """Search with the inputs in ``memory.given``, and note each simulation if there is a trace. Returns what was found,
    and ``broken [2, B]``."""
    memory.begin()
    for _ in range(problem.simulations):
        memory.simulate()
        if trace is not None:
            trace.note_scalars(*_simulated(memory, rows))
    visits, values, draws, broken = memory.found(rows)
    found = [row[:len(legal) or problem.slots] for row, legal in zip(visits.tolist(), problem.legal)]
    return Found(found, values.tolist(), draws.tolist() if memory.rules.sampled else None), broken


def _give(memory: GpuMemory, problem: Problem, timesteps: np.ndarray) -> None:
    """Write the inputs of a search to ``memory.given``, its pages apart."""
    rows, given = len(timesteps), memory.given
    if memory.rows > rows:
        memory.empty_rows(rows)
    given.key.view(np.uint32)[:] = problem.seed & 0xFFFFFFFF, problem.number & 0xFFFFFFFF
    given.timesteps[:rows], given.reward[:rows] = timesteps, problem.rewards
    if memory.rules.sampled:  # whose scores have no use for noise
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


def _simulated(memory: GpuMemory, rows: int) -> Tuple[np.ndarray, ...]:
    """The last simulation, as a trace notes it."""
    predicted = to_cpu(torch.nan_to_num(memory.predicted, 0.0, 0.0, 0.0)[:rows])
    parts = memory.parents, memory.actions, memory.depths
    taken = [to_cpu(part[:rows].clone()) for part in parts]
    return (*taken, predicted[:, 0], predicted[:, 1], predicted[:, 2:])

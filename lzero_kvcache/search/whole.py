"""Whole searches on the CPU: trees in arrays, and the model's steps below them, as one compiled call for each search.

numba is imported by the first search.
"""
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..cache.stats import Timing
from ..engine.slab import MIB
from ..engine.store import PageStore
from ..engine.weights import Source
from .guard import NanGuard

LEAST_ROWS = 8
"""Rows that are worth a thread: as many as the compiled step works on side by side."""


class Problem(NamedTuple):
    """What a search is asked: the roots as the policy prepared them, and the rules."""
    rules: Dict[str, Any]  # arguments of ``tree.make_rules``
    seed: int
    number: int  # of the search, among those with this seed
    simulations: int
    slots: int  # actions that a node has, or that are drawn for it
    action_size: int  # numbers of a drawn action; 0 where none are drawn
    rewards: Sequence[float]  # [B]
    logits: Sequence[Sequence[float]]  # [B, P]
    legal: Sequence[Sequence[int]]  # [B][...]; empty: all
    noises: Optional[Sequence[Sequence[float]]]  # [B][...], by position in the list of legal actions
    noise_weight: float


class _Arrays(NamedTuple):
    tree: Any
    batch: Any
    scratches: List[Any]  # one for each thread

    @property
    def bytes(self) -> int:
        arrays = [*self.tree, *self.batch, *(scratch.memory for scratch in self.scratches)]
        return sum(array.nbytes for array in arrays)


class WholeSearch:
    """Runs searches of one model, and keeps the arrays of one for the next of the same size."""

    def __init__(self, read_network: Callable[[], Tuple[Any, Any]], source: Source, manager: PagedCacheManager,
                 storage: PageStore, guard: NanGuard, timings: Dict[str, Timing]) -> None:
        self._read_network, self._source, self._manager, self._storage = read_network, source, manager, storage
        self._guard, self._timings = guard, timings
        self._network: Any = None
        self._addresses: Tuple[int, ...] = ()
        self._size: Tuple[int, ...] = ()
        self._arrays: Optional[_Arrays] = None
        storage.beside.append(self)

    def __getstate__(self) -> Dict[str, Any]:
        """Copies read their own weights' addresses, and have arrays of their own."""
        return {**self.__dict__, '_network': None, '_arrays': None}

    @property
    def memory_mb(self) -> float:
        return 0.0 if self._arrays is None else self._arrays.bytes / MIB

    def run(self, served: Any, problem: Problem) -> Any:
        """Search from the roots of a served step; returns the tree, which the next search writes over."""
        start = time.perf_counter()
        rows = len(served.env_ids)
        with self._manager.lease() as lease:
            lease.hold(served.roots[0])
            pages = lease.allocate(problem.simulations * rows).reshape(problem.simulations, rows)
            self._manager.count_nodes(pages.size)
            arrays = self._search(served, problem, pages)
        self._manager.count_queries('recur', pages.size, pages.size, by_node=True)
        self._report(arrays.batch.broken, served)
        seconds = time.perf_counter() - start
        self._timings['search'].record(seconds)
        self._timings['step'].record(seconds, problem.simulations)
        return arrays.tree

    def _search(self, served: Any, problem: Problem, pages: np.ndarray) -> _Arrays:
        from . import compiled
        from .tree import make_key, make_rules, pad_legal

        network = self._network_at(served.addresses)
        slab = self._storage.ready(self._manager.page_capacity, self._source.device()).data
        assert slab is not None
        geometry = self._source.geometry
        no_shift = np.zeros((1, geometry.layers, 2, geometry.embed_dim), np.float32)
        shift = no_shift if served.weights.shift is None else served.weights.shift.numpy()
        tables, counts = served.roots
        rows, width = tables.shape
        arrays = self._arrays_of(problem, network, rows, width)
        noise = np.zeros((rows, problem.slots), np.float32)
        for row, numbers in enumerate(problem.noises or ()):
            noise[row, :len(numbers)] = numbers
        roots = compiled.Roots(
            np.asarray(problem.rewards, dtype=np.float32), np.asarray(problem.logits, dtype=np.float32),
            pad_legal(problem.legal, problem.slots), noise, np.float32(problem.noise_weight), tables, counts,
            served.timesteps
        )
        given = (
            arrays.tree, make_rules(**problem.rules), make_key(problem.seed, problem.number), roots, network, shift,
            slab.numpy(), pages, arrays.batch
        )
        trace = served.trace
        if trace is None or not trace.replayed:
            _in_threads(compiled.search_rows, given, arrays.scratches, 0, problem.simulations, rows)
            return arrays
        for simulation in range(problem.simulations):
            _in_threads(compiled.search_rows, given, arrays.scratches, simulation, simulation + 1, rows)
            _note(trace, arrays, given[1], simulation)
        return arrays

    def _network_at(self, addresses: Tuple[int, ...]) -> Any:
        """The model as addresses of its weights, read anew when one of them has moved."""
        if self._network is None or addresses != self._addresses:
            self._network, self._addresses = self._read_network(), addresses
        return self._network[0]

    def _arrays_of(self, problem: Problem, network: Any, rows: int, width: int) -> _Arrays:
        from ..engine.compiled import new_scratch
        from .compiled import make_batch
        from .tree import make_tree

        threads = max(1, min(torch.get_num_threads(), rows // LEAST_ROWS))
        size = (rows, problem.simulations, problem.slots, problem.action_size, width, threads)
        if self._arrays is None or size != self._size:
            self._arrays = None  # never both
            tree = make_tree(rows, problem.simulations, problem.slots, width, problem.action_size)
            scratches = [new_scratch(network, width) for _ in range(threads)]
            self._size, self._arrays = size, _Arrays(tree, make_batch(tree, network.policy), scratches)
        return self._arrays

    def _report(self, broken: np.ndarray, served: Any) -> None:
        """Raise or count what was no number; the search has taken zeros for it."""
        if not broken.any():
            return
        values = np.where(broken > 0, np.nan, 0.0)[:, None]
        what = 'A reward, value or policy'
        self._guard.finite(values, what, served.mode, served.env_ids, served.timesteps)
        self._manager.count_skipped(int(broken.sum() - np.count_nonzero(broken)))  # each counts, not each row alone


def _in_threads(search: Callable[..., None], given: Sequence[Any], scratches: Sequence[Any], begin: int, end: int,
                rows: int) -> None:
    """Share out the rows; threads live for one search, so that a fork finds none."""
    bounds = np.linspace(0, rows, len(scratches) + 1).astype(int)
    errors: List[BaseException] = []

    def run(scratch: Any, lo: int, hi: int) -> None:
        try:
            search(*given, scratch, begin, end, int(lo), int(hi))
        except BaseException as error:
            errors.append(error)

    shares = list(zip(scratches, bounds[:-1], bounds[1:]))
    threads = [threading.Thread(target=run, args=share) for share in shares[1:]]
    for thread in threads:
        thread.start()
    run(*shares[0])
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _note(trace: Any, arrays: _Arrays, rules: Any, simulation: int) -> None:
    """What validation needs of one simulation."""
    tree, batch, rows = arrays.tree, arrays.batch, np.arange(len(arrays.tree.depth))
    parents = tree.path[rows, tree.depth - 1]
    actions, depths = tree.action.copy(), tree.depth.copy()
    if rules.sampled:
        actions, depths = batch.actions.copy(), parents
        if not rules.continuous:
            actions = actions[:, 0].astype(np.int64)
    trace.note_scalars(parents, actions, depths, batch.reward, batch.value, batch.policy)

"""Whole searches: the trees are in arrays, and one call runs all simulations. Here are what both devices share, and the
search on a CPU, which is a compiled function: numba is imported with the first one, not with the package.
"""
import itertools
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..engine.memory import MemoryPool
from ..engine.program import PagedNetwork
from ..engine.slab import Slab
from ..engine.store import PageStore
from ..engine.weights import Source
from .compiled_model import CompiledModel
from .guard import NanGuard
from .timing import Timing
from .tree_arrays import padded

CHUNK = 64
"""Rows of a reanalysis for each thread at a time: as many as ``engine.layers.ROWS``."""

Found = Tuple[List[List[int]], List[float], Any]
"""Visits and values of the roots, and the actions drawn there ``[B][S][A]`` or None."""


class Problem(NamedTuple):
    """What to search: the roots as the policy prepared them, and the rules."""
    rules: Dict[str, Any]  # arguments of ``tree.make_rules``
    seed: int
    number: int  # of the search: those with the same seed and number draw the same
    simulations: int
    slots: int  # actions that a node has, or that are drawn for it
    action_size: int  # numbers of a drawn action; 0 where none are drawn
    rewards: Sequence[float]  # [B]
    logits: Sequence[Sequence[float]]  # [B, P]
    legal: Sequence[Sequence[int]]  # [B][...]; empty: all
    noises: Optional[Sequence[Sequence[float]]]  # [B][...], by position in the list of legal actions
    noise_weight: float

    def part(self, rows: slice, number: int) -> 'Problem':
        """The same for some of the rows, as a search of another number."""
        return self._replace(
            number=number, rewards=self.rewards[rows], logits=self.logits[rows], legal=self.legal[rows],
            noises=None if self.noises is None else self.noises[rows]
        )

    def padded_legal(self) -> np.ndarray:
        """The legal actions ``[B, S]``, padded with -1; nothing but -1 for a row in which every action is legal."""
        return padded(self.legal, self.slots, -1, np.int32)

    def padded_noises(self) -> np.ndarray:
        """The noises ``[B, S]``, padded with zeros; without any, all zeros."""
        noises = [[]] * len(self.legal) if self.noises is None else self.noises
        return padded(noises, self.slots, 0, np.float32)


class Shared(NamedTuple):
    """What all searches of one model share."""
    source: Source
    manager: PagedCacheManager
    store: PageStore
    guard: NanGuard
    timings: Dict[str, Timing]


class SearchMemory(NamedTuple):
    """What one search on a CPU works in."""
    tree: Any
    latents: np.ndarray  # [B, N, E], of the nodes of a reanalysis
    slab: np.ndarray  # the pages of a reanalysis

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in [*self.tree, self.latents, self.slab])


class WholeSearch(ABC):
    """Runs searches of one model in arrays, on one kind of device. Threads search at once on a CPU, in turns on a
    GPU."""

    def __init__(self, shared: Shared) -> None:
        self._source, self._manager, self._store, self._guard, self._timings = shared
        self._reanalyses = itertools.count()

    def run(self, step: Any, problem: Problem) -> Found:
        """Search from the roots of an open step."""
        step.check_rows(len(problem.rewards))
        start, manager = time.perf_counter(), self._manager
        with self._alone(), manager.lease() as lease:
            lease.hold(step.roots[0])
            pages = lease.allocate(problem.simulations * len(step.env_ids)).reshape(problem.simulations, -1)
            manager.count_nodes(pages.size)
            slab = self._store.ready(manager.page_capacity, self._source.device())
            found, broken, waited = self._from_roots(step, problem, slab, pages)
        manager.count_queries('recur', pages.size, pages.size, by_node=True)
        self._guard.report(broken, step.mode, step.env_ids, step.timesteps)
        seconds = time.perf_counter() - start - waited
        self._timings['search'].record(seconds)
        self._timings['step'].record(seconds, problem.simulations)
        return found

    def reanalyze(self, problem: Problem, latents: np.ndarray, timesteps: np.ndarray,
                  addresses: Tuple[int, ...], grows: bool) -> Found:
        """Search from states ``[B, E]`` without contexts, some rows at a time. Either contexts grow along the paths, or
        a node's context is its parent's state alone."""
        visits: List[List[int]] = []
        values: List[float] = []
        rows = len(latents)
        most = self._rows_at_a_time(rows, self._rows_within_limit(problem.simulations + 1 if grows else 2))
        for begin in range(0, rows, most):
            chosen = slice(begin, min(begin + most, rows))
            part = problem.part(chosen, next(self._reanalyses))
            with self._alone():
                found, broken = self._from_states(part, latents[chosen], timesteps[chosen], addresses, grows)
            self._guard.report(broken, 'reanalysis', range(begin, chosen.stop), timesteps[chosen])
            visits += found[0]
            values += found[1]
        return visits, values, None

    def _alone(self) -> ContextManager[Any]:
        """A context for one search. Where searches share memory, it lets one run at a time."""
        return nullcontext()

    def _rows_within_limit(self, pages: int) -> int:
        """How many rows of a reanalysis, each with so many pages in float32, fit into the memory that the manager may
        take."""
        geometry, manager = self._source.geometry, self._manager
        page_bytes = Slab(geometry.layers, geometry.heads, geometry.head_dim).page_bytes
        return (manager.page_limit * self._store.page_bytes // page_bytes - 1) // pages

    @abstractmethod
    def _rows_at_a_time(self, rows: int, within_limit: int) -> int:
        """How many rows of a reanalysis to search at once."""

    @abstractmethod
    def _from_roots(self, step: Any, problem: Problem, slab: Slab,
                    pages: np.ndarray) -> Tuple[Found, np.ndarray, float]:
        """Search from roots; simulations write ``pages [N - 1, B]``. Returns what was found, ``broken [2, B]`` (how
        many predictions had nan or inf, and the depth of the first), and the seconds spent compiling."""

    @abstractmethod
    def _from_states(self, problem: Problem, latents: np.ndarray, timesteps: np.ndarray, addresses: Tuple[int, ...],
                     grows: bool) -> Tuple[Found, np.ndarray]:
        """Search from states ``[B, E]``. Returns what was found, and ``broken``."""


class CompiledSearch(WholeSearch):
    """On the CPU, as one compiled call."""

    def __init__(self, model: CompiledModel, shared: Shared) -> None:
        super().__init__(shared)
        self._model = model
        self._memories = MemoryPool()
        shared.store.counted.append(self._memories)

    def _rows_at_a_time(self, rows: int, within_limit: int) -> int:
        return max(1, min(CHUNK * torch.get_num_threads(), within_limit))

    def _from_roots(self, step: Any, problem: Problem, slab: Slab,
                    pages: np.ndarray) -> Tuple[Found, np.ndarray, float]:
        tables, counts = step.roots
        network, _held = self._model.network_at(step.addresses)
        shift = self._model.shift() if step.shift is None else step.shift
        assert slab.data is not None
        paged = PagedNetwork(network, shift, slab.data.numpy())
        with self._memory(network, problem, *tables.shape) as memory:
            broken, waited = self._search(
                problem, memory, paged, tables, counts, step.timesteps, pages, (1, 2), replayed(step)
            )
            return found_in(memory.tree, problem), broken, waited

    def _from_states(self, problem: Problem, latents: np.ndarray, timesteps: np.ndarray, addresses: Tuple[int, ...],
                     grows: bool) -> Tuple[Found, np.ndarray]:
        (network, _held), rows = self._model.network_at(addresses), len(latents)
        width, steps = (self._manager.width, problem.simulations) if grows else (1, 1)
        with self._memory(network, problem, rows, width, 1 + steps, not grows) as memory:
            tables, counts = np.zeros((rows, width), np.int64), np.full(rows, int(grows), np.int64)
            pages = np.arange(1, 1 + rows * (1 + steps)).reshape(-1, rows)
            paged = PagedNetwork(network, self._model.shift(), memory.slab)
            if grows:
                tables[:, 0] = pages[0]
                self._model.begin(paged, tables, pages[0], 2 * timesteps, latents)
            else:
                memory.latents[:, 0], pages = latents, pages[[0] + [1] * problem.simulations]
            # Both tokens have the same place, as in LightZero's reanalysis.
            broken, _ = self._search(problem, memory, paged, tables, counts, timesteps, pages[1:], (3, 3), None)
            return found_in(memory.tree, problem), broken

    def _search(self, problem: Problem, memory: SearchMemory, paged: PagedNetwork, tables: np.ndarray,
                counts: np.ndarray, timesteps: np.ndarray, pages: np.ndarray, angles: Tuple[int, int],
                trace: Any) -> Tuple[np.ndarray, float]:
        """Search, and note each simulation if there is a trace. Returns ``broken``, and the seconds spent compiling."""
        from . import compiled_search
        from .tree import make_key, make_rules

        rows, width = tables.shape
        roots = compiled_search.SearchInputs(
            np.asarray(problem.rewards, dtype=np.float32), np.asarray(problem.logits, dtype=np.float32),
            problem.padded_legal(), problem.padded_noises(), np.float32(problem.noise_weight),
            np.ascontiguousarray(tables), counts, timesteps, np.array(angles)  # tables may be part of wider ones
        )
        rules, key = make_rules(**problem.rules), make_key(problem.seed, problem.number)
        nodes = compiled_search.make_nodes(memory.tree, paged.network.policy, memory.latents, timesteps)
        given = memory.tree, rules, key, roots, paged, pages, nodes
        run = partial(self._model.run, compiled_search.search_rows, given, paged.network, width, rows)
        if trace is None:
            return nodes.broken, run(0, problem.simulations)
        waited = 0.
        for simulation in range(problem.simulations):
            waited += run(simulation, simulation + 1)
            trace.note_scalars(*_simulated(memory.tree, nodes.batch, rules))
        return nodes.broken, waited

    @contextmanager
    def _memory(self, network: Any, problem: Problem, rows: int, width: int, pages: int = 0,
                has_states: bool = False) -> Iterator[SearchMemory]:
        """Memory for a search of ``rows`` rows with contexts of ``width`` pages. A reanalysis also gets
        ``pages`` pages of its own for each row and, with ``has_states``, room for the states of its nodes."""
        from .tree import make_tree

        geometry = self._source.geometry

        def make() -> SearchMemory:
            tree = make_tree(rows, problem.simulations, problem.slots, width, problem.action_size)
            latents = np.zeros((rows * has_states, problem.simulations + 1, geometry.embed_dim), np.float32)
            slab = (pages * rows + 1, 2, geometry.layers, 2, geometry.heads, geometry.head_dim)
            return SearchMemory(tree, latents, np.zeros(slab, np.float32))

        sizes = (network.embed, network.mlp_width, network.widest, network.policy, len(network.blocks))
        size = (problem.simulations, problem.slots, problem.action_size, width, pages, int(has_states), *sizes)
        with self._memories.lease(size, 1, make, lambda memory: len(memory.tree.depth) >= rows) as [memory]:
            tree = type(memory.tree)(*(array[:rows] for array in memory.tree))
            yield memory._replace(tree=tree, latents=memory.latents[:rows])


def replayed(step: Any) -> Any:
    """The trace of a step whose simulations validation replays; else None."""
    return step.trace if step.trace is not None and step.trace.replayed else None


def found_in(tree: Any, problem: Problem) -> Found:
    """Read the results from the trees."""
    from .tree import root_actions, root_values, root_visits

    return root_visits(tree), root_values(tree), root_actions(tree) if problem.rules.get('sampled') else None


def _simulated(tree: Any, batch: Any, rules: Any) -> Tuple[np.ndarray, ...]:
    """The last simulation, as a trace notes it."""
    rows = np.arange(len(tree.depth))
    parents = tree.path[rows, tree.depth - 1]
    actions, depths = tree.action.copy(), tree.depth.copy()
    if rules.index_for_depth:
        depths = parents
    if rules.sampled:
        actions = batch.actions.copy()
        if not rules.continuous:
            actions = actions[:, 0].astype(np.int64)
    return parents, actions, depths, batch.reward, batch.value, batch.policy

"""Searches in arrays on a CPU, each one call of a compiled function. The modules that define it are imported with the
first search, not with the package.
"""
from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator, NamedTuple, Tuple

import numpy as np
import torch

from ..engine.memory import MemoryPool
from ..engine.program import ROWS, PagedNetwork
from ..engine.slab import Slab
from .array_search import ArraySearch, Found, Problem, trace_of
from .compiled_model import CompiledModel
from .shared import Shared
from .timesteps import NODE_OFFSETS, REANALYSIS_OFFSETS, observed_at
from .tree_arrays import Rules


class SearchMemory(NamedTuple):
    """The memory of one search on a CPU."""
    tree: Any
    latents: np.ndarray  # [B, N, E], of the nodes of a reanalysis
    slab: np.ndarray  # the pages of a reanalysis

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in [*self.tree, self.latents, self.slab])


class CpuSearch(ArraySearch):
    """On a CPU."""

    def __init__(self, model: CompiledModel, shared: Shared) -> None:
        super().__init__(shared)
        self._model = model
        self._memories = MemoryPool()
        shared.store.counted.append(self._memories)

    def _rows_at_a_time(self, rows: int, within_limit: int) -> int:
        return max(1, min(ROWS * torch.get_num_threads(), within_limit))

    def _from_roots(self, step: Any, problem: Problem, slab: Slab,
                    pages: np.ndarray) -> Tuple[Found, np.ndarray, float]:
        tables, counts = step.roots
        network, _held = self._model.network_at(step.addresses)
        shift = self._model.shift() if step.shift is None else step.shift
        assert slab.data is not None
        paged = PagedNetwork(network, shift, slab.data.numpy())
        with self._memory(network, problem, *tables.shape) as memory:
            broken, waited = self._search(
                problem, memory, paged, tables, counts, step.timesteps, pages, NODE_OFFSETS, trace_of(step)
            )
            return _found(memory.tree, problem.rules), broken, waited

    def _from_states(self, problem: Problem, latents: np.ndarray, timesteps: np.ndarray, addresses: Tuple[int, ...],
                     grows: bool) -> Tuple[Found, np.ndarray]:
        (network, _held), rows = self._model.network_at(addresses), len(latents)
        context_pages, steps = (self._shared.manager.context_pages, problem.simulations) if grows else (1, 1)
        with self._memory(network, problem, rows, context_pages, 1 + steps, not grows) as memory:
            tables, counts = np.zeros((rows, context_pages), np.int64), np.full(rows, int(grows), np.int64)
            pages = np.arange(1, 1 + rows * (1 + steps)).reshape(-1, rows)
            paged = PagedNetwork(network, self._model.shift(), memory.slab)
            if grows:
                tables[:, 0] = pages[0]
                self._model.begin(paged, tables, pages[0], observed_at(timesteps), latents)
            else:
                memory.latents[:, 0], pages = latents, pages[[0] + [1] * problem.simulations]
            broken, _ = self._search(
                problem, memory, paged, tables, counts, timesteps, pages[1:], REANALYSIS_OFFSETS, None)
            return _found(memory.tree, problem.rules), broken

    def _search(self, problem: Problem, memory: SearchMemory, paged: PagedNetwork, tables: np.ndarray,
                counts: np.ndarray, timesteps: np.ndarray, pages: np.ndarray, offsets: Tuple[int, int],
                trace: Any) -> Tuple[np.ndarray, float]:
        """Search, and note each simulation if there is a trace. Returns ``broken``, and the seconds spent compiling."""
        from . import compiled_search
        from .tree import make_key

        rows, context_pages = tables.shape
        roots = compiled_search.SearchInputs(
            np.asarray(problem.rewards, dtype=np.float32), np.asarray(problem.logits, dtype=np.float32),
            problem.padded_legal(), problem.padded_noises(), np.float32(problem.noise_weight),
            np.ascontiguousarray(tables), counts, timesteps, np.array(offsets)  # tables may be part of wider ones
        )
        rules, key = problem.rules, make_key(problem.seed, problem.number)
        nodes = compiled_search.make_nodes(memory.tree, paged.network.policy, memory.latents, timesteps)
        given = memory.tree, rules, key, roots, paged, pages, nodes
        run = partial(self._model.run, compiled_search.search_rows, given, paged.network, context_pages, rows)
        if trace is None:
            return nodes.broken, run(0, problem.simulations)
        waited = 0.
        for simulation in range(problem.simulations):
            waited += run(simulation, simulation + 1)
            trace.note_scalars(*_simulated(memory.tree, nodes.batch, rules))
        return nodes.broken, waited

    @contextmanager
    def _memory(self, network: Any, problem: Problem, rows: int, context_pages: int, pages: int = 0,
                has_states: bool = False) -> Iterator[SearchMemory]:
        """Memory for a search of ``rows`` rows with contexts of ``context_pages`` pages. A reanalysis also gets
        ``pages`` pages of its own for each row and, with ``has_states``, room for the states of its nodes."""
        from .tree import make_tree

        geometry = self._shared.source.geometry

        def make() -> SearchMemory:
            tree = make_tree(rows, problem.simulations, problem.slots, context_pages, problem.action_size)
            latents = np.zeros((rows * has_states, problem.simulations + 1, geometry.embed_dim), np.float32)
            slab = (pages * rows + 1, 2, geometry.layers, 2, geometry.heads, geometry.head_dim)
            return SearchMemory(tree, latents, np.zeros(slab, np.float32))

        sizes = (network.embed, network.mlp_width, network.widest, network.policy, len(network.blocks))
        size = (problem.simulations, problem.slots, problem.action_size, context_pages, pages, int(has_states), *sizes)
        with self._memories.lease(size, 1, make, lambda memory: len(memory.tree.depth) >= rows) as [memory]:
            tree = type(memory.tree)(*(array[:rows] for array in memory.tree))
            yield memory._replace(tree=tree, latents=memory.latents[:rows])


def _found(tree: Any, rules: Rules) -> Found:
    from .tree import root_actions, root_values, root_visits

    return Found(root_visits(tree), root_values(tree), root_actions(tree) if rules.sampled else None)


def _simulated(tree: Any, batch: Any, rules: Rules) -> Tuple[np.ndarray, ...]:
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

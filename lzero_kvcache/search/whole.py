"""Whole searches on the CPU: trees in arrays, and the model's steps below them, as one compiled call for each."""
import itertools
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..cache.stats import Timing
from ..engine.store import PageStore
from ..engine.weights import Source
from .arrays import padded
from .compiled_model import CompiledModel
from .guard import NanGuard
from .spaces import Space, Spaces

CHUNK = 64
"""Rows of a reanalysis that a thread has in work: as many as ``engine.layers.ROWS``."""

Found = Tuple[List[List[int]], List[float], Any]
"""Visits and values of the roots, and the actions ``[B][S][A]`` that were drawn at them; None where none are drawn."""


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

    def part(self, rows: slice, number: int) -> 'Problem':
        """The same for some of the rows, as a search of another number."""
        return self._replace(
            number=number, rewards=self.rewards[rows], logits=self.logits[rows], legal=self.legal[rows],
            noises=None if self.noises is None else self.noises[rows]
        )

    def padded_legal(self) -> np.ndarray:
        """The legal actions ``[B, S]``, padded with -1; nothing else where all are."""
        return padded(self.legal, self.slots, -1, np.int32)

    def padded_noises(self) -> np.ndarray:
        """The noises ``[B, S]``, padded with zeros; without any, all zeros."""
        noises = [[]] * len(self.legal) if self.noises is None else self.noises
        return padded(noises, self.slots, 0, np.float32)


class WholeSearch:
    """Runs searches of one model; several threads may search at once."""

    def __init__(self, model: CompiledModel, source: Source, manager: PagedCacheManager, storage: PageStore,
                 guard: NanGuard, timings: Dict[str, Timing]) -> None:
        self._model, self._source, self._manager, self._storage = model, source, manager, storage
        self._guard, self._timings = guard, timings
        self._spaces = Spaces()
        self._reanalyses = itertools.count(2 ** 31)  # numbers that no policy's search has
        storage.beside.append(self._spaces)

    def run(self, served: Any, problem: Problem) -> Found:
        """Search from the roots of a served step."""
        from .tree import root_actions, root_values, root_visits

        with self.trees(served, problem) as tree:
            return root_visits(tree), root_values(tree), root_actions(tree) if problem.rules.get('sampled') else None

    @contextmanager
    def trees(self, served: Any, problem: Problem) -> Iterator[Any]:
        """The trees of a search, which belong to another one afterwards."""
        start = time.perf_counter()
        tables, counts = served.roots
        rows, width = tables.shape
        network, _held = self._model.network_at(served.addresses)
        shift = self._model.shift() if served.shift is None else served.shift
        with self._space(network, problem, rows, width) as space:
            with self._manager.lease() as lease:
                lease.hold(tables)
                pages = lease.allocate(problem.simulations * rows).reshape(problem.simulations, rows)
                self._manager.count_nodes(pages.size)
                slab = self._storage.ready(self._manager.page_capacity, self._source.device()).data
                assert slab is not None
                trace = served.trace if served.trace is not None and served.trace.replayed else None
                broken = self._search(
                    problem, space, network, shift, tables, counts, served.timesteps, slab.numpy(), pages,
                    trace
                )
            self._manager.count_queries('recur', pages.size, pages.size, by_node=True)
            self._guard.report(broken, served.mode, served.env_ids, served.timesteps)
            seconds = time.perf_counter() - start
            self._timings['search'].record(seconds)
            self._timings['step'].record(seconds, problem.simulations)
            yield space.tree

    def reanalyze(self, problem: Problem, latents: np.ndarray, timesteps: np.ndarray,
                  addresses: Tuple[int, ...]) -> Found:
        """Search from states ``[B, E]`` without contexts, some rows at a time."""
        from .tree import root_values, root_visits

        (network, _held), shift = self._model.network_at(addresses), self._model.shift()
        visits: List[List[int]] = []
        values: List[float] = []
        rows, most = len(latents), CHUNK * torch.get_num_threads()
        for begin in range(0, rows, most):
            chosen = slice(begin, min(begin + most, rows))
            part = problem.part(chosen, next(self._reanalyses))
            count = chosen.stop - begin
            with self._space(network, part, count, 1, reanalyzes=True) as space:
                space.latents[:, 0] = latents[chosen]
                pages = np.tile(np.arange(count + 1, 2 * count + 1), (problem.simulations, 1))
                none = np.zeros((count, 1), np.int64)
                broken = self._search(
                    part, space, network, shift, none, none[:, 0], timesteps[chosen], space.slab, pages, None
                )
                self._guard.report(broken, 'reanalysis', range(begin, chosen.stop), timesteps[chosen])
                visits += root_visits(space.tree)
                values += root_values(space.tree)
        return visits, values, None

    def _search(self, problem: Problem, space: Space, network: Any, shift: np.ndarray, tables: np.ndarray,
                counts: np.ndarray, timesteps: np.ndarray, slab: np.ndarray, pages: np.ndarray,
                trace: Any) -> np.ndarray:
        """Search, and note each simulation if there is a trace; returns how many predictions of each row ``[B]`` were
        no numbers."""
        from . import compiled
        from .tree import make_key, make_rules

        rows, width = tables.shape
        roots = compiled.Roots(
            np.asarray(problem.rewards, dtype=np.float32), np.asarray(problem.logits, dtype=np.float32),
            problem.padded_legal(), problem.padded_noises(), np.float32(problem.noise_weight), tables,
            counts, timesteps
        )
        rules, batch = make_rules(**problem.rules), compiled.make_batch(space.tree, network.policy)
        states = compiled.make_states(space.latents, timesteps)
        given = (
            space.tree, rules, make_key(problem.seed, problem.number), roots, network, shift, slab, pages, batch, states
        )
        if trace is None:
            self._model.run(compiled.search_rows, given, network, width, rows, 0, problem.simulations)
        else:
            for simulation in range(problem.simulations):
                self._model.run(compiled.search_rows, given, network, width, rows, simulation, simulation + 1)
                _note(trace, space.tree, batch, rules, simulation)
        return batch.broken

    @contextmanager
    def _space(self, network: Any, problem: Problem, rows: int, width: int,
               reanalyzes: bool = False) -> Iterator[Space]:
        """Memory for a search of so many rows, each with contexts of ``width`` pages."""
        from .tree import make_tree

        geometry = self._source.geometry

        def make() -> Space:
            tree = make_tree(rows, problem.simulations, problem.slots, width, problem.action_size)
            states = rows if reanalyzes else 0
            latents = np.zeros((states, problem.simulations + 1, geometry.embed_dim), np.float32)
            pages = (2 * states + 1, 2, geometry.layers, 2, geometry.heads, geometry.head_dim)
            return Space(tree, latents, np.zeros(pages, np.float32))

        sizes = (network.embed, network.inner, network.widest, network.policy, len(network.blocks))
        size = (problem.simulations, problem.slots, problem.action_size, width, int(reanalyzes), *sizes)
        with self._spaces.lease(size, 1, make, lambda space: len(space.tree.depth) >= rows) as [space]:
            tree = type(space.tree)(*(array[:rows] for array in space.tree))
            yield space._replace(tree=tree, latents=space.latents[:rows])


def _note(trace: Any, tree: Any, batch: Any, rules: Any, simulation: int) -> None:
    """What validation needs of one simulation."""
    rows = np.arange(len(tree.depth))
    parents = tree.path[rows, tree.depth - 1]
    actions, depths = tree.action.copy(), tree.depth.copy()
    if rules.index_for_depth:
        depths = parents
    if rules.sampled:
        actions = batch.actions.copy()
        if not rules.continuous:
            actions = actions[:, 0].astype(np.int64)
    trace.note_scalars(parents, actions, depths, batch.reward, batch.value, batch.policy)

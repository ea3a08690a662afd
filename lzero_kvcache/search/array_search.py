"""Searches whose trees are in arrays, so that one call runs all simulations: what both devices share."""
import itertools
import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ContextManager, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..engine.slab import Slab
from .open_steps import OpenStep
from .shared import Shared
from .timesteps import reanalysis_timesteps_of
from .tree_arrays import Rules, padded


class Found(NamedTuple):
    """The results of a search at its roots, as lists by row."""
    visits: List[List[int]]
    values: List[float]
    actions: Any = None  # [B][S][A], where actions are drawn


class Problem(NamedTuple):
    """The problem of a search: the roots as the policy prepared them, and the rules."""
    rules: Rules
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
        """The problem of some of the rows, as a search with another number."""
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


class ArraySearch(ABC):
    """Runs searches of one model in arrays, on one kind of device. Threads search at once on a CPU, in turns on a
    GPU."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._reanalyses = itertools.count()

    @torch.no_grad()
    def search(self, step: Optional[OpenStep], problem: Problem) -> Found:
        """Search from the roots of an open step."""
        step = self._shared.open.check_searchable(step)
        assert step.roots is not None
        step.check_rows(len(problem.rewards))
        start, manager, timings = time.perf_counter(), self._shared.manager, self._shared.timings
        with self._alone(), manager.lease() as lease:
            lease.hold(step.roots[0])
            pages = lease.allocate(problem.simulations * len(step.env_ids)).reshape(problem.simulations, -1)
            manager.count_nodes(pages.size)
            found, broken, waited = self._from_roots(step, problem, self._shared.slab(), pages)
        manager.count_queries('recur', pages.size, pages.size, by_node=True)
        self._shared.guard.report(broken, step.mode, step.env_ids, step.timesteps)
        seconds = time.perf_counter() - start - waited
        timings['search'].record(seconds)
        timings['step'].record(seconds, problem.simulations)
        return found

    @torch.no_grad()
    def reanalyze(self, problem: Problem, latents: np.ndarray, start_pos: Any, grows: bool = False) -> Found:
        """Search from states ``[B, E]`` without contexts, some rows at a time; ``start_pos`` are timesteps ``[batch,
        unroll]`` or ``[B]``, as a replay buffer passes them. Either contexts grow along the paths, or a node's context
        is its parent's state alone."""
        found = Found([], [])
        rows, addresses = len(latents), self._shared.source.addresses()
        timesteps = reanalysis_timesteps_of(start_pos, rows)
        most = self._rows_at_a_time(rows, self._rows_within_limit(problem.simulations + 1 if grows else 2))
        for begin in range(0, rows, most):
            chosen = slice(begin, min(begin + most, rows))
            asked = problem.part(chosen, next(self._reanalyses))
            with self._alone():
                part, broken = self._from_states(asked, latents[chosen], timesteps[chosen], addresses, grows)
            self._shared.guard.report(broken, 'reanalysis', range(begin, chosen.stop), timesteps[chosen])
            found.visits.extend(part.visits)
            found.values.extend(part.values)
        return found

    def _alone(self) -> ContextManager[Any]:
        """A context for one search. Where searches share memory, it lets one run at a time."""
        return nullcontext()

    def _rows_within_limit(self, pages: int) -> int:
        """How many rows of a reanalysis, each with so many pages in float32, fit into the memory that the manager may
        take."""
        geometry, manager = self._shared.source.geometry, self._shared.manager
        page_bytes = Slab(geometry.layers, geometry.heads, geometry.head_dim).page_bytes
        return (manager.page_limit * self._shared.store.page_bytes // page_bytes - 1) // pages

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


def trace_of(step: Any) -> Any:
    """The trace of a step whose simulations validation replays; else None."""
    return step.trace if step.trace is not None and step.trace.replayed else None

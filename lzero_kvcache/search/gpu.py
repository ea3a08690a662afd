"""Whole searches on a GPU: the tree's kernels and the model's steps, captured as one CUDA graph for each size.

Triton is imported by the first search. Shapes as in ``tree.py``.
"""
import importlib.util
import logging
import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..cache.pages import SCRATCH_PAGE
from ..cache.stats import Timing
from ..engine.slab import MIB, Slab
from ..engine.step import Engine
from ..engine.store import PageStore
from ..engine.weights import Source, Weights
from .guard import NanGuard
from .whole import Problem

logger = logging.getLogger(__name__)

MOST_CAPTURES = 8
"""Sizes of searches that stay captured, so that what they hold is bounded."""

Found = Tuple[List[List[int]], List[float]]
"""Visits of the legal actions of each root, and each root's value."""


def why_not_on_gpu() -> Optional[str]:
    """What these searches lack; None if nothing."""
    return None if importlib.util.find_spec('triton') else 'Triton is not installed'


class _Trees(NamedTuple):
    """As in ``tree.Tree``, and what goes into the model's step."""
    visits: torch.Tensor
    value_sum: torch.Tensor
    reward: torch.Tensor
    prior: torch.Tensor
    child: torch.Tensor
    order: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    path: torch.Tensor
    depth: torch.Tensor
    action: torch.Tensor
    tables: torch.Tensor
    counts: torch.Tensor
    broken: torch.Tensor  # [B], how many predictions of a row were no numbers
    step_tables: torch.Tensor  # [B, R + 1]
    step_counts: torch.Tensor  # [B]
    positions: torch.Tensor  # [2, B]


def _make_trees(rows: int, simulations: int, slots: int, pages: int, device: torch.device) -> _Trees:
    nodes = simulations + 1

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return _Trees(
        visits=zeros(rows, nodes), value_sum=zeros(rows, nodes, dtype=torch.float32),
        reward=zeros(rows, nodes, dtype=torch.float32), prior=zeros(rows, nodes, slots, dtype=torch.float32),
        child=zeros(rows, nodes, slots),
        order=torch.arange(slots, dtype=torch.int32, device=device).repeat(rows, nodes, 1),
        low=zeros(rows, dtype=torch.float32), high=zeros(rows, dtype=torch.float32), path=zeros(rows, nodes),
        depth=zeros(rows), action=zeros(rows, dtype=torch.int64),
        tables=zeros(rows, nodes, pages, dtype=torch.int64), counts=zeros(rows, nodes, dtype=torch.int64),
        broken=zeros(rows), step_tables=zeros(rows, pages + 1, dtype=torch.int64),
        step_counts=zeros(rows, dtype=torch.int64), positions=zeros(2, rows, dtype=torch.int64)
    )


class _Space:
    """What one search at a time works in, and its graph, if it is captured."""

    def __init__(self, rows: int, problem: Problem, width: int, device: torch.device) -> None:
        self.rows, self.simulations, self.slots, self.width = rows, problem.simulations, problem.slots, width
        on_gpu = device.type == 'cuda'
        self.trees = _make_trees(rows, problem.simulations, problem.slots, width, device)
        # Key, root rewards and priors (as float64), slots in order, timesteps, counts, tables, pages of simulations.
        lines = 2 + 2 * self.slots + 2 + width + problem.simulations
        self.sent = torch.zeros(lines, rows, dtype=torch.int64, pin_memory=on_gpu)
        self.given = torch.zeros(lines, rows, dtype=torch.int64, device=device)
        self.found = torch.zeros(rows, self.slots + 2, dtype=torch.int32, pin_memory=on_gpu)
        self.graph: Any = None
        self.memory_mb = 0.0

    def fill(self, problem: Problem, tables: np.ndarray, counts: np.ndarray, timesteps: np.ndarray,
             pages: np.ndarray) -> None:
        """Write what a search is asked; rows that are not asked write to the scratch page."""
        rows, slots, width = len(counts), self.slots, self.width
        sent = self.sent.numpy()
        order, prior = _root_priors(problem)
        sent[:] = 0
        sent[0] = (problem.seed & 0xFFFFFFFF) | (problem.number & 0x7FFFFFFF) << 32
        numbers = sent.view(np.float64)
        numbers[1, :rows] = problem.rewards
        numbers[2:2 + slots, :rows] = prior.T
        rest = sent[2 + slots:]
        rest[:slots] = np.arange(slots)[:, None]
        rest[:slots, :rows] = order.T
        rest = rest[slots:]
        rest[0, :rows], rest[1, :rows], rest[2:2 + width, :rows] = timesteps, counts, tables.T
        rest[2 + width:] = SCRATCH_PAGE
        rest[2 + width:, :rows] = pages

    def begin(self) -> None:
        """Send it, and make roots of it."""
        trees, slots, width = self.trees, self.slots, self.width
        self.given.copy_(self.sent, non_blocking=True)
        numbers = self.given.view(torch.float64)
        trees.reward[:, 0] = numbers[1].float()
        trees.prior[:, 0] = numbers[2:2 + slots].T.float()
        rest = self.given[2 + slots:]
        trees.order[:, 0] = rest[:slots].T.int()
        trees.counts[:, 0] = rest[slots + 1]
        trees.tables[:, 0] = rest[slots + 2:slots + 2 + width].T
        trees.child.fill_(-1)
        trees.visits[:, 0], trees.value_sum[:, 0] = 1, 0
        trees.low.fill_(1e6)
        trees.high.fill_(-1e6)
        trees.broken.zero_()

    def end(self) -> None:
        """Take the results to the CPU."""
        trees = self.trees
        order = trees.order[:, 0].long()
        child = trees.child[:, 0].gather(1, order.clamp(min=0))
        visits = trees.visits.gather(1, child.clamp(min=0).long()).masked_fill(child < 0, 0)
        value = trees.value_sum[:, :1] / trees.visits[:, :1]
        found = torch.cat([visits, value.view(torch.int32), trees.broken.unsqueeze(1)], dim=1)
        self.found.copy_(found, non_blocking=True)

    def results(self, problem: Problem) -> Tuple[Found, np.ndarray]:
        """What was found for the rows that were asked, and how many of their predictions were no numbers."""
        found = self.found.numpy()[:len(problem.rewards)].copy()
        legal = [len(actions) or self.slots for actions in problem.legal]
        visits = [row[:count].tolist() for row, count in zip(found, legal)]
        return (visits, found[:, self.slots].view(np.float32).tolist()), found[:, -1]


def _root_priors(problem: Problem) -> Tuple[np.ndarray, np.ndarray]:
    """Legal slots of each root in the order given, then -1, and the priors of all slots with noise, ``[B, S]``."""
    rows, slots = len(problem.rewards), problem.slots
    order = np.full((rows, slots), -1, np.int64)
    prior = np.zeros((rows, slots), np.float32)
    weight = np.float32(problem.noise_weight)
    for row, (logits, legal) in enumerate(zip(problem.logits, problem.legal)):
        chosen = np.asarray(legal if len(legal) else range(slots), dtype=np.int64)
        order[row, :len(chosen)] = chosen
        scores = np.asarray(logits, dtype=np.float32)[chosen]
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
        if problem.noises is not None:
            noise = np.asarray(problem.noises[row], dtype=np.float32)[:len(chosen)]
            scores = scores * (1 - weight) + noise * weight
        prior[row, chosen] = scores
    return order, prior


class _Spaces:
    """Those of one model. A copy begins without."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a search runs
        self.addresses: Tuple[int, ...] = ()
        self.by_size: Dict[Tuple[Any, ...], _Space] = {}

    def __reduce__(self) -> Any:
        return type(self), ()

    @property
    def memory_mb(self) -> float:
        return sum(space.memory_mb for space in list(self.by_size.values()))


class GpuSearch:
    """Runs the searches of one model, one at a time."""

    def __init__(self, engine: Engine, source: Source, manager: PagedCacheManager, storage: PageStore, guard: NanGuard,
                 timings: Dict[str, Timing]) -> None:
        self._engine, self._source, self._manager, self._storage = engine, source, manager, storage
        self._guard, self._timings = guard, timings
        self._spaces = _Spaces()
        storage.beside.append(self._spaces)

    def run(self, served: Any, problem: Problem) -> Found:
        """Search from the roots of a served step; one transfer to the device, one back."""
        start = time.perf_counter()
        tables, counts = served.roots
        device = self._source.device()
        with self._spaces.lock, self._manager.lease() as lease:
            lease.hold(tables)
            pages = lease.allocate(problem.simulations * len(counts)).reshape(problem.simulations, -1)
            self._manager.count_nodes(pages.size)
            slab = self._storage.ready(self._manager.page_capacity, device)
            trace = served.trace if served.trace is not None and served.trace.replayed else None
            if trace is not None or device.type != 'cuda':
                space = _Space(len(counts), problem, tables.shape[1], device)
                space.fill(problem, tables, counts, served.timesteps, pages)
                self._search(served.weights, slab, space, problem, trace)
            else:
                space = self._captured(served.addresses, slab, problem, len(counts), tables.shape[1])
                space.fill(problem, tables, counts, served.timesteps, pages)
                space.graph.replay()
            if device.type == 'cuda':
                torch.cuda.current_stream(device).synchronize()
            found, broken = space.results(problem)
        self._manager.count_queries('recur', pages.size, pages.size, by_node=True)
        self._guard.report(broken, served.mode, served.env_ids, served.timesteps)
        seconds = time.perf_counter() - start
        self._timings['search'].record(seconds)
        self._timings['step'].record(seconds, problem.simulations)
        return found

    def _captured(self, addresses: Tuple[int, ...], slab: Slab, problem: Problem, rows: int, width: int) -> _Space:
        """A captured search of so many rows at least; captured anew when weights or pages have moved."""
        spaces, addresses = self._spaces, addresses + (slab.address,)
        if spaces.addresses != addresses:
            spaces.by_size.clear()
            spaces.addresses = addresses
        kind = problem.simulations, problem.slots, width, tuple(problem.rules.items())
        fitting = [size for size in spaces.by_size if size[0] >= rows and size[1:] == kind]
        if fitting:
            return spaces.by_size[min(fitting)]
        if len(spaces.by_size) >= MOST_CAPTURES:
            spaces.by_size.clear()
        space = self._capture(slab, problem, rows, width)
        spaces.by_size[(rows,) + kind] = space
        return space

    def _capture(self, slab: Slab, problem: Problem, rows: int, width: int) -> _Space:
        device = self._source.device()
        before = torch.cuda.memory_allocated(device)
        space = _Space(rows, problem, width, device)
        space.fill(problem._replace(rewards=[], logits=[], legal=[]), *_no_rows(width, problem.simulations))
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles the kernels, and libraries allocate their workspaces
            self._search(self._source.read(True), slab, space, problem._replace(simulations=min(2, space.simulations)))
        torch.cuda.current_stream(device).wait_stream(stream)
        space.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(space.graph):  # with the weights read inside, so that each replay joins them anew
            self._search(self._source.read(True), slab, space, problem)
        space.memory_mb = (torch.cuda.memory_allocated(device) - before) / MIB
        logger.info(
            f'Captured a search of {space.simulations} simulations for {rows} rows as a CUDA graph '
            f'({space.memory_mb:.1f} MiB)'
        )
        return space

    def _search(self, weights: Weights, slab: Slab, space: _Space, problem: Problem, trace: Any = None) -> None:
        import triton

        from ..engine.paged import PagedStep
        from .gpu_tree import backup, select

        trees, geometry, rules, rows = space.trees, self._engine.geometry, problem.rules, space.rows
        step, two_players = PagedStep(geometry), rules['two_players']
        lanes, pages = triton.next_power_of_2(space.slots), triton.next_power_of_2(space.width + 1)
        first = 2 + 2 * space.slots
        timesteps, new_pages = space.given[first], space.given[first + 2 + space.width:]
        discount, nodes = float(rules['discount_factor']), space.simulations + 1
        space.begin()
        for simulation in range(problem.simulations):
            select[(rows,)](
                *trees[:13], space.given, new_pages[simulation], timesteps, *trees[14:], rows, nodes, space.slots,
                space.width, float(rules['pb_c_base']), float(rules['pb_c_init']), discount,
                float(rules['value_delta_max']), geometry.rotary_positions, simulation, TWO_PLAYERS=two_players,
                ROTARY=geometry.rotary, LANES=lanes, PAGES=pages, num_warps=1
            )
            output = step(weights, slab, trees.step_tables, trees.step_counts, trees.action, trees.positions)
            predicted = self._engine.for_search(weights, output)
            backup[(rows,)](
                *trees[:5], *trees[6:10], predicted, trees.broken, nodes, space.slots, discount, simulation,
                TWO_PLAYERS=two_players, LANES=lanes, num_warps=1
            )
            if trace is not None:
                _note(trace, trees, predicted)
        space.end()


def _no_rows(width: int, simulations: int) -> Tuple[np.ndarray, ...]:
    """Tables, counts, timesteps and pages of a search that nobody asked for."""
    none = np.zeros(0, np.int64)
    return none.reshape(0, width), none, none, none.reshape(simulations, 0)


def _note(trace: Any, trees: _Trees, predicted: torch.Tensor) -> None:
    """What validation needs of one simulation."""
    depths = trees.depth.cpu().numpy()
    parents = trees.path.cpu().numpy()[np.arange(len(depths)), depths - 1]
    on_cpu = predicted.cpu().numpy()
    trace.note_scalars(parents, trees.action.cpu().numpy(), depths, on_cpu[:, 0], on_cpu[:, 1], on_cpu[:, 2:])

"""Whole searches on a GPU: trees as tensors, and the model's steps below them, without the CPU from a search's first
simulation to its last.

A simulation is one CUDA graph, which is replayed for each: so any number of them needs no other capture. Roots come to
the device in one copy, and visits and values leave it in one.
"""
import logging
import threading
import time
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..cache.pages import SCRATCH_PAGE
from ..cache.stats import Timing
from ..engine.graphs import MAX_MOVES
from ..engine.slab import MIB, Slab
from ..engine.step import Engine
from ..engine.store import PageStore
from ..engine.transfer import to_cpu
from ..engine.weights import Source, Weights
from .guard import NanGuard
from .whole import Found, Problem

logger = logging.getLogger(__name__)

MAX_SPACES = 8
"""Searches of so many sizes are captured; then the oldest goes."""

_FAR = 1e6  # what LightZero takes for infinity


class _Tree(NamedTuple):
    """As :class:`.tree.Tree`, whose shapes these are."""
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


class _Sent(NamedTuple):
    """What a search begins with, in one piece of memory."""
    key: Any  # [2] int32: one number of 64 bits
    order: Any  # [B, S] int32
    tables: Any  # [B, R] int32
    counts: Any  # [B] int32
    timesteps: Any  # [B] int32
    pages: Any  # [N - 1, B] int32, what simulations write
    prior: Any  # [B, S] float32
    reward: Any  # [B] float32


class Space:
    """What searches of one size work in, for ``rows`` and ``simulations`` at the most."""

    def __init__(self, engine: Engine, source: Source, slab: Slab, problem: Problem, rows: int, width: int) -> None:
        self._engine, self._source, self._slab = engine, source, slab
        self.rows, self.simulations, self._slots, self._width = rows, problem.simulations, problem.slots, width
        self._rules = problem.rules
        self._device = source.device()
        self._make()
        self._begin: Callable[[], None] = self._run_begin
        self.simulate: Callable[[], None] = self._run_simulation

    def _make(self) -> None:
        rows, nodes, slots, device = self.rows, self.simulations + 1, self._slots, self._device
        floats, whole = torch.float32, torch.int32
        shapes = dict(
            visits=(rows, nodes), value_sum=(rows, nodes), reward=(rows, nodes), prior=(rows, nodes, slots),
            child=(rows, nodes, slots), order=(rows, nodes, slots), low=(rows, ), high=(rows, ), path=(rows, nodes),
            depth=(rows, ), action=(rows, ), tables=(rows, nodes, self._width), counts=(rows, nodes)
        )
        kinds = dict.fromkeys(('value_sum', 'reward', 'prior', 'low', 'high'), floats)
        kinds['action'] = torch.int64
        self.tree = _Tree(**{
            name: torch.zeros(shape, dtype=kinds.get(name, whole), device=device) for name, shape in shapes.items()
        })
        sizes = _Sent((2, ), (rows, slots), (rows, self._width), (rows, ), (rows, ), (nodes - 1, rows), (rows, slots),
                      (rows, ))
        numbers = [int(np.prod(size)) for size in sizes]
        self._pinned = torch.zeros(sum(numbers), dtype=whole, pin_memory=device.type == 'cuda')
        self._on_device = self._pinned.to(device)
        views = [
            _Sent(*(part.view(size) for part, size in zip(memory.split(numbers), sizes)))
            for memory in (self._pinned, self._on_device)
        ]
        views = [view._replace(prior=view.prior.view(floats), reward=view.reward.view(floats)) for view in views]
        self.given, self._sent = _Sent(*(part.numpy() for part in views[0])), views[1]
        self._window = torch.zeros(self._width + 1, rows, dtype=torch.int64, device=device)
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.broken, self._simulation = (torch.zeros(size, dtype=whole, device=device) for size in (rows, 1))
        self.predicted = torch.zeros(rows, 2 + slots, device=device)
        rules, others = self._rules, np.arange(nodes + 1, dtype=np.float32)
        explored = np.log((others + np.float32(rules['pb_c_base']) + 1) / np.float32(rules['pb_c_base']))
        self._explored = torch.from_numpy(explored + np.float32(rules['pb_c_init'])).to(device)
        self._spread = torch.from_numpy(np.sqrt(others)).to(device)
        self._numbers = torch.tensor([rules['discount_factor'], rules['value_delta_max']], device=device)
        parts = [*self.tree, self._on_device, self._window, self._counts, self._positions, self.predicted]
        self.memory_mb = sum(part.numel() * part.element_size() for part in parts) / MIB
        self.empty_rows(0)

    def empty_rows(self, used: int) -> None:
        """What rows that only fill a batch have: no legal actions, and a page that nobody reads."""
        given = self.given
        given.order[used:], given.prior[used:], given.reward[used:] = -1, 0, 0
        given.tables[used:], given.counts[used:], given.timesteps[used:] = 0, 1, 0
        given.pages[:, used:] = SCRATCH_PAGE

    def begin(self) -> None:
        """Take over what is given."""
        self._on_device.copy_(self._pinned, non_blocking=True)
        self._begin()

    def capture(self) -> None:
        """From now on, replay graphs."""
        self.begin()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
            for _ in range(3):
                self._run_begin()
                self._run_simulation()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        del self._weights  # those of a capture are counted
        before = torch.cuda.memory_allocated(self._device)
        begin, simulation = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(begin):
            self._run_begin()
        with torch.cuda.graph(simulation, pool=begin.pool()):
            self._run_simulation()
        self._begin, self.simulate = begin.replay, simulation.replay
        # What else is freed meanwhile, as a model that went, must not count.
        self.memory_mb += max(0, torch.cuda.memory_allocated(self._device) - before) / MIB

    def _run_begin(self) -> None:
        tree, sent = self.tree, self._sent
        self._weights: Weights = self._source.read(True)
        tree.order[:, 0], tree.prior[:, 0], tree.reward[:, 0] = sent.order, sent.prior, sent.reward
        tree.tables[:, 0], tree.counts[:, 0] = sent.tables, sent.counts
        tree.child[:, 0].fill_(-1)
        tree.visits[:, 0].fill_(1)
        tree.value_sum[:, 0].fill_(0)
        tree.low.fill_(_FAR)
        tree.high.fill_(-_FAR)
        self.broken.fill_(0)
        self._simulation.fill_(0)

    def _run_simulation(self) -> None:
        from triton import next_power_of_2

        from . import kernels

        tree, sent, engine = self.tree, self._sent, self._engine
        nodes, slots, two_players = self.simulations + 1, self._slots, self._rules['two_players']
        padded = max(2, next_power_of_2(slots))
        options = dict(num_warps=1, enable_fp_fusion=False)
        kernels.select[self.rows, ](
            *tree, sent.key.view(torch.int64), self._simulation, sent.timesteps, sent.pages, self._window,
            self._counts, self._positions, self._explored, self._spread, self._numbers, self.rows, nodes, slots,
            engine.geometry.rotary_positions, padded, self._width, max(2, next_power_of_2(self._width)), two_players,
            **options
        )
        output = engine.simulate(
            self._weights, self._slab, self._window.T, self._counts, tree.action, self._positions
        )
        self.predicted.copy_(engine.for_search(self._weights, output))
        kernels.backup[self.rows, ](
            tree.visits, tree.value_sum, tree.reward, tree.prior, tree.child, tree.order, tree.low, tree.high,
            tree.path, tree.depth, self.broken, self.predicted, self._simulation, self._numbers, nodes, slots, padded,
            two_players, **options
        )
        self._simulation.add_(1)

    def found(self, rows: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the roots: visits in their order ``[B, S]``, values ``[B]``, and how many predictions were no numbers."""
        tree = self.tree
        children = tree.child[:, 0].gather(1, tree.order[:, 0].clamp(min=0).long())
        visits = tree.visits.gather(1, children.clamp(min=0).long()).masked_fill_(children < 0, 0)
        values = (tree.value_sum[:, 0] / tree.visits[:, 0]).view(torch.int32)
        numbers = to_cpu(torch.cat([visits, values[:, None], self.broken[:, None]], dim=1)[:rows])
        return numbers[:, :-2], np.ascontiguousarray(numbers[:, -2]).view(np.float32), numbers[:, -1]


class _Spaces:
    """The spaces of one model, the newest last; one search at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.kept: Dict[Tuple[Any, ...], Space] = {}
        self.addresses: Tuple[int, ...] = ()
        self.moves = 0
        self.captures = True

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy begins without

    @property
    def memory_mb(self) -> float:
        return sum(space.memory_mb for space in list(self.kept.values()))


class DeviceSearch:
    """Runs searches of one model."""

    def __init__(self, engine: Engine, source: Source, manager: PagedCacheManager, storage: PageStore, guard: NanGuard,
                 timings: Dict[str, Timing]) -> None:
        self._engine, self._source, self._manager, self._storage = engine, source, manager, storage
        self._guard, self._timings = guard, timings
        self._spaces = _Spaces()
        storage.beside.append(self._spaces)

    def run(self, served: Any, problem: Problem) -> Found:
        """Search from the roots of a served step."""
        start = time.perf_counter()
        tables, rows, manager = served.roots[0], len(served.env_ids), self._manager
        with self._spaces.lock, manager.lease() as lease:
            lease.hold(tables)
            pages = lease.allocate(problem.simulations * rows).reshape(problem.simulations, rows)
            manager.count_nodes(pages.size)
            slab = self._storage.ready(manager.page_capacity, self._source.device())
            space = self._space(problem, rows, tables.shape[1], slab, served.addresses)
            _give(space, served, problem, pages)
            space.begin()
            for _ in range(problem.simulations):
                space.simulate()
                if served.trace is not None and served.trace.replayed:
                    _note(served.trace, space, rows)
            visits, values, broken = space.found(rows)
        manager.count_queries('recur', pages.size, pages.size, by_node=True)
        self._guard.report(broken, served.mode, served.env_ids, served.timesteps)
        seconds = time.perf_counter() - start
        self._timings['search'].record(seconds)
        self._timings['step'].record(seconds, problem.simulations)
        counts = [len(legal) or problem.slots for legal in problem.legal]
        return [row[:count].tolist() for row, count in zip(visits, counts)], values.tolist()

    def _space(self, problem: Problem, rows: int, width: int, slab: Slab, addresses: Tuple[int, ...]) -> Space:
        spaces = self._spaces
        addresses += (slab.address, )
        if addresses != spaces.addresses:
            spaces.moves += bool(spaces.kept)
            spaces.kept.clear()
            spaces.addresses = addresses
        kind = problem.slots, width, tuple(sorted(problem.rules.items()))
        fitting = [
            key for key in spaces.kept
            if key[2:] == kind and rows <= key[0] <= 2 * rows + 8 and key[1] >= problem.simulations
        ]
        if fitting:
            return spaces.kept[min(fitting)]
        if len(spaces.kept) >= MAX_SPACES:
            del spaces.kept[next(iter(spaces.kept))]
        space = Space(self._engine, self._source, slab, problem, rows, width)
        spaces.kept[(rows, problem.simulations) + kind] = space
        if self._source.device().type == 'cuda' and spaces.captures:
            self._capture(space)
        return space

    def _capture(self, space: Space) -> None:
        reason: Optional[Any] = 'its storage keeps moving' if self._spaces.moves >= MAX_MOVES else None
        try:
            if reason is None:
                space.capture()
                logger.info(
                    f'Captured a simulation for {space.rows} rows ({space.memory_mb:.1f} MiB with the trees)'
                )
        except RuntimeError as error:
            reason = str(error).split('\n', maxsplit=1)[0]
        if reason is not None:
            self._spaces.captures = False
            logger.warning(f'A search cannot be captured here ({reason}): it is launched from Python from now on')


def _give(space: Space, served: Any, problem: Problem, pages: np.ndarray) -> None:
    """Lay out what a search begins with."""
    rows, given = len(served.env_ids), space.given
    if space.rows > rows:
        space.empty_rows(rows)
    given.key.view(np.uint32)[:] = problem.seed & 0xFFFFFFFF, problem.number & 0xFFFFFFFF
    given.tables[:rows], given.counts[:rows] = served.roots
    given.timesteps[:rows], given.reward[:rows] = served.timesteps, problem.rewards
    given.pages[:len(pages), :rows] = pages
    order = np.full((rows, problem.slots), -1)
    for row, legal in enumerate(problem.legal):
        order[row, :len(legal) or problem.slots] = legal or range(problem.slots)
    given.order[:rows] = order
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
    tree = space.tree
    depths = tree.depth.long()
    parents = tree.path.gather(1, depths[:, None] - 1)[:, 0]
    predicted = to_cpu(torch.nan_to_num(space.predicted, 0.0, 0.0, 0.0)[:rows])
    taken = [to_cpu(part[:rows].clone()) for part in (parents, tree.action, depths)]
    trace.note_scalars(*taken, predicted[:, 0], predicted[:, 1], predicted[:, 2:])

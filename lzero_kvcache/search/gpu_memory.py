"""The memory of searches on a GPU: trees as tensors, and the captured graphs of a search, its begin and a simulation.

One CUDA graph is replayed for each simulation, so that fewer simulations need no new capture. Shapes are
those of :mod:`.tree_arrays`; ``E`` embedding. Triton is imported with the first search.
"""
import ctypes
from typing import Any, Callable, NamedTuple, Tuple

import numpy as np
import torch

from ..cache.pages import SCRATCH_PAGE
from ..engine.graphs import capture
from ..engine.slab import Slab, megabytes
from ..engine.step import Engine, StepOutput
from ..engine.transfer import Pinned, to_cpu
from ..engine.weights import Source, Weights
from .array_search import Problem
from .timesteps import NODE_OFFSETS, REANALYSIS_OFFSETS, observed_at
from .tree_arrays import FAR, FLOATS, Tree, tree_shapes


class _Sent(NamedTuple):
    """The inputs of a search, laid out in one piece of memory, so that one copy sends them."""
    key: Any  # [2] int32: one number of 64 bits
    order: Any  # [B, S] int32
    tables: Any  # [B, R] int32
    counts: Any  # [B] int32
    timesteps: Any  # [B] int32
    pages: Any  # [N - 1, B] int32, what simulations write
    prior: Any  # [B, S] float32
    reward: Any  # [B] float32
    logits: Any  # [B, P] float32, to draw actions by; nothing unless trees are sampled
    latents: Any  # [B, E] float32, the states of roots without contexts; nothing unless it is a reanalysis


class GpuMemory:
    """The memory of searches of one size, for at most ``rows`` rows and ``simulations`` simulations."""
    begins_with_states, offsets = False, NODE_OFFSETS

    def __init__(self, engine: Engine, source: Source, slab: Slab, context_pages: int, problem: Problem, rows: int,
                 matmul: str) -> None:
        self._engine, self._source, self._slab, self._context_pages = engine, source, slab, context_pages
        self.rows, self.simulations, self._slots = rows, problem.simulations, problem.slots
        self.rules, self._action_size = problem.rules, problem.action_size
        self._policy = engine.geometry.action_size * (1 + engine.geometry.continuous)
        self._device, self._matmul = source.device(), matmul
        self._make()
        tensors = [part for part in vars(self).values() if torch.is_tensor(part)]
        self.memory_mb = megabytes(*self.tree[:-1], self._inputs.memory, self._inputs.sent, *tensors)
        self.empty_rows(0)
        self._begin: Callable[[], None] = self._run_begin
        self.simulate: Callable[[], None] = self._run_simulation

    def _make(self) -> None:
        """Allocate everything."""
        rows, nodes, slots, device = self.rows, self.simulations + 1, self._slots, self._device
        floats, whole, indices = torch.float32, torch.int32, torch.int64
        shapes = tree_shapes(rows, self.simulations, slots, self._context_pages, self._action_size)
        self.tree = Tree(**{
            name: torch.zeros(shape, dtype=floats if name in FLOATS else whole, device=device)
            for name, shape in shapes.items()
        })
        self._make_sent()
        self._window = torch.zeros(self._context_pages + 1, rows, dtype=indices, device=device)
        self._counts, self.parents = (torch.zeros(rows, dtype=indices, device=device) for _ in range(2))
        self._positions = torch.zeros(2, rows, dtype=indices, device=device)
        self.actions = torch.zeros(rows, dtype=indices, device=device)
        if self._engine.geometry.continuous:
            self.actions = torch.zeros(rows, self._action_size, device=device)
        self.broken = torch.zeros(2, rows, dtype=whole, device=device)
        self._simulation = torch.zeros(rows, dtype=whole, device=device)
        self.predicted = torch.zeros(rows, 2 + self._policy, device=device)
        rules, others = self.rules, np.arange(nodes + 1, dtype=np.float32)
        self._explored = torch.from_numpy(explorations(others, rules.base, rules.init)).to(device)
        self._spread = torch.from_numpy(np.sqrt(others)).to(device)
        self._numbers = torch.tensor([rules.discount, rules.delta], dtype=floats, device=device)

    def _make_sent(self) -> None:
        rows, slots, device = self.rows, self._slots, self._device
        states = self._engine.geometry.embed_dim * self.begins_with_states
        sizes = _Sent((2, ), (rows, slots), (rows, self._context_pages), (rows, ), (rows, ), (self.simulations, rows),
                      (rows, slots), (rows, ), (rows, self._policy * self.rules.sampled), (rows, states))
        numbers = [int(np.prod(size)) for size in sizes]
        self._inputs = Pinned(torch.zeros(sum(numbers), dtype=torch.int32), device)
        kinds = [torch.int32] * 6 + [torch.float32] * 4
        given, self._sent = [
            _Sent(*(part.view(size).view(kind) for part, size, kind in zip(memory.split(numbers), sizes, kinds)))
            for memory in (self._inputs.memory, self._inputs.sent)
        ]
        self._given = _Sent(*(part.numpy() for part in given))

    @property
    def given(self) -> _Sent:
        """The inputs of the next search, to be written."""
        self._inputs.writable()
        return self._given

    def empty_rows(self, used: int) -> None:
        """Fill the rows from ``used`` on, which no environment has: no legal actions, and a page that is never read."""
        given = self.given
        given.order[used:], given.prior[used:], given.reward[used:], given.logits[used:] = -1, 0, 0, 0
        given.tables[used:], given.counts[used:], given.timesteps[used:] = 0, 1, 0
        given.pages[:, used:] = SCRATCH_PAGE

    def begin(self) -> None:
        """Send the inputs, and begin the search with them."""
        self._inputs.send()
        self._begin()

    def capture(self) -> None:
        """From now on, replay graphs."""
        self._inputs.send()
        captured = capture(self._device, self._run_begin, self._run_simulation)
        self._begin, self.simulate = captured.replays
        self.memory_mb += captured.memory_mb

    def _run_begin(self) -> None:
        from ..engine.linear_kernels import computed_in

        tree, sent = self.tree, self._sent
        self._weights: Weights = computed_in(self._source.read(True), self._matmul)
        tree.reward[:, 0] = sent.reward
        tree.tables[:, 0], tree.counts[:, 0] = sent.tables, sent.counts
        tree.child[:, 0].fill_(-1)
        tree.visits[:, 0].fill_(1)
        tree.value_sum[:, 0].fill_(0)
        tree.low.fill_(FAR)
        tree.high.fill_(-FAR)
        self.broken.fill_(0)
        self._simulation.fill_(0)
        if self.rules.sampled:
            self._draw(sent.logits)
        else:
            tree.order[:, 0], tree.prior[:, 0] = sent.order, sent.prior

    def _run_simulation(self) -> None:
        from ..engine.scalars import for_search

        self._select()
        for_search(self._step(), self.predicted)
        self._backup()
        if self.rules.sampled:
            self._draw(self.predicted[:, 2:])

    def _step(self) -> StepOutput:
        """The model's step at the nodes that were selected."""
        return self._engine.simulate(
            self._weights, self._slab, self._window.T, self._counts, self.actions, self._positions
        )

    def _select(self) -> None:
        from . import tree_kernels

        sent = self._sent
        self._launch(
            tree_kernels.select, *self.tree[:-1], sent.key.view(torch.int64), self._simulation, sent.timesteps,
            sent.pages, self.parents, self.actions, self._window, self._counts, self._positions, self._explored,
            self._spread, self._numbers, self.rows, self.simulations + 1, self._slots, self._action_size,
            self._engine.geometry.rotary_positions, *self.offsets, SLOTS=_padded(self._slots),
            ACTION=_padded(self._action_size), PAGES=self._context_pages, PADDED=_padded(self._context_pages),
            TWO_PLAYERS=self.rules.two_players, SAMPLED=self.rules.sampled, DRAWS_TIES=self.rules.draws_ties,
            INDEX_FOR_DEPTH=self.rules.index_for_depth
        )

    @property
    def depths(self) -> torch.Tensor:
        """How deep the nodes are that were selected ``[B]``, as LightZero's tree tells it."""
        return self.parents if self.rules.index_for_depth else self.tree.depth

    def _backup(self) -> None:
        from . import tree_kernels

        tree = self.tree
        self._launch(
            tree_kernels.backup, tree.visits, tree.value_sum, tree.reward, tree.prior, tree.child, tree.low, tree.high,
            tree.path, tree.depth, self.broken, self.predicted, self._simulation, self._numbers,
            self.rows, self.simulations + 1, self._slots, self._policy, SLOTS=_padded(self._slots),
            POLICY=_padded(self._policy), TWO_PLAYERS=self.rules.two_players, SAMPLED=self.rules.sampled
        )

    def _draw(self, policy: torch.Tensor) -> None:
        """Draw the actions of the newest node."""
        from . import sampling_kernels

        tree, continuous = self.tree, self._engine.geometry.continuous
        draw = sampling_kernels.draw_continuous if continuous else sampling_kernels.draw_discrete
        self._launch(
            draw, tree.draws, tree.order, tree.prior, self._sent.key.view(torch.int64), self._simulation,
            policy, policy.stride(0), self.simulations + 1, self._slots, self._engine.geometry.action_size,
            SLOTS=_padded(self._slots), POLICY=_padded(self._policy), num_warps=8
        )

    def _launch(self, kernel: Any, *args: Any, num_warps: int = 1, **constants: Any) -> None:
        """Launch a kernel with a program for each row, whose numbers are those of the compiled trees."""
        from ..engine.kernel_launch import launch

        launch(kernel, (self.rows, ), *args, num_warps=num_warps, enable_fp_fusion=False, **constants)

    def found(self, rows: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the roots: visits in their order ``[B, S]``, values ``[B]``, drawn actions ``[B, S, A]``, and how many
        predictions were no numbers, with the depth of the first ``[2, B]``."""
        tree = self.tree
        children = tree.child[:, 0].gather(1, tree.order[:, 0].clamp(min=0).long())
        visits = tree.visits.gather(1, children.clamp(min=0).long()).masked_fill_(children < 0, 0)
        values = (tree.value_sum[:, 0] / tree.visits[:, 0]).view(torch.int32)
        draws = tree.draws[:, 0].flatten(1).view(torch.int32)
        parts = visits, draws, values[:, None], self.broken.T
        numbers = to_cpu(torch.cat(parts, dim=1)[:rows])
        floats, slots = np.ascontiguousarray(numbers[:, self._slots:-2]).view(np.float32), self._slots
        return numbers[:, :slots], floats[:, -1], floats[:, :-1].reshape(rows, slots, -1), numbers[:, -2:].T


class _OfStates(GpuMemory):
    """The memory of both kinds of reanalysis: they begin at states, and have pages of their own."""
    begins_with_states, offsets = True, REANALYSIS_OFFSETS

    def __init__(self, engine: Engine, source: Source, context_pages: int, problem: Problem, rows: int,
                 matmul: str) -> None:
        geometry = engine.geometry
        slab = Slab(geometry.layers, geometry.heads, geometry.head_dim)
        super().__init__(engine, source, slab, context_pages, problem, rows, matmul)
        self.memory_mb += slab.memory_mb

    def _make_pages(self, pages: int) -> None:
        """Pages ``[P, B]`` of the rows' own."""
        self._slab.ensure(pages * self.rows + 1, self._device)
        self._pages = torch.arange(1, pages * self.rows + 1, device=self._device).view(pages, self.rows)
        self._begun_at = torch.zeros(2, self.rows, dtype=torch.int64, device=self._device)  # positions of the states

    def _run_begin(self) -> None:
        super()._run_begin()
        if self._engine.geometry.rotary:
            self._begun_at.copy_(observed_at(self._sent.timesteps.long()) % self._engine.geometry.rotary_positions)

    def _begin_with(self, states: torch.Tensor) -> None:
        """Begin the rows' contexts with states ``[B, E]``."""
        self._engine.begin_in_place(self._weights, self._slab, self._pages[0], self._begun_at, states)


class GrownReanalysis(_OfStates):
    """Of a reanalysis whose contexts grow along its paths: each row has a page for each of its nodes."""

    def _make(self) -> None:
        super()._make()
        self._make_pages(self.simulations + 1)
        self._given_pages = to_cpu(self._pages)

    def empty_rows(self, used: int) -> None:
        """Empty rows have pages of their own as well: a reanalysis has no scratch page."""
        super().empty_rows(used)
        first, *later = self._given_pages[:, used:]
        self.given.tables[used:, 0], self.given.pages[:, used:] = first, later

    def _run_begin(self) -> None:
        super()._run_begin()
        self._begin_with(self._sent.latents)


class Reanalysis(_OfStates):
    """Of a reanalysis whose nodes have no context but the state before them: each row has a page for that state, and
    one that its simulations write."""

    def _make(self) -> None:
        super()._make()
        self._make_pages(2)
        nodes, rows, device = self.simulations + 1, self.rows, self._device
        self._rows = torch.arange(rows, device=device)
        self.latents = torch.zeros(nodes, rows, self._engine.geometry.embed_dim, device=device)

    def _run_begin(self) -> None:
        super()._run_begin()
        self.latents[0] = self._sent.latents

    def _step(self) -> StepOutput:
        self._begin_with(self.latents[self.parents, self._rows])
        output = self._engine.simulate(
            self._weights, self._slab, self._pages.T, self._counts, self.actions, self._positions
        )
        self.latents.index_copy_(0, self._simulation[:1].long() + 1, output.latent_state.squeeze(1)[None])
        return output


def explorations(others: np.ndarray, base: np.float32, init: np.float32) -> np.ndarray:
    """The exploration terms of the compiled trees in float32, by how often a node was visited. Their logarithm is the C
    library's; numpy's is off by a last bit here and there."""
    logarithm = ctypes.CDLL('libm.so.6').logf
    logarithm.restype, logarithm.argtypes = ctypes.c_float, [ctypes.c_float]
    shares = (others + base + 1) / base
    return np.array([logarithm(share) for share in shares], np.float32) + init


def _padded(size: int) -> int:
    from triton import next_power_of_2

    return int(max(2, next_power_of_2(size)))

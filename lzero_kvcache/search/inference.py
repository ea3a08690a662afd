"""All inference over pages for one model: roots, searches in arrays, nodes by node or by key, reanalyses.

``B`` rows, ``E`` embedding, ``A`` numbers of a continuous action, ``P`` policy logits. A latent state is ``[B, E]``.
"""
import time
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterator, List, Optional, Sequence

import numpy as np
import torch

from ..cache.base import COLLECT, PagedCacheManager
from ..cache.nodes import NodeTable
from ..cache.pages import extend
from ..config import CacheConfig
from ..engine.backends import Backend
from ..engine.packing import pack
from ..engine.step import Engine, StepOutput, checksum
from ..engine.store import PageStore
from ..engine.transfer import send, to_cpu
from ..engine.weights import Source
from .array_search import ArraySearch
from .compiled_model import CompiledModel
from .cpu_search import CpuSearch
from .gpu_search import GpuSearch
from .guard import NanGuard
from .open_steps import OpenStep, OpenSteps
from .roots import RootInference
from .shared import Shared, hash_rows, zero_for_nan
from .timesteps import node_positions, observed_at, reanalysis_timesteps_of, timesteps_of
from .timing import Timing


class Inference:
    """All inference of one model."""

    def __init__(self, source: Source, encode: Callable[[torch.Tensor], torch.Tensor], manager: PagedCacheManager,
                 store: PageStore, options: CacheConfig, validator: Any, read_network: Callable[[], Any]) -> None:
        self.engine = Engine(source.geometry)
        self.backend = Backend(options.backend, self.engine, source)
        self.timings = {'search': Timing(), 'step': Timing()}
        self.open = OpenSteps(manager, validator)
        guard = NanGuard(options.on_nan, manager.count_skipped, options.dtype)
        self.shared = Shared(self.engine, source, manager, store, guard, self.open, self.timings)
        model = CompiledModel(read_network, source)
        store.counted += [self.backend.replayed.graphs, self.engine.windows, model.memory]
        self.roots = RootInference(self.shared, encode, model, self.backend.replays)
        self._cpu_search, self._gpu_search = CpuSearch(model, self.shared), GpuSearch(self.shared, options.matmul)

    @property
    def in_arrays(self) -> ArraySearch:
        """Searches in arrays, on the device that the model is on."""
        return self._cpu_search if self.shared.source.device().type == 'cpu' else self._gpu_search

    # ---- by node: the tree is LightZero's, and contexts are found by their place in it ------------------------------

    @contextmanager
    def search_by_node(self, step: Optional[OpenStep], simulations: int) -> Iterator[Callable[..., np.ndarray]]:
        """A context for a search from the roots of an open step; gives :meth:`expand` for it."""
        step = self.open.check_searchable(step)
        assert step.roots is not None
        start, manager = time.perf_counter(), self.shared.manager
        step.searches += 1
        try:
            with manager.lease() as lease:
                lease.hold(step.roots[0])
                nodes = NodeTable(step.roots, lease.allocate(simulations * len(step.env_ids)))
                manager.count_nodes(nodes.pages.size)
                yield partial(self.expand, step, nodes)
        finally:
            step.searches -= 1
        self.timings['search'].record(time.perf_counter() - start)

    @torch.no_grad()
    def expand(self, step: OpenStep, nodes: NodeTable, simulation: int, path: np.ndarray, columns: np.ndarray,
               actions: np.ndarray, depths: Sequence[int]) -> np.ndarray:
        """One simulation of a search by node; one copy to the device, one back.

        ``path [B]`` and ``columns [B]`` are the index in the search path and the row of each node, ``depths [B]`` what
        LightZero's tree passes as such. Returns reward, value and policy logits ``[B, 2 + P]``; 0 for what is skipped.
        """
        start, shared = time.perf_counter(), self.shared
        contexts, pages = nodes.expand(simulation, path, columns), nodes.pages[simulation]
        positions = node_positions(step.timesteps, depths)
        numbers = pack(self.engine.geometry, contexts, pages, positions, actions, nodes.longest(simulation))
        result = self.backend.step(shared.weights_of(step), shared.slab(), numbers, None, step.addresses)
        shared.manager.count_queries('recur', len(pages), len(pages), by_node=True)
        assert result.search is not None  # the actions came from the CPU
        predicted = to_cpu(result.search)
        if step.trace is not None:
            step.trace.note_node(path, actions, depths, result.output)
        what = 'A reward, value or policy'
        kept = shared.guard.finite(predicted, what, step.mode, step.env_ids, step.timesteps)
        self.timings['step'].record(time.perf_counter() - start)
        return predicted if len(kept) == len(predicted) else np.nan_to_num(predicted, posinf=0.0, neginf=0.0)

    # ---- by key: what LightZero's own searches, and those of users, ask for ------------------------------------------

    def node(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int], start_pos: Any,
             in_reanalysis: bool = False) -> StepOutput:
        """One simulation whose contexts are found by key: one copy to the device and one back, and one more to the
        device if contexts are lost. Predictions of skipped rows are 0."""
        start, shared, manager = time.perf_counter(), self.shared, self.shared.manager
        rows, parents, device = len(latent), hash_rows(latent), shared.source.device()
        timesteps = (reanalysis_timesteps_of if in_reanalysis else timesteps_of)(start_pos, rows)
        positions = node_positions(timesteps, search_depth, in_reanalysis)
        step = None if in_reanalysis else self._step_of(parents)
        with manager.lease() as lease:
            step = step or OpenStep(COLLECT, list(range(rows)), (), lease, None)
            step.check_rows(rows)
            mode, env_ids, pages = step.mode, step.env_ids, lease.allocate(rows)
            contexts = manager.find_recur(mode, env_ids, parents)
            lost = np.flatnonzero(contexts[1] == 0)
            manager.count_queries('recur', rows, rows - len(lost))
            lease.hold(contexts[0])
            if len(lost):
                rebuilt = shared.take_pages(lease, contexts, lost, timesteps)
                begun, states = send(device, rebuilt, latent[lost])
                self.engine.begin(shared.weights_of(step), shared.slab(), begun[0], states, begun[1])
            weights, slab, on_device = shared.weights_of(step), shared.slab(), action.to(device)
            numbers = pack(self.engine.geometry, contexts, pages, positions, None, int(contexts[1].max()))
            output = self.backend.step(weights, slab, numbers, on_device, step.addresses).output
            on_cpu = to_cpu(torch.cat([output.latent_state.reshape(rows, -1), checksum(output)], dim=1))
            kept = shared.guard.finite(on_cpu[:, -1:], 'A reward, value or policy', mode, env_ids, timesteps)
            keys, nodes = hash_rows(on_cpu[:, :-1]), extend(contexts, pages)
            if len(kept) < rows:
                env_ids, keys = [env_ids[row] for row in kept], [keys[row] for row in kept]
                nodes = nodes[0][kept], nodes[1][kept]
            manager.store_recur(env_ids, keys, nodes)
            step.seen.update(keys)
        if step.trace is not None:
            step.trace.note_keyed_node(latent, action, search_depth, output)
        self.timings['step'].record(time.perf_counter() - start)
        return output if len(kept) == rows else output.map(zero_for_nan)

    def _step_of(self, parents: List[int]) -> Optional[OpenStep]:
        """The open step that nodes below these parents are of."""
        for step in self.open.steps:
            if not step.searches:
                self._give_roots_keys(step)
        return self.open.having(parents)

    def _give_roots_keys(self, step: OpenStep) -> None:
        """Store the roots under keys too, where a search by key looks."""
        if step.roots is None or step.keys is not None:
            return
        assert step.latents is not None
        kept, hashed = step.kept, hash_rows(to_cpu(step.latents))
        step.keys = [step.env_ids[row] for row in kept], [hashed[row] for row in kept]
        step.seen.update(hashed)
        self.shared.manager.store_init(step.mode, *step.keys, (step.roots[0][kept], step.roots[1][kept]))

    # ---- without contexts --------------------------------------------------------------------------------------------

    def node_alone(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int],
                   start_pos: Any) -> StepOutput:
        """One simulation of a reanalysis: as :meth:`node`, but rows have no contexts, and none is stored."""
        source, geometry, positions = self.shared.source, self.engine.geometry, None
        device = source.device()
        if geometry.rotary:
            timesteps = reanalysis_timesteps_of(start_pos, len(latent))
            after = node_positions(timesteps, search_depth, in_reanalysis=True)
            numbers = np.stack([observed_at(timesteps), *after]) % geometry.rotary_positions
            positions, state = send(device, numbers, latent)
        else:
            [state] = send(device, latent)
        return self.engine.step_alone(source.read(False), state, torch.as_tensor(action).to(device), positions)

"""All inference over pages for one model: roots, whole searches, nodes by place or by key, reanalyses.

``B`` rows, ``E`` embedding, ``A`` numbers of a continuous action, ``P`` policy logits. A latent state is ``[B, E]``.
"""
import time
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache.manager import COLLECT
from ..cache.nodes import NodeTable
from ..cache.pages import Lease, extend
from ..engine.step import StepOutput, checksum
from ..engine.transfer import send, to_cpu
from .inference_base import hash_rows, zero_for_nan
from .open_steps import OpenStep
from .roots import RootInference
from .timesteps import reanalysis_timesteps_of, steps_after, timesteps_of
from .whole import Found, Problem, WholeSearch


class Inference(RootInference):
    """All inference of one model."""

    # ---- in arrays ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, step: Optional[OpenStep], problem: Problem) -> Found:
        """Search in arrays from the roots of an open step, on the model's device."""
        return self._in_arrays().run(self.open.check_searchable(step), problem)

    @torch.no_grad()
    def reanalyze(self, problem: Problem, latent: np.ndarray, start_pos: Any, grows: bool = False) -> Found:
        """Search in arrays from states ``[B, E]`` without contexts, some rows at a time; ``start_pos`` are timesteps
        ``[batch, unroll]`` or ``[B]``, as a replay buffer passes them. Contexts grow along the paths; or else a node's
        is the state before it."""
        timesteps = reanalysis_timesteps_of(start_pos, len(latent))
        return self._in_arrays().reanalyze(problem, latent, timesteps, self._source.addresses(), grows)

    def _in_arrays(self) -> WholeSearch:
        return self._whole if self._source.device().type == 'cpu' else self._device

    # ---- by node: the tree is LightZero's, and contexts are found by their place in it ------------------------------

    @contextmanager
    def search_by_node(self, step: Optional[OpenStep], simulations: int) -> Iterator[Callable[..., np.ndarray]]:
        """A context for a search from the roots of an open step; gives :meth:`expand` for it."""
        step = self.open.check_searchable(step)
        assert step.roots is not None
        start = time.perf_counter()
        step.searches += 1
        try:
            with self._manager.lease() as lease:
                lease.hold(step.roots[0])
                nodes = NodeTable(step.roots, lease.allocate(simulations * len(step.env_ids)))
                self._manager.count_nodes(nodes.pages.size)
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
        start = time.perf_counter()
        contexts, pages = nodes.expand(simulation, path, columns), nodes.pages[simulation]
        result = self._step(
            step, contexts, pages, steps_after(step.timesteps, depths), actions, None, nodes.longest(simulation)
        )
        self._manager.count_queries('recur', len(pages), len(pages), by_node=True)
        assert result.search is not None  # the actions came from the CPU
        predicted = to_cpu(result.search)
        if step.trace is not None:
            step.trace.note_node(path, actions, depths, result.output)
        what = 'A reward, value or policy'
        kept = self._guard.finite(predicted, what, step.mode, step.env_ids, step.timesteps)
        self.timings['step'].record(time.perf_counter() - start)
        return predicted if len(kept) == len(predicted) else np.nan_to_num(predicted, posinf=0.0, neginf=0.0)

    # ---- by key: what LightZero's own searches, and those of users, ask for ------------------------------------------

    def node(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int], start_pos: Any,
             reanalysis: bool = False) -> StepOutput:
        """One simulation whose contexts are found by key: one copy to the device and one back, and one more to the
        device if contexts are lost. Predictions of skipped rows are 0."""
        start = time.perf_counter()
        rows, parents = len(latent), hash_rows(latent)
        timesteps = (reanalysis_timesteps_of if reanalysis else timesteps_of)(start_pos, rows)
        step = None if reanalysis else self._step_of(parents)
        with self._manager.lease() as lease:
            step = step or OpenStep(COLLECT, list(range(rows)), (), lease, None)
            step.check_rows(rows)
            output, kept = self._node(
                lease, step, parents, latent, action, timesteps, steps_after(timesteps, search_depth), reanalysis
            )
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

    def _node(self, lease: Lease, step: OpenStep, parents: List[int], latent: np.ndarray, action: torch.Tensor,
              timesteps: np.ndarray, node_timesteps: np.ndarray, reanalysis: bool) -> Tuple[StepOutput, np.ndarray]:
        manager, rows, device = self._manager, len(latent), self._source.device()
        mode, env_ids = step.mode, step.env_ids
        pages = lease.allocate(rows)
        contexts = manager.find_recur(mode, env_ids, parents)
        lost = np.flatnonzero(contexts[1] == 0)
        manager.count_queries('recur', rows, rows - len(lost))
        lease.hold(contexts[0])
        if len(lost):
            rebuilt = self._take_pages(lease, contexts, lost, 2 * timesteps[lost])
            begun, states = send(device, rebuilt, latent[lost])
            self.engine.begin(self._weights_of(step), self._slab(), begun[0], states, begun[1])
        output = self._step(
            step, contexts, pages, node_timesteps, None, action.to(device), int(contexts[1].max()), reanalysis
        ).output
        on_cpu = to_cpu(torch.cat([output.latent_state.reshape(rows, -1), checksum(output)], dim=1))
        kept = self._guard.finite(on_cpu[:, -1:], 'A reward, value or policy', mode, env_ids, timesteps)
        keys, nodes = hash_rows(on_cpu[:, :-1]), extend(contexts, pages)
        if len(kept) < rows:
            env_ids, keys = [env_ids[row] for row in kept], [keys[row] for row in kept]
            nodes = nodes[0][kept], nodes[1][kept]
        manager.store_recur(env_ids, keys, nodes)
        step.seen.update(keys)
        return output, kept

    def _give_roots_keys(self, step: OpenStep) -> None:
        """Store the roots under keys too, where a search by key looks."""
        if step.roots is None or step.keys is not None:
            return
        assert step.latents is not None
        kept, hashed = step.kept, hash_rows(to_cpu(step.latents))
        step.keys = [step.env_ids[row] for row in kept], [hashed[row] for row in kept]
        step.seen.update(hashed)
        self._manager.store_init(step.mode, *step.keys, (step.roots[0][kept], step.roots[1][kept]))

    # ---- without contexts --------------------------------------------------------------------------------------------

    def reanalysis(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int],
                   start_pos: Any) -> StepOutput:
        """One simulation of a reanalysis: as :meth:`node`, but rows have no contexts, and none is stored."""
        device, positions = self._source.device(), None
        if self.engine.geometry.rotary:
            timesteps = reanalysis_timesteps_of(start_pos, len(latent))
            # Both other tokens have the action's angle, as in LightZero's reanalysis.
            after = self._angle(2 * steps_after(timesteps, search_depth) + 3)
            positions, state = send(device, np.stack([self._angle(2 * timesteps), after, after]), latent)
        else:
            [state] = send(device, latent)
        return self.engine.step_alone(self._source.read(False), state, torch.as_tensor(action).to(device), positions)

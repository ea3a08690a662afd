"""Root inference: the states that searches begin at, each in its environment's context.

``B`` rows, ``R`` pages of a context, ``A`` numbers of a continuous action, ``E`` embedding. numba is imported with the
first root inference that is compiled.
"""
from typing import Any, Hashable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache.base import CURRENT
from ..cache.manager import COLLECT
from ..cache.pages import Rows, extend
from ..engine.packing import pack, unpack
from ..engine.program import OUTPUTS, Batch, PagedNetwork
from ..engine.step import StepOutput, checksum
from ..engine.transfer import send, to_cpu
from .inference_base import InferenceBase, hash_rows, zero_for_nan
from .open_steps import OpenStep
from .timesteps import timesteps_of


class RootInputs(NamedTuple):
    """Inputs of a root inference."""
    contexts: Rows  # of the last roots; 0 pages where an episode begins
    pages: np.ndarray  # [B], to write
    timesteps: np.ndarray  # [B]
    actions: np.ndarray  # [B] or [B, A]; zeros where an episode begins
    rebuilt: np.ndarray  # [3, K], lost contexts that are rebuilt first: their pages, angles and rows
    last: Optional[torch.Tensor]  # [B, E], last latent states, if a context is rebuilt
    observations: torch.Tensor  # [B, ...], the current ones


class RootOutput(NamedTuple):
    """Outputs of a root inference."""
    latent: torch.Tensor  # [B, E]
    output: StepOutput
    on_cpu: np.ndarray  # [B, K + 1], latent states or their sums, and sums of predictions; finite where these are


class RootInference(InferenceBase):
    """Root inference: finds contexts by environment or by key, steps, and stores the new contexts."""

    def root(self, last_obs: torch.Tensor, last_actions: Sequence[Any], current_obs: torch.Tensor,
             start_pos: Any) -> StepOutput:
        """The roots of a search, each in its environment's context; one copy to the device, one back.

        ``last_actions [B]`` led from ``last_obs`` to ``current_obs [B, ...]``; -1 where an episode starts. There are no
        rewards, and predictions of skipped rows are 0. The first root inference of an open step finds contexts by
        environment. Any other one is for environments 0 to ``B - 1`` of collection, and finds contexts by key.
        """
        self.open.end_abandoned()
        rows = len(current_obs)
        step = self.open.awaiting_roots()
        if len(self.open.steps) <= (step is not None):
            self._manager.clear_recur_cache()  # unless a search around this one needs its nodes
        if step is not None:
            step.check_rows(rows)
            return self._root(step, last_obs, last_actions, current_obs, timesteps_of(start_pos, rows))
        with self._manager.lease() as lease:
            by_hand = OpenStep(COLLECT, list(range(rows)), (), lease, None, by_key=True)
            return self._root(by_hand, last_obs, last_actions, current_obs, timesteps_of(start_pos, rows))

    def _root(self, step: OpenStep, last_obs: torch.Tensor, last_actions: Sequence[Any], current_obs: torch.Tensor,
              timesteps: np.ndarray) -> StepOutput:
        manager, mode, env_ids = self._manager, step.mode, step.env_ids
        rows = len(current_obs)
        actions, going = self.actions_of(last_actions, rows)
        contexts, last, missing = self._last_contexts(step, last_obs, going)
        manager.count_queries('init', int(going.sum()), int(going.sum()) - len(missing))
        before = contexts[0].copy(), contexts[1].copy()
        pages, lost = step.lease.allocate(rows), missing
        if self._guard.skips and last is not None and len(missing):  # a state with nan begins no context
            lost = missing[to_cpu(torch.isfinite(last).all(1))[missing]]
        rebuilt = self._take_pages(step.lease, contexts, lost, 2 * timesteps[lost])
        given = RootInputs(contexts, pages, timesteps, actions, rebuilt, last, current_obs)
        latent, output, on_cpu = self._step_roots(step, given)
        kept = self._finite_roots(on_cpu, step, timesteps)
        roots = extend(contexts, pages)
        kept_roots = roots[0][kept], roots[1][kept]
        if step.by_key:
            keys = hash_rows(on_cpu[:, :-1])
            manager.store_init(mode, [env_ids[row] for row in kept], [keys[row] for row in kept], kept_roots)
        else:
            step.roots, step.before, step.kept = roots, before, kept
            step.timesteps, step.latents = timesteps, latent
            stored = np.zeros_like(roots[0]), np.zeros_like(roots[1])  # environments without a root begin afresh
            stored[0][kept], stored[1][kept] = kept_roots
            manager.store_init(mode, env_ids, [CURRENT] * rows, stored)
        if step.trace is not None:
            step.trace.note_root(last_obs, last_actions, current_obs, timesteps, missing, output)
        return output if len(kept) == rows else output.map(zero_for_nan)

    def _last_contexts(self, step: OpenStep, last_obs: torch.Tensor, going: np.ndarray
                       ) -> Tuple[Rows, Optional[torch.Tensor], np.ndarray]:
        """The contexts of the last roots, the last latent states where they are needed, and the rows whose context is
        missing. By environment, last observations are encoded only if a context is missing."""
        manager, rows = self._manager, len(going)
        tables, counts = np.zeros((rows, manager.width), np.int64), np.zeros(rows, np.int64)
        # All rows at once, as they were encoded when they were current: another batch size would change last bits.
        last = self._latents(last_obs) if step.by_key and going.any() else None
        continued = np.flatnonzero(going)
        if len(continued):
            keys: List[Hashable] = [CURRENT] * len(continued)
            if last is not None:
                hashed = hash_rows(to_cpu(last))
                keys = [hashed[row] for row in continued]
            env_ids = [step.env_ids[row] for row in continued]
            tables[continued], counts[continued] = manager.find_init(step.mode, env_ids, keys)
            step.lease.hold(tables)
        missing = np.flatnonzero(going & (counts == 0))
        if len(missing) and last is None:
            last = self._latents(last_obs)
        return (tables, counts), last, missing

    def _step_roots(self, step: OpenStep, given: RootInputs) -> RootOutput:
        """Encode and step: by one compiled call if the search that follows is compiled, by a graph that a GPU replays,
        or else by torch."""
        if step.in_arrays and self._source.device().type == 'cpu' and not self._source.is_training():
            return self._run_compiled(step, given)
        if not step.by_key and self.backend.replays and self._root_graphs.serves():
            self._rebuild(step, given, send(self._source.device(), given.rebuilt)[0])
            replayed = self._root_graphs.run(
                self._slab(), self._packed(given, self.engine.geometry.width), given.observations, step.addresses
            )
            if replayed is not None:
                output, sums = replayed
                return RootOutput(output.latent_state.squeeze(1), output, sums)
            given = given._replace(rebuilt=given.rebuilt[:, :0])  # that is done
        return self._launch_roots(step, given)

    def _run_compiled(self, step: OpenStep, given: RootInputs) -> RootOutput:
        """One compiled call, and another before it if contexts are rebuilt."""
        from . import compiled_search

        network, _held = self._model.network_at(step.addresses)
        (tables, counts), rows = given.contexts, len(given.pages)
        step.shift = shift = self._model.shift()
        sizes = network.embed, network.embed, network.value[-1, OUTPUTS], network.policy
        sequence, latent, value, policy = (np.empty((rows, size), np.float32) for size in sizes)
        observations = np.zeros((0, 0), np.float32)
        if len(network.encoder) and given.observations.ndim == 2 and given.observations.dtype == torch.float32:
            observations = given.observations.contiguous().numpy()
        else:
            latent[:] = self._latents(given.observations).numpy()
        paged = PagedNetwork(network, shift, self._slab().data.numpy())
        begun, started, lost = given.rebuilt
        if len(begun):
            assert given.last is not None
            self._model.begin(paged, tables[lost], begun, started, given.last[lost].numpy())
        angles = 2 * given.timesteps - (counts > 0), 2 * given.timesteps
        batch = Batch(
            tables, counts, given.pages, np.stack(angles), given.actions.reshape(rows, -1).astype(np.float32),
            observations, latent=latent, sequence=sequence, value=value, policy=policy
        )
        self._model.run(compiled_search.step_roots, (paged, batch, False), network, tables.shape[1], rows)
        parts = [torch.from_numpy(part).unsqueeze(1) for part in (sequence, latent, policy, value)]
        output = StepOutput(parts[0], parts[1], None, parts[2], parts[3])
        sums = np.stack([latent.sum(1), value.sum(1) + policy.sum(1)], axis=1)
        return RootOutput(torch.from_numpy(latent), output, sums)

    def _launch_roots(self, step: OpenStep, given: RootInputs) -> RootOutput:
        engine, weights, slab, counts = self.engine, self._weights_of(step), self._slab(), given.contexts[1]
        latent = self._latents(given.observations)
        numbers, rebuilt = send(self._source.device(), self._packed(given, int(counts.max())), given.rebuilt)
        self._rebuild(step, given, rebuilt)
        page_ids, page_counts, positions, action = unpack(engine.geometry, numbers)
        if counts.any():
            output = engine.step(weights, slab, page_ids, page_counts, action, positions, latent)
        else:
            output = engine.first(weights, slab, page_ids[:, -1], latent, positions[1])
        # Keys need whole latent states; otherwise a sum is enough to see whether they are finite.
        states = latent if step.by_key else latent.sum(1, keepdim=True)
        return RootOutput(latent, output, to_cpu(torch.cat([states, checksum(output)], dim=1)))

    def _packed(self, given: RootInputs, longest: int) -> np.ndarray:
        # Where an episode begins there is no action, nor an angle below 0.
        angles = 2 * given.timesteps - (given.contexts[1] > 0), 2 * given.timesteps
        return pack(self.engine.geometry, given.contexts, given.pages, angles, given.actions, longest)

    def _rebuild(self, step: OpenStep, given: RootInputs, rebuilt: torch.Tensor) -> None:
        """Rebuild lost contexts; ``rebuilt`` is ``given.rebuilt`` on the device."""
        if rebuilt.shape[1]:
            assert given.last is not None
            self.engine.begin(self._weights_of(step), self._slab(), rebuilt[0], given.last[rebuilt[2]], rebuilt[1])

    def _finite_roots(self, on_cpu: np.ndarray, step: OpenStep, timesteps: np.ndarray) -> np.ndarray:
        """Rows ``[K]`` whose latent state, value and policy are finite."""
        kept = self._guard.finite(on_cpu[:, :-1], 'A latent state', step.mode, step.env_ids, timesteps)
        return kept[self._guard.finite(
            on_cpu[kept, -1:], 'A value or policy', step.mode, [step.env_ids[row] for row in kept], timesteps[kept]
        )]

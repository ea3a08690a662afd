"""Root inference: the states that searches begin at, each in its environment's context.

``B`` rows, ``R`` pages of a context, ``A`` numbers of a continuous action, ``E`` embedding. Modules that compile are
imported with the first root inference that is compiled.
"""
from typing import Any, Callable, Hashable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache.base import COLLECT, CURRENT
from ..cache.pages import Rows, extend
from ..engine.packing import pack, unpack
from ..engine.program import OUTPUTS, Batch, PagedNetwork
from ..engine.root_graph import RootGraphs
from ..engine.step import StepOutput, checksum
from ..engine.transfer import send, to_cpu
from ..engine.weights import Geometry
from .compiled_model import CompiledModel
from .open_steps import OpenStep
from .shared import Shared, hash_rows, zero_for_nan
from .timesteps import Positions, root_positions, timesteps_of


class RootInputs(NamedTuple):
    """Inputs of a root inference."""
    contexts: Rows  # of the last roots; 0 pages where an episode begins
    pages: np.ndarray  # [B], to write
    positions: Positions
    actions: np.ndarray  # [B] or [B, A]; zeros where an episode begins
    rebuilt: np.ndarray  # [3, K], lost contexts that are rebuilt first: their pages, positions and rows
    last: Optional[torch.Tensor]  # [B, E], last latent states, if a context is rebuilt
    observations: torch.Tensor  # [B, ...], the current ones


class RootOutput(NamedTuple):
    """Outputs of a root inference."""
    latent: torch.Tensor  # [B, E]
    output: StepOutput
    on_cpu: np.ndarray  # [B, K + 1], latent states or their sums, and sums of predictions; finite where these are


class RootInference:
    """Root inference: finds contexts by environment or by key, steps, and stores the new contexts."""

    def __init__(self, shared: Shared, encode: Callable[[torch.Tensor], torch.Tensor], model: CompiledModel,
                 replays: bool) -> None:
        self._shared, self._encode, self._model = shared, encode, model
        self._replays = replays  # whether a GPU replays it as a graph, where it can
        self._graphs = RootGraphs(shared.engine, shared.source, encode)
        shared.store.counted.append(self._graphs.replayed.graphs)

    def infer(self, last_obs: torch.Tensor, last_actions: Sequence[Any], current_obs: torch.Tensor,
              start_pos: Any) -> StepOutput:
        """The roots of a search, each in its environment's context; one copy to the device, one back.

        ``last_actions [B]`` led from ``last_obs`` to ``current_obs [B, ...]``; -1 where an episode starts. There are no
        rewards, and predictions of skipped rows are 0. The first root inference of an open step finds contexts by
        environment. Any other one is for environments 0 to ``B - 1`` of collection, and finds contexts by key.
        """
        manager, opened, rows = self._shared.manager, self._shared.open, len(current_obs)
        opened.end_abandoned()
        step = opened.awaiting_roots()
        if len(opened.steps) <= (step is not None):
            manager.clear_recur_cache()  # unless a search around this one needs its nodes
        if step is not None:
            step.check_rows(rows)
            return self._infer(step, last_obs, last_actions, current_obs, timesteps_of(start_pos, rows))
        with manager.lease() as lease:
            by_hand = OpenStep(COLLECT, list(range(rows)), (), lease, None, by_key=True)
            return self._infer(by_hand, last_obs, last_actions, current_obs, timesteps_of(start_pos, rows))

    def _infer(self, step: OpenStep, last_obs: torch.Tensor, last_actions: Sequence[Any], current_obs: torch.Tensor,
               timesteps: np.ndarray) -> StepOutput:
        manager, mode, env_ids = self._shared.manager, step.mode, step.env_ids
        rows = len(current_obs)
        actions, going = actions_of(self._shared.engine.geometry, last_actions, rows)
        contexts, last, missing = self._last_contexts(step, last_obs, going)
        manager.count_queries('init', int(going.sum()), int(going.sum()) - len(missing))
        before = contexts[0].copy(), contexts[1].copy()
        pages, lost = step.lease.allocate(rows), missing
        if self._shared.guard.skips and last is not None and len(missing):  # a state with nan begins no context
            lost = missing[to_cpu(torch.isfinite(last).all(1))[missing]]
        rebuilt = self._shared.take_pages(step.lease, contexts, lost, timesteps)
        given = RootInputs(contexts, pages, root_positions(timesteps, contexts[1]), actions, rebuilt, last, current_obs)
        latent, output, on_cpu = self._step_roots(step, given)
        finite = self._shared.guard.finite
        kept = finite(on_cpu[:, :-1], 'A latent state', mode, env_ids, timesteps)
        kept = kept[finite(
            on_cpu[kept, -1:], 'A value or policy', mode, [env_ids[row] for row in kept], timesteps[kept])]
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
        manager, rows = self._shared.manager, len(going)
        tables, counts = np.zeros((rows, manager.context_pages), np.int64), np.zeros(rows, np.int64)
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
        source = self._shared.source
        if step.in_arrays and source.device().type == 'cpu' and not source.is_training():
            return self._run_compiled(step, given)
        if not step.by_key and self._replays and self._graphs.serves():
            self._rebuild(step, given, send(source.device(), given.rebuilt)[0])
            packed = self._packed(given, self._shared.engine.geometry.window_pages)
            replayed = self._graphs.run(self._shared.slab(), packed, given.observations, step.addresses)
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
        paged = PagedNetwork(network, shift, self._shared.slab().data.numpy())
        begun, started, lost = given.rebuilt
        if len(begun):
            assert given.last is not None
            self._model.begin(paged, tables[lost], begun, started, given.last[lost].numpy())
        batch = Batch(
            tables, counts, given.pages, np.stack(given.positions), given.actions.reshape(rows, -1).astype(np.float32),
            observations, latent=latent, sequence=sequence, value=value, policy=policy
        )
        self._model.run(compiled_search.step_roots, (paged, batch, False), network, tables.shape[1], rows)
        parts = [torch.from_numpy(part).unsqueeze(1) for part in (sequence, latent, policy, value)]
        output = StepOutput(parts[0], parts[1], None, parts[2], parts[3])
        sums = np.stack([latent.sum(1), value.sum(1) + policy.sum(1)], axis=1)
        return RootOutput(torch.from_numpy(latent), output, sums)

    def _launch_roots(self, step: OpenStep, given: RootInputs) -> RootOutput:
        shared, counts = self._shared, given.contexts[1]
        engine, weights, slab = shared.engine, shared.weights_of(step), shared.slab()
        latent = self._latents(given.observations)
        numbers, rebuilt = send(shared.source.device(), self._packed(given, int(counts.max())), given.rebuilt)
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
        return pack(self._shared.engine.geometry, given.contexts, given.pages, given.positions, given.actions, longest)

    def _rebuild(self, step: OpenStep, given: RootInputs, rebuilt: torch.Tensor) -> None:
        """Rebuild lost contexts; ``rebuilt`` is ``given.rebuilt`` on the device."""
        if rebuilt.shape[1]:
            assert given.last is not None
            shared, states = self._shared, given.last[rebuilt[2]]
            shared.engine.begin(shared.weights_of(step), shared.slab(), rebuilt[0], states, rebuilt[1])

    def _latents(self, obs: torch.Tensor) -> torch.Tensor:
        return self._encode(obs).reshape(len(obs), -1)


def actions_of(geometry: Geometry, actions: Sequence[Any], rows: int) -> Tuple[np.ndarray, np.ndarray]:
    """Actions ``[B]`` or ``[B, A]``, and which rows have one; zeros where an episode starts."""
    going = np.zeros(rows, dtype=bool)
    if geometry.continuous:
        vectors = np.zeros((rows, geometry.action_size), np.float32)
        for row, action in enumerate(actions[:rows]):
            if isinstance(action, np.ndarray):
                vectors[row], going[row] = action.reshape(-1), True
        return vectors, going
    numbers = np.full(rows, -1, dtype=np.int64)
    numbers[:len(actions)] = [int(action) for action in actions[:rows]]
    going = numbers != -1
    return numbers * going, going

"""Nodes whose contexts are found by key: what LightZero's own searches, and those of users, ask for."""
import time
from typing import Any, List, Sequence, Tuple

import numpy as np
import torch

from ..cache.manager import COLLECT
from ..cache.pages import Lease, extend
from ..engine.step import StepOutput, checksum
from ..engine.transfer import send, to_cpu
from ..engine.weights import Weights
from .keys import hash_rows
from .served import Served
from .steps import Steps, zero_for_nan
from .timesteps import reanalysis_timesteps_of, steps_after, timesteps_of


class NodesByKey(Steps):
    """Simulations of a search by key."""

    def node(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int], start_pos: Any,
             reanalysis: bool = False) -> StepOutput:
        """One simulation whose contexts are found by key; one copy to the device, one back, one more there where
        contexts are lost. The predictions are 0 for what is skipped."""
        start = time.perf_counter()
        rows = len(latent)
        timesteps = (reanalysis_timesteps_of if reanalysis else timesteps_of)(start_pos, rows)
        # A search by node asks for nothing by key.
        served = None if reanalysis else self.open.innermost(lambda step: not step.searches)
        mode, env_ids, weights = COLLECT, list(range(rows)), None
        if served is not None:
            served.check_rows(rows)
            mode, env_ids, weights = served.mode, served.env_ids, self._weights_of(served)
            self._give_roots_keys(served)
        with self._manager.lease() as lease:
            output, kept = self._node(
                lease, weights or self._source.read(False), mode, env_ids, latent, action, timesteps,
                steps_after(timesteps, search_depth), reanalysis
            )
        if served is not None and served.trace is not None:
            served.trace.note_keyed_node(latent, action, search_depth, output)
        self.timings['step'].record(time.perf_counter() - start)
        return output if len(kept) == rows else output.map(zero_for_nan)

    def _node(self, lease: Lease, weights: Weights, mode: str, env_ids: List[int], latent: np.ndarray,
              action: torch.Tensor, timesteps: np.ndarray, node_timesteps: np.ndarray, reanalysis: bool
              ) -> Tuple[StepOutput, np.ndarray]:
        manager, rows, device = self._manager, len(latent), self._source.device()
        pages = lease.allocate(rows)
        contexts = manager.find_recur(mode, env_ids, hash_rows(latent))
        lost = np.flatnonzero(contexts[1] == 0)
        manager.count_queries('recur', rows, rows - len(lost))
        lease.hold(contexts[0])
        if len(lost):
            anew = self._begin_anew(lease, contexts, lost, 2 * timesteps[lost])
            begun, states = send(device, anew, latent[lost])
            self.engine.begin(weights, self._slab(), begun[0], states, begun[1])
        output = self._step(
            weights, contexts, pages, node_timesteps, None, action.to(device), int(contexts[1].max()), reanalysis
        ).output
        if self.backend.reuses_output:
            output = output.map(torch.clone)
        on_cpu = to_cpu(torch.cat([output.latent_state.reshape(rows, -1), checksum(output)], dim=1))
        kept = self._guard.finite(on_cpu[:, -1:], 'A reward, value or policy', mode, env_ids, timesteps)
        keys, nodes = hash_rows(on_cpu[:, :-1]), extend(contexts, pages)
        manager.store_recur(
            [env_ids[row] for row in kept], [keys[row] for row in kept], (nodes[0][kept], nodes[1][kept])
        )
        return output, kept

    def _give_roots_keys(self, served: Served) -> None:
        """Store the roots under keys too, so that a search by key finds them as it finds nodes."""
        if served.roots is None or served.keys is not None:
            return
        assert served.latents is not None
        kept, hashed = served.kept, hash_rows(to_cpu(served.latents))
        served.keys = [served.env_ids[row] for row in kept], [hashed[row] for row in kept]
        self._manager.store_init(served.mode, *served.keys, (served.roots[0][kept], served.roots[1][kept]))

"""What roots are stepped from and what comes of it, and the step on the CPU as one compiled call.

``B`` rows, ``R`` pages of a context, ``A`` numbers of a continuous action, ``E`` embedding.
"""
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import torch

from ..cache.pages import Rows
from ..engine.program import OUTPUTS
from ..engine.step import StepOutput
from .compiled_model import CompiledModel
from .served import Served


class RootStep(NamedTuple):
    """What leads to roots."""
    contexts: Rows  # of the last roots, tables [B, R] and counts [B]; 0 pages where an episode begins
    pages: np.ndarray  # [B], to be written
    timesteps: np.ndarray  # [B]
    actions: np.ndarray  # [B] or [B, A]; zeros where an episode begins
    anew: np.ndarray  # [3, K]: contexts that are begun anew before, their pages, angles and rows
    last: Optional[torch.Tensor]  # [B, E], last latent states, where some are
    observations: torch.Tensor  # [B, ...], the current ones


class Stepped(NamedTuple):
    """What roots are."""
    latent: torch.Tensor  # [B, E]
    output: StepOutput
    on_cpu: np.ndarray  # [B, K + 1]: latent states or their sums, and sums of predictions, to see what is finite


class CompiledRoots:
    """Encodes and steps roots of one model."""

    def __init__(self, model: CompiledModel, encode: Callable[[torch.Tensor], torch.Tensor],
                 slab: Callable[[], Any]) -> None:
        self._model, self._encode, self._slab = model, encode, slab

    def step(self, served: Served, given: RootStep) -> Stepped:
        """One compiled call, and another before it where contexts are begun anew."""
        from . import compiled

        network, _held = self._model.network_at(served.addresses)
        (tables, counts), rows = given.contexts, len(given.pages)
        served.shift = shift = self._model.shift()
        sizes = network.embed, network.embed, network.value[-1, OUTPUTS], network.policy
        predicted = [np.empty((rows, size), np.float32) for size in sizes]
        sequence, latent, value, policy = predicted
        observations = np.zeros((0, 0), np.float32)
        if len(network.encoder) and given.observations.ndim == 2 and given.observations.dtype == torch.float32:
            observations = given.observations.contiguous().numpy()
        else:
            latent[:] = self._encode(given.observations).numpy()
        slab = self._slab().data.numpy()
        self._begin_anew(network, shift, slab, given)
        angles = 2 * given.timesteps - (counts > 0), 2 * given.timesteps
        batch = compiled.RootBatch(
            tables, counts, given.pages, given.actions.reshape(rows, -1).astype(np.float32), np.stack(angles),
            observations, *predicted
        )
        self._model.run(compiled.step_roots, (network, shift, slab, batch, False), network, tables.shape[1], rows)
        parts = [torch.from_numpy(part).unsqueeze(1) for part in (sequence, latent, policy, value)]
        output = StepOutput(parts[0], parts[1], None, parts[2], parts[3])
        sums = np.stack([latent.sum(1), value.sum(1) + policy.sum(1)], axis=1)
        return Stepped(torch.from_numpy(latent), output, sums)

    def _begin_anew(self, network: Any, shift: np.ndarray, slab: np.ndarray, given: RootStep) -> None:
        from . import compiled

        pages, angles, lost = given.anew
        if not len(pages):
            return
        assert given.last is not None
        tables = given.contexts[0][lost]
        latent, nothing = given.last[lost].numpy(), np.zeros((0, 0), np.float32)
        batch = compiled.RootBatch(
            tables, np.zeros(len(lost), np.int64), pages, nothing, np.stack([angles, angles]), nothing, nothing, latent,
            nothing, nothing
        )
        self._model.run(compiled.step_roots, (network, shift, slab, batch, True), network, tables.shape[1], len(lost))

"""All inference over pages. Of the host it knows weights and an encoder of observations.

``B`` rows, ``E`` embedding, ``A`` numbers of a continuous action, ``P`` policy logits. A latent state is ``[B, E]``.
"""
from typing import Any, Callable, Sequence

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..config import CacheConfig
from ..engine.step import StepOutput
from ..engine.store import PageStore
from ..engine.transfer import send
from ..engine.weights import Source
from .by_key import NodesByKey
from .by_node import NodesByPlace
from .compiled_model import CompiledModel
from .device import DeviceSearch
from .root_step import CompiledRoots
from .roots import RootInference
from .timesteps import reanalysis_timesteps_of, steps_after
from .whole import Found, Problem, WholeSearch


class Inference(RootInference, NodesByKey, NodesByPlace):
    """Everything between a batch's latent states and its predictions."""

    def __init__(self, source: Source, encode: Callable[[torch.Tensor], torch.Tensor], manager: PagedCacheManager,
                 store: PageStore, options: CacheConfig, validator: Any,
                 read_network: Callable[[], Any]) -> None:
        super().__init__(source, encode, manager, store, options, validator)
        model = CompiledModel(read_network, source)
        store.beside.append(model)
        self._compiled_roots = CompiledRoots(model, self._latents, self._slab)
        self._whole = WholeSearch(model, source, manager, store, self._guard, self.timings)
        self._device = DeviceSearch(
            self.engine, source, manager, store, self._guard, self.timings, options.matmul
        )

    @torch.no_grad()
    def search(self, problem: Problem) -> Found:
        """Search in arrays from the roots that were just served, where the model is."""
        return self._in_arrays().run(self.open.searched(), problem)

    @torch.no_grad()
    def reanalyze(self, problem: Problem, latent: np.ndarray, start_pos: Any) -> Found:
        """Search in arrays from states ``[B, E]`` without contexts, some rows at a time; ``start_pos`` are timesteps
        ``[batch, unroll]``, as a replay buffer passes them."""
        timesteps = reanalysis_timesteps_of(start_pos, len(latent))
        return self._in_arrays().reanalyze(problem, latent, timesteps, self._source.addresses())

    def _in_arrays(self) -> Any:
        return self._whole if self._source.device().type == 'cpu' else self._device

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

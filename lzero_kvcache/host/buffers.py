"""Requests of LightZero's replay buffers to the target model: values of sampled sequences, and reanalyses.

``B`` sequences, ``L`` of their observations that the model sees, ``U = L + 1`` target values of each.
"""
import functools
from typing import Any, Callable, List, Sequence, Tuple

import numpy as np
import torch
from lzero.mcts.utils import prepare_observation

from ..engine.transfer import to_cpu
from ..search.open_steps import StepsOfThread
from .lightzero import lightzero
from .patches import with_globals
from .refused import has_own_inference
from .tree_search import KeylessSearch, Roots
from .world_model import NewWorldModel


def _is_served(model: Any, kind: str) -> bool:
    """Whether the engine may answer in place of a model's 'initial' or 'recurrent' inference."""
    return isinstance(model.world_model, NewWorldModel) and not has_own_inference(model, kind)


# ---- searches anew ---------------------------------------------------------------------------------------------------


class ReanalysisSearch(KeylessSearch):
    """The class that the buffer's method finds as ``MCTSCtree``."""

    roots = Roots

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg, StepsOfThread(), 'reanalysis')  # the buffer searches outside of any step

    def search(self, roots: Any, model: Any, latent_state_roots: Any, to_play_batch: Any, timestep: Any = None,
               task_id: Any = None) -> Any:
        latents = np.asarray(latent_state_roots, dtype=np.float32).reshape(roots.num, -1)
        model.world_model.reserve_angles(timestep, self._cfg.num_simulations)
        roots.found = model.world_model.inference.in_arrays.reanalyze(
            self.problem(roots, model.world_model), latents, timestep, lightzero.KEEPS_REANALYSES)


def reanalyzed_in_arrays(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A buffer's ``_compute_target_policy_reanalyzed`` that searches in arrays where its model can be searched so."""

    @functools.wraps(compute)
    def run(buffer: Any, policy_re_context: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        searching = None
        if (policy_re_context is not None and _is_served(model, 'recurrent')
                and buffer._cfg.model.categorical_distribution):
            searching = lightzero.searching_at_once(buffer, ReanalysisSearch)
        if searching is None or not model.world_model.searches_in_arrays('Reanalyzing'):
            return compute(buffer, policy_re_context, model, *args, **kwargs)
        return with_globals(compute, MCTSCtree=ReanalysisSearch)(searching, policy_re_context, model, *args, **kwargs)

    return run


# ---- target values ---------------------------------------------------------------------------------------------------

Targets = Tuple[np.ndarray, np.ndarray]
"""Rewards and values ``[B, U]``."""


def targets_of_engine(compute: Callable[..., Targets]) -> Callable[..., Targets]:
    """A buffer's ``_compute_target_reward_value`` that is :func:`target_values` where that serves its model."""

    @functools.wraps(compute)
    def run(buffer: Any, context: Sequence[Any], model: Any, actions: np.ndarray, timesteps: np.ndarray) -> Targets:
        cfg, world_model = buffer._cfg, model.world_model
        if (not _is_served(model, 'initial') or world_model.training or cfg.env_type != 'not_board_games'
                or any(cfg.get(name) for name in lightzero.OWN_TARGETS)):
            return compute(buffer, context, model, actions, timesteps)
        return target_values(cfg, context, world_model, actions, timesteps)

    return run


@torch.no_grad()
def target_values(cfg: Any, context: Sequence[Any], world_model: NewWorldModel, actions: np.ndarray,
                  timesteps: np.ndarray) -> Targets:
    """The rewards of sequences, and their discounted sums with the values of the observations that follow; ``context``
    is what LightZero's buffer prepares, and the actions are ``[B, L]`` or ``[B, L, A]``."""
    observations, mask, positions, segment_rewards, _, _, td_steps = context[:7]
    rows, steps = actions.shape[:2]
    valid, td = np.reshape(mask, (rows, steps + 1)), np.reshape(td_steps, (rows, steps + 1))[:, :1]
    # Sequences that lie wholly past the end of their episode are not computed.
    needed = np.flatnonzero(valid.any(1)) if valid.any() else np.zeros(1, np.int64)
    seen = [observations[row * (steps + 1) + step] for row in needed for step in range(steps)]
    on_device = _values(cfg, world_model, seen, actions[needed], timesteps[needed])
    rewards, values = _summed(segment_rewards, positions, td, steps + 1, cfg.discount_factor)
    predicted = to_cpu(on_device).reshape(len(needed), steps)
    predicted = np.concatenate([predicted, predicted[:, -1:]], axis=1)  # as LightZero's model answers for the last
    values[needed] += predicted * cfg.discount_factor ** td[needed] * valid[needed]
    return rewards, values


def _values(cfg: Any, world_model: NewWorldModel, observations: List[Any], actions: np.ndarray,
            timesteps: np.ndarray) -> torch.Tensor:
    """Values ``[B L, 1]`` of observations, on the model's device; it may still be computing them."""
    latents = _encoded(world_model, observations, cfg.model.model_type)
    weights, outputs = world_model.observed(latents.view(*actions.shape[:2], -1), actions, timesteps)
    return lightzero.values_of(weights.value(outputs).flatten(0, 1), cfg)


def _encoded(world_model: NewWorldModel, observations: List[Any], model_type: str) -> torch.Tensor:
    """Latent states ``[N, E]`` of observations, each of some frames; they are sent once, as the buffer has them."""
    device = world_model.weights_source.device()
    first = prepare_observation(observations[:1], model_type)
    kind = torch.from_numpy(first).dtype
    packed = torch.empty((len(observations),) + first.shape[1:], dtype=kind, pin_memory=device.type == 'cuda')
    frames = packed.numpy().reshape((-1,) + np.shape(observations[0])[1:])
    stacked = len(frames) // len(observations)
    encode, chunk = world_model.encoder_graph.latest(), world_model.encoder_graph.chunk(len(observations))
    latents = []
    for start in range(0, len(observations), chunk):
        end = start + chunk
        np.concatenate(observations[start:end], out=frames[start * stacked:end * stacked], casting='unsafe')
        latents.append(encode(packed[start:end]))
    return torch.cat(latents)


def _summed(segment_rewards: Sequence[np.ndarray], positions: Sequence[int], td: np.ndarray, count: int,
            discount: float) -> Targets:
    """Rewards ``[B, U]`` from positions of segments on, and discounted sums of ``td [B, 1]`` from each on; 0 past a
    segment's end."""
    longest = int(td.max())
    rewards = np.zeros((len(td), count + longest - 1))
    for row, (rewards_of, position) in enumerate(zip(segment_rewards, positions)):
        taken = rewards_of[position:position + rewards.shape[1]]
        rewards[row, :len(taken)] = taken
    sums = np.zeros((len(td), count))
    for step in range(longest):
        sums += rewards[:, step:step + count] * (discount ** step * (step < td))
    return rewards[:, :count], sums

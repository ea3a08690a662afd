"""How a model is asked on any device, and by node. Who asks by key, and what is right, is in ``oracle.py``."""
import contextlib

import numpy as np
import torch
from oracle import Batch, play, relative_error
from small_models import to_scalar

SUPPORT = 5
TO_SCALAR = to_scalar(SUPPORT)


def for_search(answer):
    """What a search makes of a keyed answer: no latent states, value and reward as scalars."""
    if 'reward' not in answer:
        return answer
    return dict(policy=answer['policy'], value=TO_SCALAR(answer['value']), reward=TO_SCALAR(answer['reward']))


def error_of(name, actual, expected):
    """Scalars are told in units of the support: near 0 the rescaling's square root keeps few digits."""
    if expected.shape[-1] == 1:
        return float((actual - expected).abs().max()) / SUPPORT if actual.shape == expected.shape else float('inf')
    return relative_error(actual, expected)


def largest_error(actual, expected):
    """Over all answers; those of nodes that are asked by node are compared with what a search makes of keyed ones."""
    assert len(actual) == len(expected)
    errors = []
    for answer, right in zip(actual, expected):
        right = right if answer['value'].shape == right['value'].shape else for_search(right)
        errors += [error_of(name, part, right[name]) for name, part in answer.items()]
    return max(errors)


class Placed:
    """A model on any device for players that keep what they pass on the host."""

    def __init__(self, model):
        self._model, self.world_model = model, model.world_model

    def initial_inference(self, last_obs, actions, obs=None, *args, **kwargs):
        moved = [part.to(self._device) if torch.is_tensor(part) else part for part in (last_obs, actions, obs)]
        return self._model.initial_inference(*(part for part in moved if part is not None), *args, **kwargs)

    def recurrent_inference(self, history, *args):
        latents, actions = history[-1]
        return self._model.recurrent_inference(history[:-1] + [(latents, actions.to(self._device))], *args)

    @property
    def _device(self):
        return next(self.world_model.parameters()).device


class ByNode(Batch):
    """Puts a trace to a model as the policies' searches by node do; value and reward of nodes come as scalars."""

    def __init__(self, model, mode='collect', env_ids=None):
        super().__init__(model)
        self._place, self._open = (mode, env_ids), contextlib.ExitStack()
        self.step = None  # the step that is under way

    def root(self, event):
        self.close()
        mode, env_ids = self._place
        rows = range(len(event.timesteps)) if env_ids is None else env_ids
        self.step = self._open.enter_context(self.world_model.open_step(mode, rows))
        answer = super().root(event)
        self.open(self.world_model.kv_cache_manager.recur_pool.pool_size // len(rows))
        return answer

    def open(self, simulations):
        """Begin the search below the roots that were just inferred."""
        self._expand = self._open.enter_context(self.world_model.inference.search_by_node(self.step, simulations))
        self._simulation = 0

    def expand(self, event):
        rows = np.arange(len(event.parents))
        predicted = self._expand(
            self._simulation, np.asarray(event.parents), rows, np.asarray(event.actions), list(event.depths)
        )
        self._simulation += 1
        predicted = torch.from_numpy(predicted.copy())
        return dict(reward=predicted[:, :1], value=predicted[:, 1:2], policy=predicted[:, 2:])

    def close(self):
        """End the search that is under way."""
        self._open.close()


class ByKey(ByNode):
    """The same by key, as a search of a user's own is."""

    def open(self, simulations):
        """Nodes are looked up one by one."""

    def expand(self, event):
        return Batch.expand(self, event)


def answers_of(model, trace, by_node=False):
    """What a model answers to a trace, on the host."""
    player = (ByNode if by_node else Batch)(Placed(model))
    answers = [{name: part.cpu() for name, part in answer.items()} for answer in play(player, trace) if answer]
    if by_node:
        player.close()
    return answers

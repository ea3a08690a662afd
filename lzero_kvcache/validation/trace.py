"""A record of one search, for validation to replay. ``B`` rows, one for each environment."""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

Answer = Dict[str, torch.Tensor]
"""The answers of an inference: 'value', 'policy', 'latent' and, below a root, 'reward', ``[B, K]`` each."""


def answer_of(outputs: Sequence[Any]) -> Answer:
    """Sort what LightZero's inferences return; after a root inference the reward is None or empty. Copies nothing."""
    _, latent, reward, policy, value = outputs
    parts = {'value': value, 'policy': policy, 'latent': latent}
    if reward is not None and reward.numel():
        parts['reward'] = reward
    return {name: part.detach().reshape(len(part), -1) for name, part in parts.items()}


class Node(NamedTuple):
    """One simulation: each row expands a node of its own."""
    path: np.ndarray  # [B]: the node that is expanded, 0 for the root, i for what simulation i made
    actions: np.ndarray  # [B], or [B, A]
    depths: Any  # [B]: what LightZero's tree passes as depth
    answer: Answer


@dataclass
class Trace:
    """One search, from its root inference to its last simulation. Whoever searches holds it."""
    mode: str  # 'collect' or 'eval'
    env_ids: List[int]  # [B]
    number: int  # of the search, from 1
    replayed: bool  # whether simulations are noted
    last_obs: Optional[torch.Tensor] = None  # [B, ...]
    last_actions: Sequence[Any] = ()  # [B]; -1 where an episode starts
    obs: Optional[torch.Tensor] = None  # [B, ...]
    timesteps: Sequence[np.ndarray] = ()  # [B], each as LightZero's workers pass it
    lost: Sequence[int] = ()  # rows whose context should have been in the cache and was not
    root: Optional[Answer] = None
    nodes: List[Node] = field(default_factory=list)
    resets: List[Callable[[], None]] = field(default_factory=list)  # what the policy reset while it searched
    first_reset: Optional[Callable[..., None]] = None  # the policy's reset method, to run before its first batch

    @property
    def places(self) -> List[Tuple[str, int]]:
        """(mode, environment) of each row."""
        return [(self.mode, env_id) for env_id in self.env_ids]

    def is_first(self, row: int) -> bool:
        """Whether an episode starts in a row."""
        action = self.last_actions[row]
        return np.ndim(action) == 0 and int(action) == -1

    def note_root(self, last_obs: torch.Tensor, last_actions: Sequence[Any], obs: torch.Tensor, timesteps: np.ndarray,
                  lost: np.ndarray, outputs: Sequence[Any]) -> None:
        """Note the root inference, of every search, since the next one continues its contexts. Its outputs are not
        copied, so that nobody may write to them before the search is checked."""
        self.last_obs, self.last_actions, self.obs = last_obs, last_actions, obs
        self.timesteps, self.lost = [np.array(timestep) for timestep in timesteps], lost.tolist()
        self.root, self.nodes = answer_of(outputs), []

    def note_node(self, path: np.ndarray, actions: np.ndarray, depths: Sequence[int], outputs: Sequence[Any]) -> None:
        """Note one simulation of a search by node; its outputs are copied, as the next replay of a graph overwrites
        them."""
        if self.replayed:
            answer = {name: part.clone() for name, part in answer_of(outputs).items()}
            self.nodes.append(Node(path, actions, depths, answer))

    def note_scalars(self, path: np.ndarray, actions: np.ndarray, depths: np.ndarray, reward: np.ndarray,
                     value: np.ndarray, policy: np.ndarray) -> None:
        """Note one simulation of a search that is one call: reward and value ``[B]`` are numbers, not logits, and there
        are no latent states."""
        answer = {name: torch.from_numpy(part.copy()).view(len(part), -1)
                  for name, part in (('reward', reward), ('value', value), ('policy', policy))}
        self.nodes.append(Node(path, actions, depths, answer))

    def note_keyed_node(self, latents: np.ndarray, actions: torch.Tensor, depths: Sequence[int],
                        outputs: Sequence[Any]) -> None:
        """Note one simulation of a search by key, which expands the nodes with these latent states ``[B, E]``. If one
        belongs to no node, the rest of the search is not replayed."""
        path = self._find(latents) if self.replayed else None
        if path is None:
            self.replayed = False
        else:
            self.note_node(path, actions.cpu().numpy(), depths, outputs)

    def _find(self, latents: np.ndarray) -> Optional[np.ndarray]:
        """The node of each latent state ``[B]``: the root before others, of equal ones the newest, as by key."""
        assert self.root is not None
        known = [answer['latent'].cpu().numpy() for answer in [self.root, *(node.answer for node in self.nodes)]]
        order = [0, *range(len(known) - 1, 0, -1)]
        path = [next((index for index in order if np.array_equal(known[index][row], latent)), None)
                for row, latent in enumerate(latents)]
        return None if None in path else np.array(path)

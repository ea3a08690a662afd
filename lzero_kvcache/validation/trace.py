"""What the new system did in one search, as its validation needs it. Knows LightZero's shapes; compares nothing."""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

Answer = Dict[str, torch.Tensor]
"""What a model answered, ``[B, ...]`` each: 'value', 'policy', 'latent', and below a root 'reward'."""


class Node(NamedTuple):
    """
    Overview:
        One simulation: a node of each row was expanded.
    """
    path: np.ndarray  # [B]: index in the search path of each row's node, 0 for its root
    actions: np.ndarray  # [B], or [B, A]
    depths: Sequence[int]  # [B]: what LightZero's tree passes as depth
    answer: Answer


@dataclass
class Search:
    """
    Overview:
        One search, from its root inference to its last simulation.
    Arguments:
        - mode (:obj:`str`): 'collect' or 'eval'.
        - env_ids (:obj:`List[int]`): The environment of each row ``[B]``.
        - replayed (:obj:`bool`): Whether its simulations are noted.
    """
    mode: str
    env_ids: List[int]
    replayed: bool
    last_obs: Optional[torch.Tensor] = None  # [B, ...]
    last_actions: Sequence[Any] = ()  # [B]; -1 where an episode starts
    obs: Optional[torch.Tensor] = None  # [B, ...]
    timesteps: Sequence[np.ndarray] = ()  # [B], as LightZero's workers pass them
    lost: Sequence[int] = ()  # rows whose context the new system should have had, and made anew
    root: Optional[Answer] = None
    nodes: List[Node] = field(default_factory=list)
    actions: Sequence[Any] = ()  # [B]: what the environments do after the search
    resets: List[Callable[[], None]] = field(default_factory=list)  # what LightZero resets as the search ends

    def places(self) -> List[Tuple[str, int]]:
        """
        Overview:
            (mode, environment) of each row.
        """
        return [(self.mode, env_id) for env_id in self.env_ids]

    def is_first(self, row: int) -> bool:
        """
        Overview:
            Whether an episode starts in a row, which LightZero tells by its last action.
        """
        action = self.last_actions[row]
        return np.ndim(action) == 0 and int(action) == -1

    def find(self, latents: np.ndarray) -> Optional[np.ndarray]:
        """
        Overview:
            Which nodes latent states belong to: a root before a node, and of equal ones the newest, as a search by
            key finds them.
        Arguments:
            - latents (:obj:`np.ndarray`): ``[B, E]``.
        Returns:
            - path (:obj:`Optional[np.ndarray]`): Indices in the search path ``[B]``; None if one belongs to no node.
        """
        assert self.root is not None
        known = [answer['latent'].cpu().numpy() for answer in [self.root, *(node.answer for node in self.nodes)]]
        order = [0, *range(len(known) - 1, 0, -1)]
        path = [next((index for index in order if np.array_equal(known[index][row], latent)), None)
                for row, latent in enumerate(latents)]
        return None if None in path else np.array(path)


def answer_of(outputs: Sequence[Any]) -> Answer:
    """
    Overview:
        A private copy of what an inference returned.
    Arguments:
        - outputs (:obj:`Sequence`): Output sequence, latent state, and the logits of reward, policy and value, in the \
            order in which LightZero's world models return them; no reward, or an empty one, after a root inference.
    Returns:
        - answer (:obj:`Answer`): Each ``[B, ...]``.
    """
    _, latent, reward, policy, value = outputs
    parts = {'value': value, 'policy': policy, 'latent': latent}
    if reward is not None and reward.numel():
        parts['reward'] = reward
    return {name: part.detach().reshape(len(part), -1).clone() for name, part in parts.items()}

"""What is right: LightZero's own code asked about one environment at a time, and by node. Compares nothing."""
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from .shadow import Shadow, position_tables
from .trace import Answer, Search, answer_of


class Reply(NamedTuple):
    """
    Overview:
        What a shadow answers to one inference, and for each row why that may differ.
    """
    answer: Optional[Answer]  # None where LightZero's code failed
    causes: List[FrozenSet[str]]  # [B]


class _ByNode:
    """In place of LightZero's dict from keys to slots: finds the slot that is meant, whatever the key is."""

    def __init__(self) -> None:
        self.slot: Optional[int] = None
        self.stored: Optional[int] = None

    def get(self, key: str) -> Optional[int]:
        return self.slot

    def __setitem__(self, key: str, slot: int) -> None:
        self.stored = slot


class _EndlessSlots(list):
    """A pool in which no slot is used twice: one that was never written holds None."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if index < len(self) else None

    def __setitem__(self, index: Any, value: Any) -> None:
        assert index == len(self)
        self.append(value)


class _Alone(Shadow):
    """One environment. Its root context is the newest of two slots, so that no slot is overwritten while needed."""

    def __init__(self, attributes: Dict[str, Any]) -> None:
        super().__init__(attributes, 1)
        self.shared_pool_size = 2 ** 62
        self.root, self.nodes = _ByNode(), _ByNode()
        self.past_kv_cache_init_infer_envs = [self.root]
        self.past_kv_cache_recurrent_infer = self.nodes

    def begin(self) -> None:
        """Forget the nodes of the last search."""
        self.shared_pool_recur_infer = _EndlessSlots()
        self.shared_pool_index = 0

    def expand(self, node: int, action: torch.Tensor, depth: int, timestep: np.ndarray) -> Answer:
        """Expand a node: 0 is the root, ``i + 1`` what the ``i``-th simulation made."""
        self.root.slot = self.root.stored if node == 0 else None
        self.nodes.slot = node - 1
        unused = np.zeros((1, 1, self.embed_dim), np.float32)  # its key, and what LightZero would rebuild a miss from
        return answer_of(self.forward_recurrent_inference([(unused, action)], 0, [depth], [timestep]))


class ExactShadow:
    """
    Overview:
        Follows every environment alone, so that nobody's length, latent state or end touches another. Contexts are
        found by node, slots are not overwritten, and tables of positions are made from the weights as they are.
    Arguments:
        - attributes (:obj:`Dict[str, Any]`): Those of the world model, as LightZero's constructor left them.
    """

    def __init__(self, attributes: Dict[str, Any]) -> None:
        self._attributes = attributes
        self._alone: Dict[Tuple[str, int], _Alone] = {}
        self._kept: Dict[Tuple[str, int], int] = {}  # slots of root contexts
        self.lost = 0

    def set_tables(self, tables: Dict[str, Any]) -> None:
        """
        Overview:
            What LightZero makes of positions now and then; here it is made anew for each search.
        """

    def reset(self, reset: Any, *args: Any, **kwargs: Any) -> None:
        """
        Overview:
            LightZero's policy resets its rows; environments have none here.
        """

    def forget(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        """
        Overview:
            Forget the root contexts of an environment, of a mode, or all.
        """
        for key in [key for key in self._kept if mode in (None, key[0]) and env_id in (None, key[1])]:
            del self._kept[key]

    def follow(self, world_model: Any, search: Search) -> List[Reply]:
        """
        Overview:
            Go through a search.
        Arguments:
            - world_model (:obj:`Any`): The one that searched.
            - search (:obj:`Search`): What it did.
        Returns:
            - replies (:obj:`List[Reply]`): To the root inference, and to each simulation that was noted.
        """
        tables = position_tables(world_model)
        latents = world_model.tokenizer.encode_to_obs_embeddings(search.obs)
        for row in search.lost:
            self.lost += self._kept.pop(search.places()[row], None) is not None
        rebuilt = [row for row, place in enumerate(search.places())
                   if place not in self._kept and not search.is_first(row)]
        before = world_model.tokenizer.encode_to_obs_embeddings(search.last_obs) if rebuilt else latents
        answers: List[List[Answer]] = []
        for row, place in enumerate(search.places()):
            alone = self._alone.get(place)
            if alone is None:
                alone = self._alone[place] = _Alone(self._attributes)
            alone.prepare(tables)
            answers.append(self._follow_one(alone, search, row, before[row:row + 1], latents[row:row + 1]))
            self._kept[place] = alone.root.stored  # type: ignore[assignment]
        blameless: List[FrozenSet[str]] = [frozenset()] * len(search.env_ids)
        return [
            Reply({name: torch.cat([answer[name] for answer in rows]) for name in rows[0]}, blameless)
            for rows in zip(*answers)
        ]

    def _follow_one(self, alone: _Alone, search: Search, row: int, before: torch.Tensor,
                    latent: torch.Tensor) -> List[Answer]:
        timestep, action = search.timesteps[row], search.last_actions[row]
        alone.root.slot = self._kept.get(search.places()[row])
        if alone.root.slot is None and not torch.isfinite(before).all():
            action = -1  # from a state that was skipped an environment starts afresh
        output = alone.wm_forward_for_initial_infererence(before, [action], latent, [timestep])
        answers = [answer_of((None, latent, None, output.logits_policy, output.logits_value))]
        alone.begin()
        for node in search.nodes:
            actions = torch.as_tensor(node.actions[row:row + 1]).to(alone.device)
            if not alone.continuous_action_space:
                actions = actions.long()
            answers.append(alone.expand(int(node.path[row]), actions, node.depths[row], timestep))
        alone.begin()
        return answers

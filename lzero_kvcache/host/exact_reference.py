"""The exact reference: a LightZero model for each environment, which is given the node to expand. ``B`` rows of a
search."""
from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from lzero.model.unizero_world_models.kv_caching import KeysValues

from ..validation.trace import Answer, Node, Trace, answer_of
from ..validation.validator import NO_CAUSE, Reply
from .lightzero import lightzero
from .shadow import Shadow, ShadowReference, position_tables


class _MeantSlot:
    """Replaces LightZero's dict from keys to slots: ``get`` ignores the key and returns ``slot``, which is set
    before."""

    def __init__(self) -> None:
        self.slot: Optional[int] = None
        self.stored: Optional[int] = None

    def get(self, key: str) -> Optional[int]:
        return self.slot

    def __setitem__(self, key: str, slot: int) -> None:
        self.stored = slot

    def __contains__(self, key: str) -> bool:
        return False  # so that LightZero keeps what is stored under an older key


class _OneEnvironment(Shadow):
    """One environment. Its root context is the newest of two slots, so that no slot is overwritten while needed."""

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model, 1)
        lightzero.grow_recurrent_pool(self)  # by a slot for each node
        self.last_root: Optional[int] = None  # slot of the context that the next root continues
        self.roots, self.nodes = _MeantSlot(), _MeantSlot()
        self.past_kv_cache_init_infer_envs = [self.roots]
        self.past_kv_cache_recurrent_infer = self.nodes

    def custom_copy_kv_cache_to_shared_recur(self, src_kv: KeysValues) -> int:
        self.shared_pool_recur_infer.append(None)  # a slot for each node
        return super().custom_copy_kv_cache_to_shared_recur(src_kv)

    def root(self, before: torch.Tensor, action: Any, latent: torch.Tensor, timestep: np.ndarray) -> Answer:
        self.forget_nodes()
        self.roots.slot = self.last_root
        if self.last_root is None and not torch.isfinite(before).all():
            action = -1  # after a state that was skipped, an episode starts anew
        output = self.wm_forward_for_initial_infererence(before, [action], latent, [timestep])
        self.last_root = self.roots.stored
        return answer_of((None, latent, None, output.logits_policy, output.logits_value))

    def expand(self, node: int, action: torch.Tensor, depth: int, timestep: np.ndarray) -> Answer:
        self.roots.slot, self.nodes.slot = (self.last_root, None) if node == 0 else (None, node - 1)
        unused = np.zeros((1, 1, self.embed_dim), np.float32)  # LightZero hashes it, and would rebuild a miss from it
        return answer_of(self.forward_recurrent_inference([(unused, action)], 0, [depth], [timestep]))

    def forget_nodes(self) -> None:
        self.shared_pool_recur_infer = []
        self.shared_pool_index = 0


class ExactReference(ShadowReference):
    """The right answers: every environment alone, so that no length, latent state or end of one affects another.
    Contexts are found by node, no slot is overwritten while needed, and tables of positions fit the weights."""

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model)
        self._alone: Dict[Tuple[str, int], _OneEnvironment] = defaultdict(lambda: _OneEnvironment(world_model))

    def root(self, trace: Trace) -> Reply:
        tables = position_tables(self._wm)
        rows = [self._alone[place] for place in trace.places]
        for row in trace.lost:
            self.lost += rows[row].last_root is not None
            rows[row].last_root = None
        before = latents = self._wm.tokenizer.encode_to_obs_embeddings(trace.obs)
        if any(alone.last_root is None and not trace.is_first(row) for row, alone in enumerate(rows)):
            before = self._wm.tokenizer.encode_to_obs_embeddings(trace.last_obs)
        answers = []
        for row, alone in enumerate(rows):
            alone.prepare(tables)
            answers.append(alone.root(
                before[row:row + 1], trace.last_actions[row], latents[row:row + 1], trace.timesteps[row]
            ))
        return _batched(answers)

    def expand(self, trace: Trace, node: Node) -> Reply:
        actions = self._actions(node)
        return _batched([
            alone.expand(int(node.path[row]), actions[row:row + 1], node.depths[row], trace.timesteps[row])
            for row, alone in enumerate(self._alone[place] for place in trace.places)
        ])

    def finish(self, trace: Trace, actions: Sequence[Any]) -> None:
        for place in trace.places:
            self._alone[place].forget_nodes()

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        for place, alone in self._alone.items():
            if mode in (None, place[0]) and env_id in (None, place[1]):
                alone.last_root = None

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: LightZero's policy resets rows, and this reference has none."""

    def precompute(self) -> None:
        """Tables are made anew for each search."""


def _batched(answers: List[Answer]) -> Reply:
    batch = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    return Reply(batch, [NO_CAUSE] * len(answers))

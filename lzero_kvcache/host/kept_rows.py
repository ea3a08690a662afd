"""The last observations and actions, which LightZero's policies keep between steps, for validation's shadow."""
import types
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..validation.trace import Trace
from .patches import with_globals


class Kept(NamedTuple):
    """The observations and actions that a policy passes with a batch."""
    observations: torch.Tensor  # [B, ...]
    actions: List[Any]  # [B]; -1 where it takes an episode to start
    owners: Sequence[Optional[Tuple[str, int]]]  # [B]: whose they are, (mode, environment), or None after a reset
    pools: List[int]  # [B]: in which pools roots are looked for


class KeptRows:
    """Rows of the last batch, of collection and evaluation together."""

    def __init__(self) -> None:
        # The attributes of LightZero's policy that its reset methods use; they run on this.
        self.policy = types.SimpleNamespace(last_batch_obs=None, last_batch_action=[])
        self._owners: List[Optional[Tuple[str, int]]] = []

    def has_begun(self, mode: str) -> bool:
        """Whether rows of a mode exist; True where the first batch makes them."""
        return True

    def before(self, trace: Trace, env_num: int) -> Kept:
        policy, rows = self.policy, len(trace.env_ids)
        if policy.last_batch_obs is None:
            policy.last_batch_obs = torch.zeros_like(trace.obs)  # type: ignore[arg-type]
            policy.last_batch_action, self._owners = [-1] * rows, [None] * rows
        return Kept(policy.last_batch_obs, policy.last_batch_action, self._owners, list(range(rows)))

    def after(self, trace: Trace, actions: Sequence[Any]) -> None:
        self.policy.last_batch_obs, self.policy.last_batch_action = trace.obs, list(actions)
        self._owners = list(trace.places)

    def reset(self, reset: Any, world_model: Any, *args: Any, **kwargs: Any) -> None:
        """Run a policy's reset method on what is kept, and on a world model's caches."""
        policy = self.policy
        policy._cfg = reset.__self__._cfg
        policy._collect_model = policy._eval_model = types.SimpleNamespace(world_model=world_model)
        before = policy.last_batch_obs
        with_globals(reset.__func__, print=lambda *_: None)(policy, *args, **kwargs)
        if policy.last_batch_obs is not before:
            self._owners = [None] * len(policy.last_batch_action)

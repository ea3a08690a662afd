"""The last step of each environment, by mode and environment, since a batch's rows are others at each step.

Its newest root is with the manager, under the key ``CURRENT``.
"""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..cache.base import COLLECT, EVAL


class LastStep(NamedTuple):
    """The last step of an episode that goes on."""
    observations: Any  # of the batch that it was in, or what is left of that; None in old mode
    row: int
    action: Any


class Environments:
    """The last step of every environment that is inside an episode."""

    def __init__(self) -> None:
        self._steps: Dict[str, Dict[int, LastStep]] = {COLLECT: {}, EVAL: {}}

    def inside(self, mode: str, env_id: int) -> bool:
        """Whether an environment is inside an episode."""
        return env_id in self._steps[mode]

    def rows(self, mode: str, env_ids: Sequence[int], observations: torch.Tensor) -> Tuple[torch.Tensor, List[Any]]:
        """The last observations ``[B, ...]`` and actions of a batch; zeros and -1 where an episode starts."""
        fresh = LastStep(torch.zeros_like(observations[:1]), 0, -1)
        steps = [self._steps[mode].get(env_id, fresh) for env_id in env_ids]
        batch, actions = steps[0].observations, [step.action for step in steps]
        is_whole = len(batch) == len(steps) and all(
            step.observations is batch and step.row == row for row, step in enumerate(steps)
        )
        return batch if is_whole else torch.stack([step.observations[step.row] for step in steps]), actions

    def remember(self, mode: str, env_ids: Sequence[int], observations: Optional[torch.Tensor],
                 output: Dict[int, Any]) -> None:
        """Note what each environment saw and did."""
        steps = self._steps[mode]
        for row, env_id in enumerate(env_ids):
            steps[env_id] = LastStep(observations, row, output[env_id]['action'])
        if observations is not None and len(steps) > len(env_ids):
            _let_go(steps)

    def forget(self, mode: str, env_ids: Optional[Sequence[int]]) -> None:
        """End the episodes of some environments of a mode, or of all."""
        for env_id in list(self._steps[mode]) if env_ids is None else env_ids:
            self._steps[mode].pop(env_id, None)


def _let_go(steps: Dict[int, LastStep]) -> None:
    """Keep of each batch the rows that are an environment's last: others would stay as long as these."""
    batches: Dict[int, List[Tuple[int, LastStep]]] = {}
    for env_id, step in list(steps.items()):
        batches.setdefault(id(step.observations), []).append((env_id, step))
    for parts in batches.values():
        batch = parts[0][1].observations
        if len(parts) < len(batch):
            kept = batch[[step.row for _, step in parts]]
            steps.update((env_id, LastStep(kept, row, step.action)) for row, (env_id, step) in enumerate(parts))

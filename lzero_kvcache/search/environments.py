"""The last step of each environment, by mode and environment, since a batch's rows are others at each step.

Its newest root is with the manager, under the key ``CURRENT``.
"""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch


class LastStep(NamedTuple):
    """The last step of an episode that goes on."""
    observations: torch.Tensor  # of the batch that it was in, or of the environment alone
    row: int
    action: Any


class Environments:
    """The last step of every environment that is inside an episode."""

    def __init__(self) -> None:
        self._steps: Dict[Tuple[str, int], LastStep] = {}

    def __contains__(self, place: Tuple[str, int]) -> bool:
        return place in self._steps

    def rows(self, mode: str, env_ids: Sequence[int], observations: torch.Tensor) -> Tuple[torch.Tensor, List[Any]]:
        """The last observations ``[B, ...]`` and actions of a batch; zeros and -1 where an episode starts."""
        fresh = LastStep(torch.zeros_like(observations[:1]), 0, -1)
        steps = [self._steps.get((mode, env_id), fresh) for env_id in env_ids]
        batch, actions = steps[0].observations, [step.action for step in steps]
        is_whole = len(batch) == len(steps) and all(
            step.observations is batch and step.row == row for row, step in enumerate(steps)
        )
        return batch if is_whole else torch.stack([step.observations[step.row] for step in steps]), actions

    def remember(self, mode: str, env_ids: Sequence[int], observations: torch.Tensor, output: Dict[int, Any]) -> None:
        """Note what each environment saw and did. The others' batches are let go."""
        for row, env_id in enumerate(env_ids):
            self._steps[mode, env_id] = LastStep(observations, row, output[env_id]['action'])
        for place, step in self._steps.items():
            if place[0] == mode and step.observations is not observations and len(step.observations) > 1:
                self._steps[place] = LastStep(step.observations[step.row:step.row + 1].clone(), 0, step.action)

    def forget(self, mode: str, env_ids: Optional[Sequence[int]]) -> None:
        """End the episodes of some environments of a mode, or of all."""
        ended = {env_id for _, env_id in self._steps} if env_ids is None else env_ids
        for env_id in ended:
            self._steps.pop((mode, env_id), None)

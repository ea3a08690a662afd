"""What each environment is in the middle of, by mode and environment instead of by row of a batch.

Its newest root is with the manager, under the key ``CURRENT``.
"""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch


class Step(NamedTuple):
    """The last step of an episode that goes on."""
    observation: torch.Tensor
    action: Any


class Environments:
    """The last step of every environment that is inside an episode."""

    def __init__(self) -> None:
        self._steps: Dict[Tuple[str, int], Step] = {}

    def __contains__(self, place: Tuple[str, int]) -> bool:
        return place in self._steps

    def rows(self, mode: str, env_ids: Sequence[int], observations: torch.Tensor) -> Tuple[torch.Tensor, List[Any]]:
        """The last observations ``[B, ...]`` and actions of a batch; zeros and -1 where an episode starts."""
        fresh = Step(torch.zeros_like(observations[0]), -1)
        steps = [self._steps.get((mode, env_id), fresh) for env_id in env_ids]
        return torch.stack([step.observation for step in steps]), [step.action for step in steps]

    def remember(self, mode: str, env_ids: Sequence[int], observations: torch.Tensor, output: Dict[int, Any]) -> None:
        """Note what each environment saw and did."""
        for env_id, observation in zip(env_ids, observations):
            self._steps[mode, env_id] = Step(observation, output[env_id]['action'])

    def forget(self, mode: str, env_ids: Optional[Sequence[int]]) -> None:
        """End the episodes of some environments of a mode, or of all."""
        ended = {env_id for _, env_id in self._steps} if env_ids is None else env_ids
        for env_id in ended:
            self._steps.pop((mode, env_id), None)

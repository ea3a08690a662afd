"""Roots that stand in for LightZero's C++ ones in its policies: they keep what they are prepared with until a search
decides where its tree is. Lists by row, as LightZero passes them and takes them back."""
from typing import Any, Callable, List, NamedTuple, Optional, Sequence


class Prepared(NamedTuple):
    """What ``prepare`` or ``prepare_no_noise`` was given."""
    noise_weight: float
    noises: Optional[Sequence[Sequence[float]]]
    rewards: Sequence[float]
    logits: Sequence[Sequence[float]]
    to_play: Any


class Roots:
    """As LightZero's ``MCTSCtree.roots(num, legal_actions, ...)`` returns them."""

    def __init__(self, make_ctree: Callable[..., Any], num: int, legal_actions: Sequence[Sequence[int]],
                 *sampled: Any) -> None:
        self.num, self.legal_actions = num, legal_actions
        self.prepared: Optional[Prepared] = None
        self._make_ctree = lambda: make_ctree(num, legal_actions, *sampled)
        self._ctree: Any = None
        self._found: Optional[List[Any]] = None  # distributions, values and sampled actions

    def prepare(self, root_noise_weight: float, noises: Sequence[Sequence[float]], rewards: Sequence[float],
                logits: Sequence[Sequence[float]], to_play: Any) -> None:
        self.prepared = Prepared(root_noise_weight, noises, rewards, logits, to_play)

    def prepare_no_noise(self, rewards: Sequence[float], logits: Sequence[Sequence[float]], to_play: Any) -> None:
        self.prepared = Prepared(0.0, None, rewards, logits, to_play)

    def in_ctree(self) -> Any:
        """The same roots in LightZero's C++ tree, whose results these then have."""
        assert self.prepared is not None
        self._ctree = self._make_ctree()
        weight, noises, rewards, logits, to_play = self.prepared
        if noises is None:
            self._ctree.prepare_no_noise(rewards, logits, to_play)
        else:
            self._ctree.prepare(weight, noises, rewards, logits, to_play)
        return self._ctree

    def take(self, distributions: List[List[int]], values: List[float], actions: Any) -> None:
        """The results of a search in arrays."""
        self._found = [distributions, values, actions]

    def get_distributions(self) -> List[List[int]]:
        return self._ctree.get_distributions() if self._found is None else self._found[0]

    def get_values(self) -> List[float]:
        return self._ctree.get_values() if self._found is None else self._found[1]

    def get_sampled_actions(self) -> Any:
        return self._ctree.get_sampled_actions() if self._found is None else self._found[2]

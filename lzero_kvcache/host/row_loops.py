"""Legal actions, noise and action selection for all rows of a policy's step at once. LightZero computes them one row
after the other; numpy's random numbers are drawn in the same order."""
import bisect
import itertools
import types
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from lzero.policy import utils as lightzero_utils
from scipy.special import entr
from scipy.stats import entropy as scipy_entropy

from ..search.open_steps import OpenStep
from .exploration import ExplorationMetrics
from .patches import with_globals

Visits = Sequence[int]
MEASURING = 'search_exploration_metrics'  # of LightZero's main branch


class Mask(np.ndarray):
    """Which actions of a row are legal. LightZero goes through them twice; an array's numbers take ten times as long as
    a list's."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __eq__(self, other: Any) -> Any:
        return np.asarray(self) == other  # a plain array is compared faster than a subclass


def masks_of(action_mask: Optional[Iterable[Any]]) -> Any:
    """The masks as arrays that are quick to iterate over; some environments have none."""
    if action_mask is None:
        return None
    return [mask.view(Mask) if type(mask) is np.ndarray else mask for mask in action_mask]


def with_rows_at_once(forward: Callable[..., Any], step: OpenStep, masks: Any) -> Callable[..., Any]:
    """A copy of a policy's step that draws noise, selects actions and measures them for all rows at once. Functions
    that are not LightZero's own are left alone."""
    names: Dict[str, Any] = {}
    found = getattr(forward, '__globals__', {})
    selecting = found.get('select_action')
    if selecting is lightzero_utils.select_action and selecting.__globals__.get('entropy') is scipy_entropy:
        names['select_action'] = Selection(step)
    measuring = found.get(MEASURING)
    if measuring is not None and measuring.__module__.startswith('lzero.'):
        names[MEASURING] = ExplorationMetrics(step, measuring)
    if found.get('np') is np:
        names['np'] = drawing_at_once(masks or [])
    return with_globals(forward, **names) if names else forward


def drawing_at_once(masks: Sequence[Any]) -> Any:
    """numpy, but for ``random.dirichlet``, which draws at once for rows in a row that have as many legal actions."""
    numbers = (sum(mask) if np.ndim(mask) else None for mask in masks)
    alike = (len(list(rows)) for _, rows in itertools.groupby(numbers))
    drawn: List[np.ndarray] = []

    def dirichlet(alpha: Sequence[float]) -> np.ndarray:
        if not drawn:
            drawn.extend(np.random.dirichlet(alpha, next(alike, 1))[::-1])
        return drawn.pop()

    return _Changed(np, random=_Changed(np.random, dirichlet=dirichlet))


class _Changed:
    """A module, but for some names. What is asked for is kept, since the loops ask for each row."""

    def __init__(self, module: types.ModuleType, **changes: Any) -> None:
        vars(self).update(changes, _module=module)

    def __getattr__(self, name: str) -> Any:
        vars(self)[name] = found = getattr(vars(self)['_module'], name)
        return found


class Selection:
    """LightZero's ``select_action`` for the roots of one step: the same positions and entropies, and the same draws."""

    def __init__(self, step: OpenStep) -> None:
        self._step = step
        self._found: Dict[Tuple[float, ...], Tuple[int, List[float], float]] = {}

    def __call__(self, visit_counts: Visits, temperature: float = 1, deterministic: bool = True) -> Tuple[int, float]:
        key = temperature, *visit_counts
        if key not in self._found:
            self._select([*self._step.visits, visit_counts], temperature)
        best, chances, entropy = self._found[key]
        return best if deterministic else bisect.bisect_right(chances, np.random.random_sample()), entropy

    def _select(self, visits: Sequence[Visits], temperature: float) -> None:
        """Note the most visited position, the summed chances of all, and their entropy, for each of some roots. Those
        with as many legal actions are computed together: numbers that are padded would be added in another order."""
        for slots in set(map(len, visits)):
            rows = [row for row in visits if len(row) == slots]
            counts = np.array(rows)
            # Python's powers: numpy's may differ in their last bits.
            powers = np.array([count ** (1 / temperature) for count in range(counts.max() + 1)])[counts]
            totals = powers.cumsum(axis=1)[:, -1:]
            if not totals.all():
                raise ZeroDivisionError('a root has no visits')  # as LightZero's
            shares = powers / totals
            chances = shares.cumsum(axis=1)
            chances /= chances[:, -1:]
            entropies = entr(shares / shares.sum(axis=1, keepdims=True)).sum(axis=1) / np.log(2)  # as scipy's
            parts = counts.argmax(axis=1), chances, entropies
            keys = [(temperature, *row) for row in rows]
            self._found.update(zip(keys, zip(*(part.tolist() for part in parts))))

"""Differences between two answers, and what has come of them so far. Knows numbers only."""
from collections import Counter
from typing import Dict, FrozenSet, Sequence, Tuple

import numpy as np
import torch

from .trace import Answer

QUANTITIES = ('value', 'policy', 'reward', 'latent')


def relative_differences(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """
    Overview:
        How far each row is from what it should be: the largest difference of its entries, in units of the largest
        entry that it should have.
    Arguments:
        - actual (:obj:`torch.Tensor`): ``[N, K]``.
        - expected (:obj:`torch.Tensor`): ``[N, K]``.
    Returns:
        - differences (:obj:`torch.Tensor`): ``[N]``; inf where one side alone is finite, nan where neither is.
    """
    differences = (actual - expected).abs().amax(1)
    relative = differences / expected.abs().amax(1)
    relative = torch.where(differences == 0, torch.zeros_like(relative), relative)
    finite, right_finite = actual.isfinite().all(1), expected.isfinite().all(1)
    relative = torch.where(finite != right_finite, torch.full_like(relative, float('inf')), relative)
    return torch.where(finite | right_finite, relative, torch.full_like(relative, float('nan')))


def compare(actual: Sequence[Answer], expected: Sequence[Answer]) -> Dict[str, np.ndarray]:
    """
    Overview:
        The differences of some inferences of one batch, brought to the host at once.
    Arguments:
        - actual (:obj:`Sequence[Answer]`): ``I`` answers for ``B`` rows.
        - expected (:obj:`Sequence[Answer]`): As many.
    Returns:
        - differences (:obj:`Dict[str, np.ndarray]`): ``[I, B]`` by quantity; nan where there is nothing to compare.
    """
    nothing = torch.full_like(actual[0]['value'][:, 0], float('nan'))
    found = torch.stack([
        torch.stack([
            relative_differences(ours[name], theirs[name]) if name in ours and name in theirs else nothing
            for name in QUANTITIES
        ]) for ours, theirs in zip(actual, expected)
    ])  # [I, Q, B]
    return dict(zip(QUANTITIES, found.float().cpu().numpy().swapaxes(0, 1)))


class Tally:
    """
    Overview:
        Counts since the start, and the differences since they were last read.
    Arguments:
        - tolerance (:obj:`float`): From which relative difference on a row is another.
        - causes (:obj:`Sequence[str]`): Those that can be told.
    """

    def __init__(self, tolerance: float, causes: Sequence[str]) -> None:
        self._tolerance = tolerance
        self.searches = self.inferences = self.rows = self.over = self.unexplained = self.lost = self.failures = 0
        self.seconds = 0.0
        self.causes: Counter = Counter(dict.fromkeys(causes, 0))
        self._read = (0, 0)
        self._unread: Dict[str, Tuple[float, float, int]] = {}  # largest, sum and number by quantity

    def add(self, differences: Dict[str, np.ndarray],
            causes: Sequence[Sequence[FrozenSet[str]]]) -> Tuple[np.ndarray, np.ndarray]:
        """
        Overview:
            Count some inferences of one batch.
        Arguments:
            - differences (:obj:`Dict[str, np.ndarray]`): ``[I, B]`` by quantity.
            - causes (:obj:`Sequence`): ``[I, B]`` sets of what a row's difference may come from.
        Returns:
            - over (:obj:`np.ndarray`): Whether a row is over the tolerance ``[I, B]``.
            - unexplained (:obj:`np.ndarray`): Whether it is so without a cause ``[I, B]``.
        """
        for name, values in differences.items():
            known = values[~np.isnan(values)]
            largest, total, number = self._unread.get(name, (0., 0., 0))
            if known.size:
                self._unread[name] = max(largest, float(known.max())), total + float(known.sum()), number + known.size
        over = np.any([values > self._tolerance for values in differences.values()], axis=0)
        unexplained = over & ~np.array([[bool(of_row) for of_row in of_batch] for of_batch in causes])
        self.inferences += len(over)
        self.rows += over.size
        self.over += int(over.sum())
        self.unexplained += int(unexplained.sum())
        for index, row in np.argwhere(over):
            self.causes.update(causes[index][row])
        return over, unexplained

    def add_failure(self, causes: Sequence[FrozenSet[str]]) -> None:
        """
        Overview:
            Count an inference that LightZero's own code did not answer.
        Arguments:
            - causes (:obj:`Sequence`): Why, of each row ``[B]``.
        """
        self.failures += 1
        for of_row in causes:
            self.causes.update(of_row)

    def read(self) -> Dict[str, float]:
        """
        Overview:
            One point of every tag, with the largest and the mean difference of each quantity since the last one.
        Returns:
            - values (:obj:`Dict[str, float]`): Empty where no row was compared since then.
        """
        if (self.rows, self.failures) == self._read:
            return {}
        self._read = (self.rows, self.failures)
        values: Dict[str, float] = {
            'searches_replayed': self.searches, 'inferences': self.inferences, 'rows_compared': self.rows,
            'rows_over': self.over, 'unexplained': self.unexplained, 'lost': self.lost, 'failures': self.failures,
            'seconds': self.seconds,
            **{f'cause_{cause}': count for cause, count in self.causes.items()}
        }
        for name, (largest, total, number) in self._unread.items():
            values[f'{name}_max'], values[f'{name}_mean'] = largest, total / number
        self._unread.clear()
        return values

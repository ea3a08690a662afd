"""Differences between two answers, and their count.

Of one search, ``Q`` is quantities, ``I`` inferences and ``B`` rows.
"""
from collections import Counter
from typing import Dict, FrozenSet, Sequence, Tuple

import numpy as np
import torch

from .trace import Answer

QUANTITIES = ('value', 'policy', 'reward', 'latent')


def relative_differences(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest difference of each row ``[N, K]`` over the largest expected entry of that row ``[N]``; inf where only
    one side is finite, nan where neither is."""
    differences, scale = (actual - expected).abs().amax(1), expected.abs().amax(1)
    relative = differences / (scale.clamp(min=1) if actual.shape[1] == 1 else scale)  # numbers may be about 0
    relative = torch.where(differences == 0, torch.zeros_like(relative), relative)
    finite, right_finite = actual.isfinite().all(1), expected.isfinite().all(1)
    relative = torch.where(finite != right_finite, torch.full_like(relative, float('inf')), relative)
    return torch.where(finite | right_finite, relative, torch.full_like(relative, float('nan')))


def differences_of(actual: Sequence[Answer], expected: Sequence[Answer]) -> np.ndarray:
    """The differences ``[Q, I, B]`` of a search, brought to the CPU at once; nan where there is nothing to compare.
    Of a search that ran on a GPU, nodes were noted on the CPU, and roots where they were."""
    device = actual[0]['value'].device
    nothing = torch.full_like(actual[0]['value'][:, 0], float('nan'))
    found = [
        torch.stack([
            relative_differences(ours[name].to(device), theirs[name].to(device))
            if name in ours and name in theirs else nothing
            for ours, theirs in zip(actual, expected)
        ]) for name in QUANTITIES
    ]
    return torch.stack(found).double().cpu().numpy()


class Tally:
    """Counts since the start, and the differences since they were last read."""

    def __init__(self, tolerance: float, causes: Sequence[str]) -> None:
        self._tolerance = tolerance
        self.searches = self.inferences = self.rows = self.over = self.unexplained = self.lost = self.failures = 0
        self.seconds = 0.0
        self.causes: Counter = Counter(dict.fromkeys(causes, 0))
        self._read = (0, 0)
        self._begin()

    def _begin(self) -> None:
        self._largest, self._total, self._number = np.zeros((3, len(QUANTITIES)))

    def add(self, differences: np.ndarray,
            causes: Sequence[Sequence[FrozenSet[str]]]) -> Tuple[np.ndarray, np.ndarray]:
        """Count a search's differences ``[Q, I, B]`` and their possible causes ``[I, B]``. Returns which rows are over
        the tolerance ``[I, B]``, and which of these have no cause."""
        known = ~np.isnan(differences)
        differences = np.where(known, differences, 0)
        self._largest = np.maximum(self._largest, differences.max((1, 2)))
        self._total += differences.sum((1, 2))
        self._number += known.sum((1, 2))
        over = (differences > self._tolerance).any(0)
        unexplained = over & ~np.array([[bool(of_row) for of_row in of_batch] for of_batch in causes])
        self.inferences += len(over)
        self.rows += over.size
        self.over += int(over.sum())
        self.unexplained += int(unexplained.sum())
        for index, row in np.argwhere(over):
            self.causes.update(causes[index][row])
        return over, unexplained

    def add_failure(self, causes: Sequence[FrozenSet[str]]) -> None:
        """Count an inference that the reference did not answer, and why, of each row ``[B]``."""
        self.failures += 1
        for of_row in causes:
            self.causes.update(of_row)

    def read(self) -> Dict[str, float]:
        """One point of every tag; empty where no row was compared since the last one."""
        if (self.rows, self.failures) == self._read:
            return {}
        self._read = (self.rows, self.failures)
        values: Dict[str, float] = {
            'searches_replayed': self.searches, 'inferences': self.inferences, 'rows_compared': self.rows,
            'rows_over': self.over, 'unexplained': self.unexplained, 'lost': self.lost, 'failures': self.failures,
            'seconds': self.seconds,
            **{f'cause_{cause}': count for cause, count in self.causes.items()}
        }
        for name, largest, total, number in zip(QUANTITIES, self._largest, self._total, self._number):
            if number:
                values[f'{name}_max'], values[f'{name}_mean'] = float(largest), float(total / number)
        self._begin()
        return values

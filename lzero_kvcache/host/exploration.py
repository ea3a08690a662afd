"""The metrics that LightZero's main branch computes of each root's priors and visits, for all rows of a step at
once."""
from typing import Any, Callable, Dict, Sequence, Tuple

import numpy as np

from ..search.open_steps import OpenStep

# No logarithm is taken of less.
SMALLEST = 1e-12

Metrics = Dict[str, float]


class ExplorationMetrics:
    """LightZero's ``search_exploration_metrics`` for the roots of one step: the same numbers. ``of_one_row`` is
    LightZero's, which says what it does not take."""

    def __init__(self, step: OpenStep, of_one_row: Callable[..., Metrics]) -> None:
        self._step, self._of_one_row = step, of_one_row
        self._found: Dict[Tuple[float, ...], Metrics] = {}

    def __call__(self, policy_logits: Any, visit_counts: Any, temperature: float) -> Metrics:
        logits, visits = np.asarray(policy_logits).tolist(), np.asarray(visit_counts).tolist()
        key = _key(temperature, logits, visits)
        if key not in self._found and temperature > 0 and len(logits) == len(visits):
            self._measure(temperature)
        if key in self._found:
            return self._found[key]
        return self._of_one_row(policy_logits, visit_counts, temperature)

    def _measure(self, temperature: float) -> None:
        """Measure the rows that were searched; those with as many legal actions are computed together."""
        rows = list(zip(self._step.logits(), self._step.visits))
        for slots in {len(visits) for _, visits in rows if any(visits)}:
            alike = [row for row in rows if len(row[1]) == slots and any(row[1])]
            logits, visits = (np.array(part, dtype=np.float64) for part in zip(*alike))
            prior = np.exp(logits - logits.max(axis=1, keepdims=True))
            prior /= prior.sum(axis=1, keepdims=True)
            tempered = np.power(visits, 1. / temperature)
            raw = visits / visits.sum(axis=1, keepdims=True)
            sample = tempered / tempered.sum(axis=1, keepdims=True)
            columns = {'prior_visit_js_divergence': _js_divergence(prior, raw)}
            for name, chances in (('prior', prior), ('raw_visit', raw), ('sample', sample)):
                entropy = -(chances * np.log(np.maximum(chances, SMALLEST))).sum(axis=1)
                columns[f'{name}_entropy_nats'] = entropy
                columns[f'{name}_effective_actions'] = np.exp(entropy)
                columns[f'{name}_top1_probability'] = chances.max(axis=1)
            names = [f'exploration/{name}' for name in columns]
            for row, numbers in zip(alike, zip(*(column.tolist() for column in columns.values()))):
                self._found[_key(temperature, *row)] = dict(zip(names, numbers))


def _key(temperature: float, logits: Sequence[float], visits: Sequence[float]) -> Tuple[float, ...]:
    return (temperature, *logits, *visits)


def _js_divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The Jensen-Shannon divergence of rows of two distributions."""
    middle = 0.5 * (one + other)
    halves = [0.5 * (part * np.log(np.maximum(part / middle, SMALLEST))).sum(axis=1) for part in (one, other)]
    return halves[0] + halves[1]

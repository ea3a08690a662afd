"""The rows of the comparison: each measure with its spread over a side's runs, and the ratio to the first side."""
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from .runs import MEASURES, Measure, Run, divided
from .sides import Side


class Spread(NamedTuple):
    """
    Overview:
        A measure over the runs of a side that have it: mean, sample standard deviation (None for one run), least,
        greatest, and of how many.
    """
    mean: float
    deviation: Optional[float]
    least: float
    greatest: float
    runs: int


class Row(NamedTuple):
    """
    Overview:
        A measure of all sides. ``values`` are those of each run by its name, ``spreads`` and ``ratios`` (first side's
        mean / this one's) are by the name of a side; None where there is no number. ``source`` is where they come from.
    """
    measure: Measure
    source: str
    values: Dict[str, Optional[float]]
    spreads: Dict[str, Optional[Spread]]
    ratios: Dict[str, Optional[float]]


def rows_of(sides: Sequence[Side]) -> List[Row]:
    """
    Overview:
        Calculate all rows.
    Arguments:
        - sides (:obj:`Sequence[Side]`): The sides, the baseline first.
    Returns:
        - rows (:obj:`List[Row]`): One for each measure, also where no run has it.
    """
    return [_row(measure, sides) for measure in MEASURES]


def spread_of(values: Sequence[Optional[float]]) -> Optional[Spread]:
    """
    Overview:
        Mean and spread of what is there.
    Arguments:
        - values (:obj:`Sequence[Optional[float]]`): One for each run.
    Returns:
        - spread (:obj:`Optional[Spread]`): None if there is no number.
    """
    there = [float(value) for value in values if value is not None]
    if not there:
        return None
    deviation = statistics.stdev(there) if len(there) > 1 else None
    return Spread(statistics.fmean(there), deviation, min(there), max(there), len(there))


def _row(measure: Measure, sides: Sequence[Side]) -> Row:
    source, values = _values(measure, [run for side in sides for run in side.runs])
    spreads = {side.name: spread_of([values[run.name] for run in side.runs]) for side in sides}
    baseline, *others = sides
    means = {name: None if spread is None else spread.mean for name, spread in spreads.items()}
    ratios = {side.name: divided(means[baseline.name], means[side.name]) for side in others}
    return Row(measure, source, values, spreads, ratios)


def _values(measure: Measure, runs: Sequence[Run]) -> Tuple[str, Dict[str, Optional[float]]]:
    """From the source that most runs have: two sources may define a measure a little differently."""
    by_source = {name: {run.name: read(run) for run in runs} for name, read in measure.sources.items()}
    source = max(by_source, key=lambda name: sum(value is not None for value in by_source[name].values()))
    return source, by_source[source]

"""All that a comparison says, and the same for programs. How it looks is in ``terminal``, ``plot`` and ``report``."""
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from .comparable import Difference, config_differences, warnings_of
from .numbers import Row, rows_of
from .runs import Run
from .sides import Side, sort_into_sides


class Comparison(NamedTuple):
    """
    Overview:
        Sides, the baseline first; rows; what the configs differ in; why the numbers may not be comparable; and the runs
        that could not be read, each with the reason.
    """
    sides: List[Side]
    rows: List[Row]
    differences: List[Difference]
    warnings: List[str]
    left_out: Dict[str, str]

    @property
    def title(self) -> str:
        return ' / '.join(side.name for side in self.sides)


def compare(runs: Sequence[Run], groups: Sequence[Tuple[str, str]], left_out: Dict[str, str]) -> Comparison:
    """
    Overview:
        Compare runs that were read.
    Arguments:
        - runs (:obj:`Sequence[Run]`): At least one.
        - groups (:obj:`Sequence[Tuple[str, str]]`): (name, pattern) of each side.
        - left_out (:obj:`Dict[str, str]`): The runs that could not be read, and why.
    Returns:
        - comparison (:obj:`Comparison`): What there is to say.
    """
    sides = sort_into_sides(runs, groups)
    return Comparison(sides, rows_of(sides), config_differences(sides), warnings_of(sides), left_out)


def as_json(comparison: Comparison) -> Dict[str, Any]:
    """
    Overview:
        The comparison for other programs.
    Arguments:
        - comparison (:obj:`Comparison`): What to write.
    Returns:
        - data (:obj:`Dict[str, Any]`): Numbers, texts and None; neither nan nor infinity.
    """
    return dict(
        baseline=comparison.sides[0].name,
        sides=[dict(name=side.name, runs=[_run(run) for run in side.runs]) for side in comparison.sides],
        measures=[
            dict(
                name=row.measure.name, title=row.measure.title, source=row.source, runs=row.values,
                sides={name: None if spread is None else spread._asdict() for name, spread in row.spreads.items()},
                ratios=row.ratios,
            ) for row in comparison.rows
        ],
        config_differences=[difference._asdict() for difference in comparison.differences],
        warnings=comparison.warnings,
        left_out=comparison.left_out,
    )


def _run(run: Run) -> Dict[str, Any]:
    return dict(name=run.name, folder=run.folder, cache=run.cache, seed=run.seed, points=run.recording.points,
                event_files=run.event_files)

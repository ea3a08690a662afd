"""
The comparison as headings and cells: what differs between terminal and page is only how these are drawn. A column of
ratios stands after each side that is not the baseline.
"""
from typing import List, NamedTuple

from .comparison import Comparison
from .wording import NONE, ratio_text, side_text, spread_text, value_text


class Table(NamedTuple):
    """
    Overview:
        A caption, headings, and rows of as many cells; the first cell of a row is its heading.
    """
    caption: str
    headings: List[str]
    rows: List[List[str]]


def measures_table(comparison: Comparison) -> Table:
    """
    Overview:
        The measures by side.
    Arguments:
        - comparison (:obj:`Comparison`): What to show.
    Returns:
        - table (:obj:`Table`): A row for each measure.
    """
    baseline = comparison.sides[0]
    headings = ['mean ± standard deviation', side_text(baseline)]
    for side in comparison.sides[1:]:
        headings += [side_text(side), f'{baseline.name} / {side.name}']
    rows = []
    for row in comparison.rows:
        cells = [row.measure.title, spread_text(row.spreads[baseline.name], row.measure.kind)]
        for side in comparison.sides[1:]:
            cells += [spread_text(row.spreads[side.name], row.measure.kind), ratio_text(row.ratios[side.name])]
        rows.append(cells)
    return Table(f'Comparison: {comparison.title}', headings, rows)


def runs_table(comparison: Comparison) -> Table:
    """
    Overview:
        The measures of each run.
    Arguments:
        - comparison (:obj:`Comparison`): What to show.
    Returns:
        - table (:obj:`Table`): A column for each run.
    """
    runs = [(side, run) for side in comparison.sides for run in side.runs]
    rows = [
        ['side', *(side.name for side, _ in runs)],
        ['seed', *(NONE if run.seed is None else str(run.seed) for _, run in runs)],
    ]
    for row in comparison.rows:
        rows.append([row.measure.title, *(value_text(row.values[run.name], row.measure.kind) for _, run in runs)])
    return Table('Each run', ['run', *(run.name for _, run in runs)], rows)


def config_table(comparison: Comparison) -> Table:
    """
    Overview:
        The config keys that sides have different values for.
    Arguments:
        - comparison (:obj:`Comparison`): What to show.
    Returns:
        - table (:obj:`Table`): A row for each key; without rows if the configs are the same.
    """
    names = [side.name for side in comparison.sides]
    rows = [[difference.key, *(difference.values.get(name, NONE) for name in names)]
            for difference in comparison.differences]
    return Table('What the configs differ in', ['key', *names], rows)

"""The comparison as headings and cells, the same on the terminal and in the page; and how the terminal shows it."""
import datetime
import shlex
from typing import List, NamedTuple, Optional, Sequence

from rich.console import Console
from rich.text import Text

from ..text import drawn, time_text
from .comparable import CALL_TIME, HITS, HOST_MEMORY, MEMORY, REWARDS, SPEED, TIME
from .grouping import Side
from .judging import INTERQUARTILE_MEAN, MEDIAN, Comparison, Row, Spread
from .reading import TrainedRun

NONE = '-'
# The words for a side whose number is greater than the baseline's, and for one whose number is less. What is only
# counted, as environment steps, is neither better nor worse for it.
WORDS = {
    TIME: ('slower', 'faster'), CALL_TIME: ('slower', 'faster'), SPEED: ('faster', 'slower'),
    HOST_MEMORY: ('more', 'less'), MEMORY: ('more', 'less'), HITS: ('higher', 'lower'), REWARDS: ('higher', 'lower'),
}
# Characters that a table needs for the titles of measures, for most values, and for the rules between columns.
TITLE_WIDTH, VALUE_WIDTH, RULE_WIDTH = 28, 8, 3
SPREADS = {MEDIAN: 'median [least, greatest]', INTERQUARTILE_MEAN: 'interquartile mean [95% interval]'}
SAME = 'the same'
# The page shows all of them.
SHOWN_DIFFERENCES = 15


class Table(NamedTuple):
    """Rows have as many cells as there are headings; the first cell of a row is its heading."""
    caption: str
    headings: List[str]
    rows: List[List[str]]


def measures_table(comparison: Comparison, others: Optional[Sequence[Side]] = None) -> Table:
    """The measures by side; after each side that is not the baseline, a column says which is better and by how much."""
    baseline = comparison.sides[0]
    others = comparison.sides[1:] if others is None else others
    headings = [SPREADS[comparison.statistic], side_text(baseline)]
    for side in others:
        headings += [side_text(side), f'{side.name} against {baseline.name}']
    rows = []
    for row in comparison.rows:
        cells = [row.measure.title, _spread_text(row.spreads[baseline.name], row.measure.kind)]
        for side in others:
            cells += [_spread_text(row.spreads[side.name], row.measure.kind), _verdict(row, baseline, side)]
        rows.append(cells)
    title = ' / '.join(side.name for side in [baseline, *others])
    return Table(f'Comparison: {title}', headings, rows)


def runs_table(comparison: Comparison, runs: Optional[Sequence[TrainedRun]] = None) -> Table:
    """The measures by run, of all runs or of some."""
    runs = comparison.runs if runs is None else runs
    sides = {run.name: side.name for side in comparison.sides for run in side.runs}
    rows = [
        ['side', *(sides[run.name] for run in runs)],
        ['seed', *(NONE if run.seed is None else str(run.seed) for run in runs)],
    ]
    for row in comparison.rows:
        rows.append([row.measure.title, *(_value_text(row.values[run.name], row.measure.kind) for run in runs)])
    return Table('Each run', ['run', *(run.name for run in runs)], rows)


def config_table(comparison: Comparison) -> Table:
    """The config keys that sides have different values for; without rows if the configs are the same."""
    names = [side.name for side in comparison.sides]
    rows = [[key, *(values.get(name, NONE) for name in names)] for key, values in comparison.differences.items()]
    return Table('What the configs differ in', ['key', *names], rows)


def origin(comparison: Comparison) -> List[str]:
    """When and where the runs were trained, with what, and by which commands, as far as they say it."""
    runs = comparison.runs
    lines = ['Trained {} to {} UTC'.format(*(
        datetime.datetime.fromtimestamp(moment, datetime.timezone.utc).strftime('%Y-%m-%d %H:%M')
        for moment in (min(run.spans[0][0] for run in runs), max(run.spans[-1][1] for run in runs))))]
    for title in ('machine', 'versions'):
        said = [run.from_summary(title) for run in runs]
        texts = [', '.join(f'{key} {value}' for key, value in known.items() if value is not None)
                 for known in said if isinstance(known, dict)]
        lines += [f'{title.capitalize()}: {text}' for text in dict.fromkeys(texts)]
    for run in runs:
        commands = [part['command'] for part in run.parts if part.get('command')]
        for number, command in enumerate(commands, 1):
            name = f'{run.name}, part {number}' if len(commands) > 1 else run.name
            lines.append(f'{name}: {shlex.join(map(str, command)) if isinstance(command, list) else command}')
    return lines


# ---- text ------------------------------------------------------------------------------------------------------------

def _value_text(value: Optional[float], kind: str, beside: Optional[float] = None) -> str:
    """As '1:02:03', '1,234', '12.3' or '57.3%'; with as many digits after the point as ``beside`` has."""
    if value is None:
        return NONE
    if kind == 'time':
        return time_text(value)
    if kind == 'share':
        return f'{value:.1%}'
    size = abs(value if beside is None else beside)
    return '{:,.{}f}'.format(value, 0 if kind == 'count' or size >= 1000 else 2 if size < 10 else 1)


def _spread_text(spread: Optional[Spread], kind: str) -> str:
    """As '12.3 [11.9, 12.8]'; the centre alone where there is nothing around it."""
    if spread is None:
        return NONE
    centre, low, high = (_value_text(value, kind, spread.centre) for value in (spread.centre, spread.low, spread.high))
    return centre if low == high else f'{centre} [{low}, {high}]'


def _verdict(row: Row, baseline: Side, side: Side) -> str:
    """As '1.62 x faster' or, where a ratio says little, '33.9% higher'; a dash where nothing can be said."""
    base, own = row.spreads[baseline.name], row.spreads[side.name]
    if base is None or own is None or side.name in row.not_comparable or row.measure.about not in WORDS:
        return NONE
    greater, less = WORDS[row.measure.about]
    if row.measure.about in (HITS, REWARDS):
        # Of the numbers as they are shown, from which a reader will work it out.
        shown = [float(_value_text(spread.centre, row.measure.kind).strip('%').replace(',', ''))
                 for spread in (base, own)]
        difference = shown[1] - shown[0]
        text = f'{abs(difference):.1f} points'
        if row.measure.about == REWARDS:
            text = _value_text(abs(difference), row.measure.kind, max(shown, key=abs))
        return f'{text} {greater if difference > 0 else less}' if any(map('123456789'.count, text)) else SAME
    ratio = row.ratios[side.name]
    if not ratio:
        return NONE
    times = f'{max(ratio, 1 / ratio):,.2f}'
    return SAME if times == '1.00' else f'{times} x {less if ratio > 1 else greater}'


def side_text(side: Side) -> str:
    return f'{side.name}, {runs_text(len(side.runs))}'


def runs_text(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


# ---- terminal --------------------------------------------------------------------------------------------------------

def show(comparison: Comparison, console: Console) -> None:
    for warning in comparison.warnings:
        if warning.blocks:
            line(console, f'WARNING: {warning.text}')
    for others in [[side] for side in comparison.sides[1:]] or [[]]:
        console.print(drawn(*measures_table(comparison, others), numbers=True))
    several = len(comparison.sides) < len(comparison.runs) and comparison.statistic == MEDIAN
    if several or any(comparison.mixed.values()):
        for beside in _beside_each_other(comparison.runs, console.width):
            console.print(drawn(*runs_table(comparison, beside), numbers=True))
    differences = config_table(comparison)
    if differences.rows:
        shown = differences._replace(rows=differences.rows[:SHOWN_DIFFERENCES])
        console.print(drawn(*shown))
        more = len(differences.rows) - len(shown.rows)
        if more:
            line(console, f'... and {more} more; report.html has all of them')
    for warning in comparison.warnings:
        if not warning.blocks:
            line(console, f'WARNING: {warning.text}')
    for text in origin(comparison):
        line(console, text)


def _beside_each_other(runs: Sequence[TrainedRun], width: int) -> List[Sequence[TrainedRun]]:
    """Runs in turn, as many at once as a table of this width has columns for."""
    column = max(VALUE_WIDTH, *(len(run.name) for run in runs)) + RULE_WIDTH
    at_once = max(1, (width - TITLE_WIDTH - 2 * RULE_WIDTH) // column)
    return [runs[first:first + at_once] for first in range(0, len(runs), at_once)]


def line(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(Text(text), soft_wrap=True)

"""The comparison as headings and cells, the same on the terminal and in the page; and how the terminal shows it."""
import contextlib
import sys
from typing import Callable, Iterator, List, NamedTuple, Optional

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from .judging import Comparison, Side, Spread

NONE = '-'
PLAIN_WIDTH = 240
# The page shows all of them.
SHOWN_DIFFERENCES = 15


class Table(NamedTuple):
    """Rows have as many cells as there are headings; the first cell of a row is its heading."""
    caption: str
    headings: List[str]
    rows: List[List[str]]


def measures_table(comparison: Comparison) -> Table:
    """The measures by side, with a column of ratios after each side that is not the baseline."""
    baseline, *others = comparison.sides
    headings = ['mean ± standard deviation', side_text(baseline)]
    for side in others:
        headings += [side_text(side), f'{baseline.name} / {side.name}']
    rows = []
    for row in comparison.rows:
        cells = [row.measure.title, _spread_text(row.spreads[baseline.name], row.measure.kind)]
        for side in others:
            cells += [_spread_text(row.spreads[side.name], row.measure.kind), _ratio_text(row.ratios[side.name])]
        rows.append(cells)
    return Table(f'Comparison: {comparison.title}', headings, rows)


def runs_table(comparison: Comparison) -> Table:
    """The measures by run."""
    runs = comparison.runs
    rows = [
        ['side', *(side.name for side in comparison.sides for _ in side.runs)],
        ['seed', *(NONE if run.seed is None else str(run.seed) for run in runs)],
    ]
    for row in comparison.rows:
        rows.append([row.measure.title, *(_value_text(row.values[run.name], row.measure.kind) for run in runs)])
    return Table('Each run', ['run', *(run.name for run in runs)], rows)


def config_table(comparison: Comparison) -> Table:
    """The config keys that sides have different values for; without rows if the configs are the same."""
    names = [side.name for side in comparison.sides]
    rows = [[difference.key, *(difference.values.get(name, NONE) for name in names)]
            for difference in comparison.differences]
    return Table('What the configs differ in', ['key', *names], rows)


# ---- text ------------------------------------------------------------------------------------------------------------

def _value_text(value: Optional[float], kind: str, beside: Optional[float] = None) -> str:
    """As '1:02:03', '1,234', '12.3' or '57.3%'; with as many digits after the point as ``beside`` has."""
    if value is None:
        return NONE
    if kind == 'time':
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
    if kind == 'share':
        return f'{value:.1%}'
    digits = 2 if abs(value if beside is None else beside) < 10 else 1
    return '{:,.{}f}'.format(value, 0 if kind == 'count' else digits)


def _spread_text(spread: Optional[Spread], kind: str) -> str:
    """As '12.3 ± 0.4'; the mean alone for one run."""
    if spread is None:
        return NONE
    mean = _value_text(spread.mean, kind)
    return mean if spread.deviation is None else f'{mean} ± {_value_text(spread.deviation, kind, spread.mean)}'


def _ratio_text(ratio: Optional[float]) -> str:
    return NONE if ratio is None else f'{ratio:,.2f}'


def side_text(side: Side) -> str:
    return f'{side.name}, {runs_text(len(side.runs))}'


def runs_text(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


# ---- terminal --------------------------------------------------------------------------------------------------------

def default_console() -> Console:
    """Standard output; a file or a pipe is as wide as a table needs."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


@contextlib.contextmanager
def reading_bar(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over bytes on a terminal, gone when all are read; takes a run's name and how many more bytes were read."""
    columns = (TextColumn('reading {task.description}', markup=False), BarColumn(), DownloadColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task('', total=total)
        yield lambda name, size: progress.update(task, description=name, advance=size)


def show(comparison: Comparison, console: Console) -> None:
    console.print(_drawn(measures_table(comparison), numbers=True))
    differences = config_table(comparison)
    if differences.rows:
        shown = differences._replace(rows=differences.rows[:SHOWN_DIFFERENCES])
        console.print(_drawn(shown, numbers=False))
        more = len(differences.rows) - len(shown.rows)
        if more:
            line(console, f'... and {more} more; report.html has all of them')
    for warning in comparison.warnings:
        line(console, f'WARNING: {warning}')


def line(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(Text(text), soft_wrap=True)


def _drawn(table: Table, numbers: bool) -> RichTable:
    drawn = RichTable(title=Text(table.caption), title_justify='left')
    for index, heading in enumerate(table.headings):
        drawn.add_column(Text(heading), justify='right' if numbers and index else 'left', overflow='fold')
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn

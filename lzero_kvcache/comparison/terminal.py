"""The comparison on a terminal: a progress bar while files are read, then lines and tables."""
import contextlib
import sys
from typing import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from .comparison import Comparison
from .table import Table, config_table, measures_table

PLAIN_WIDTH = 240
# What the page shows in full.
SHOWN_DIFFERENCES = 15


def default_console() -> Console:
    """
    Overview:
        Standard output; a file or a pipe is as wide as a table needs.
    """
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


@contextlib.contextmanager
def reading_bar(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """
    Overview:
        A bar over bytes, gone when all are read; nothing on what is no terminal.
    Arguments:
        - console (:obj:`Console`): Where to show it.
        - total (:obj:`int`): How many bytes there are.
    Returns:
        - advance (:obj:`Callable[[str, int], None]`): Takes a run's name and how many more bytes were read.
    """
    columns = (TextColumn('reading {task.description}', markup=False), BarColumn(), DownloadColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task('', total=total)
        yield lambda name, size: progress.update(task, description=name, advance=size)


def show(comparison: Comparison, console: Console) -> None:
    """
    Overview:
        Print the comparison.
    Arguments:
        - comparison (:obj:`Comparison`): What to show.
        - console (:obj:`Console`): Where.
    """
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
    """
    Overview:
        Print one line as it is.
    Arguments:
        - console (:obj:`Console`): Where.
        - text (:obj:`str`): The line.
    """
    console.print(Text(text), soft_wrap=True)


def _drawn(table: Table, numbers: bool) -> RichTable:
    drawn = RichTable(title=Text(table.caption), title_justify='left')
    for index, heading in enumerate(table.headings):
        drawn.add_column(Text(heading), justify='right' if numbers and index else 'left', overflow='fold')
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn

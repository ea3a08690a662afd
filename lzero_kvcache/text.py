"""How times and tables are written."""
from typing import Sequence

from rich.table import Column, Table
from rich.text import Text


def time_text(seconds: float) -> str:
    """As '1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def drawn(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> Table:
    """A table for the terminal, whose first column has names; without headings, each name is on one line."""
    columns = [Column(Text(heading)) for heading in headings]
    table = Table(*columns, title=Text(title), title_justify='left', show_header=bool(headings))
    for row in rows:
        table.add_row(*map(Text, row))
    for index, column in enumerate(table.columns):
        column.overflow, column.no_wrap = 'fold', not headings and index == 0
        column.justify = 'right' if numbers and index else 'left'
    return table

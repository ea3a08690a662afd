"""
What a run shows on the terminal: log lines, a progress bar over environment steps, a table at the end. On anything
that is no terminal, and beside LightZero's own output, plain lines take the place of the bar.
"""
import time
from typing import Dict, List, Optional, TextIO, Tuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .status import Status

PLAIN_WIDTH = 240
# Below this, the bar and the remaining time give way to the numbers.
WIDE = 110
PLAIN_EVERY_SECONDS = 15.0


def rate_text(rate: Optional[float]) -> str:
    """
    Overview:
        A share as a percentage.
    Arguments:
        - rate (:obj:`Optional[float]`): Between 0 and 1, None where nothing was counted.
    Returns:
        - text (:obj:`str`): As ``87.5%``, ``-`` for None.
    """
    return '-' if rate is None else f'{rate:.1%}'


def number_text(number: Optional[float], digits: int = 1) -> str:
    """
    Overview:
        A number, or a dash.
    Arguments:
        - number (:obj:`Optional[float]`): The number.
        - digits (:obj:`int`): Digits after the point.
    Returns:
        - text (:obj:`str`): As ``1,234.5``, ``-`` for None.
    """
    return '-' if number is None else '{:,.{}f}'.format(number, digits)


class Terminal:
    """
    Overview:
        The terminal of one run.
    Arguments:
        - file (:obj:`TextIO`): Where to write.
        - live (:obj:`bool`): False for plain lines even on a terminal.
    """

    def __init__(self, file: TextIO, live: bool = True) -> None:
        is_terminal = file.isatty()
        self.console = Console(file=file, highlight=False, markup=False, soft_wrap=True,
                               width=None if is_terminal else PLAIN_WIDTH)
        self.live = live and is_terminal and not self.console.is_dumb_terminal
        self._progress: Optional[Progress] = None
        self._total: Optional[int] = None
        self._repeated: Dict[str, int] = {}
        self._next_plain = 0.0
        self._last_plain = ''

    def line(self, text: str) -> None:
        """
        Overview:
            Show one line, above the bar.
        Arguments:
            - text (:obj:`str`): The line.
        """
        self.console.print(Text(text))

    def repeated(self, text: str) -> None:
        """
        Overview:
            Show a line that comes after every training phase: the first time in full, and at the end how often.
        Arguments:
            - text (:obj:`str`): The line.
        """
        self._repeated[text] = self._repeated.get(text, 0) + 1
        if self._repeated[text] == 1:
            self.line(text)

    def start(self, total: Optional[int], done: int = 0) -> None:
        """
        Overview:
            Start the bar.
        Arguments:
            - total (:obj:`Optional[int]`): The environment steps to go to, None if there is no bound.
            - done (:obj:`int`): Where a resumed run begins.
        """
        self._total = total
        self._next_plain = time.monotonic() + PLAIN_EVERY_SECONDS
        if not self.live:
            return
        wide = self.console.width >= WIDE
        columns = [
            TextColumn('{task.description}'), BarColumn(bar_width=None if wide else 8),
            TextColumn('{task.fields[steps]}'), TextColumn('{task.fields[facts]}'), TimeElapsedColumn(),
        ]
        if wide and total is not None:
            columns.append(TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, refresh_per_second=4, transient=True, expand=wide,
                                  redirect_stdout=False, redirect_stderr=False)
        self._task = self._progress.add_task('start', total=total, completed=done, steps='', facts='')
        self._progress.start()

    def update(self, status: Status) -> None:
        """
        Overview:
            Show how far the run is.
        Arguments:
            - status (:obj:`Status`): The run, now.
        """
        if self._progress is not None:
            self._progress.update(
                self._task, completed=status.env_step, description=f'{status.phase:<8}',
                steps=self._steps(status), facts=self._facts(status)
            )
        elif time.monotonic() >= self._next_plain:
            self._plain(status)

    def finish(self, status: Optional[Status] = None) -> None:
        """
        Overview:
            End the bar.
        Arguments:
            - status (:obj:`Optional[Status]`): The run as it ended.
        """
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        elif status is not None and self._total is not None:
            self._plain(status)
        for text, count in self._repeated.items():
            if count > 1:
                self.line(f'{text} ({count:,} times)')
        self._repeated = {}

    def table(self, title: str, rows: List[Tuple[str, str]]) -> None:
        """
        Overview:
            Show the summary.
        Arguments:
            - title (:obj:`str`): Its heading.
            - rows (:obj:`List[Tuple[str, str]]`): Names and values.
        """
        table = Table(title=Text(title), title_justify='left', show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow='fold')
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        self.console.print(table, soft_wrap=False)

    def _plain(self, status: Status) -> None:
        text = f'{self._steps(status)} env steps, {status.train_iter:,} iterations  {self._facts(status)}'
        self._next_plain = time.monotonic() + PLAIN_EVERY_SECONDS
        if text != self._last_plain:
            self._last_plain = text
            self.line(text)

    def _steps(self, status: Status) -> str:
        total = '' if self._total is None else f'/{self._total:,}'
        return f'{status.env_step:,}{total}'

    @staticmethod
    def _facts(status: Status) -> str:
        reward, rate, speed = number_text(status.last_reward), rate_text(status.hit_rate), number_text(status.speed)
        return f'reward {reward}  hit rate {rate}  {speed} steps/s'

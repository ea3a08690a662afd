"""
What is shown of a run: log lines, a progress bar over environment steps and a table at the end. On anything that is no
terminal, and beside LightZero's own output, plain lines take the place of the bar.
"""
import datetime
import time
from typing import Dict, List, Optional, TextIO, Tuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .summary import POOLS, Evaluation, Result

PLAIN_WIDTH = 240
# Below this, only the numbers have room.
WIDE = 110
PLAIN_EVERY_SECONDS = 15.0


class Terminal:
    """The terminal of one run; ``live=False`` gives plain lines even on a terminal."""

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
        """Show one line, above the bar."""
        self.console.print(Text(text))

    def repeated(self, text: str) -> None:
        """Show a line that comes after every training phase: the first time in full, and at the end how often."""
        self._repeated[text] = self._repeated.get(text, 0) + 1
        if self._repeated[text] == 1:
            self.line(text)

    def start(self, total: Optional[int], done: int = 0) -> None:
        """Start the bar towards ``total`` collected environment steps, None if there is no bound."""
        self._total = total
        self._next_plain = time.monotonic() + PLAIN_EVERY_SECONDS
        if not self.live:
            return
        wide = self.console.width >= WIDE
        steps, facts = TextColumn('{task.fields[steps]}'), TextColumn('{task.fields[facts]}')
        self._progress = Progress(
            TextColumn('{task.description}'), *([BarColumn(bar_width=None)] if wide else []), steps, facts,
            TimeElapsedColumn(), *([TimeRemainingColumn()] if wide and total is not None else []),
            console=self.console, refresh_per_second=4, transient=True, expand=wide, redirect_stdout=False,
            redirect_stderr=False)
        self._task = self._progress.add_task('start', total=total, completed=done, steps='', facts='')
        self._progress.start()

    def update(self, result: Result, phase: str) -> None:
        """Show how far the run is."""
        if self._progress is not None:
            further = f'+{result.collected_env_step - result.env_step:,}'
            self._progress.update(self._task, completed=result.collected_env_step, description=f'{phase:<8}',
                                  steps=self._steps(result, further), facts=self._facts(result))
        elif time.monotonic() >= self._next_plain:
            self._plain(result)

    def finish(self, result: Result) -> None:
        """End the bar; ``result`` is the run as it ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        elif self._total is not None:
            self._plain(result)
        for text, count in self._repeated.items():
            if count > 1:
                self.line(f'{text} ({count:,} times)')
        self._repeated = {}

    def table(self, title: str, rows: List[Tuple[str, str]]) -> None:
        """Show names and values."""
        table = Table(title=Text(title), title_justify='left', show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow='fold')
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        self.console.print(table, soft_wrap=False)

    def _plain(self, result: Result) -> None:
        steps = f'{self._steps(result)} env steps, {result.collected_env_step:,} collected'
        text = f'{steps}, {result.train_iter:,} iterations  {self._facts(result)}'
        self._next_plain = time.monotonic() + PLAIN_EVERY_SECONDS
        if text != self._last_plain:
            self._last_plain = text
            self.line(text)

    def _steps(self, result: Result, further: str = '') -> str:
        total = '' if self._total is None else f'/{self._total:,}'
        return f'{result.env_step:,}{further}{total}'

    @staticmethod
    def _facts(result: Result) -> str:
        rate, speed = rate_text(result.hit_rates.get('total')), number_text(result.env_steps_per_second)
        return f'reward {number_text(result.last_reward)}  hit rate {rate}  {speed} steps/s'


def rate_text(rate: Optional[float]) -> str:
    """A share as ``87.5%``; ``-`` for None."""
    return '-' if rate is None else f'{rate:.1%}'


def number_text(number: Optional[float]) -> str:
    """A number as ``1,234.5``; ``-`` for None."""
    return '-' if number is None else f'{number:,.1f}'


def reward_text(evaluation: Evaluation) -> str:
    """As ``57.3 ± 4.1 over 8 episodes``: the mean and the standard deviation."""
    if evaluation.deviation is None:
        return number_text(evaluation.reward)
    return (f'{number_text(evaluation.reward)} ± {number_text(evaluation.deviation)} over {evaluation.episodes} '
            'episodes')


def megabytes_text(number: Optional[float]) -> str:
    return '-' if number is None else f'{number_text(number)} MiB'


def steps_text(trained_on: int, collected: int) -> str:
    """Both counts; the second one alone if they are the same, or nobody counted it."""
    return f'{trained_on:,}' if collected <= trained_on else f'{trained_on:,} trained on, {collected:,} collected'


def summary_rows(result: Result) -> List[Tuple[str, str]]:
    """The table at the end of a run: names and values."""
    last = result.evaluations[-1] if result.evaluations else None
    reward = '- (no evaluation yet; policy.eval_freq says how often)'
    if last is not None:
        reward = f'{reward_text(last)}, after {last.env_step:,} steps'
    rates = '  '.join(f'{pool} {rate_text(result.hit_rates.get(pool))}' for pool in POOLS)
    skipped = result.counters.get('skipped')
    return [
        ('cache system', result.cache),
        *([('processes', str(result.processes))] if result.processes > 1 else []),
        ('time', str(datetime.timedelta(seconds=round(result.seconds)))),
        ('environment steps', steps_text(result.env_step, result.collected_env_step)),
        ('training iterations', f'{result.train_iter:,}'),
        ('steps per second', number_text(result.env_steps_per_second)),
        ('peak memory, host', megabytes_text(result.host_memory_mb)),
        ('peak memory, device', megabytes_text(result.device_memory_mb)),
        ('cache memory', megabytes_text(result.cache_memory_mb)),
        ('hit rates', rates),
        *([('skipped for nan or inf', f'{skipped:,} rows')] if skipped else []),
        ('last reward', reward),
        ('best reward', number_text(result.best_reward)),
        ('event files', result.event_files),
        ('checkpoint', result.checkpoint or '-'),
        ('log', result.log_file or '-'),
    ]

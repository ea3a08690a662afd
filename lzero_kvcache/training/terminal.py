"""
What is shown of a run: log lines, a progress bar over environment steps and a table at the end. On anything that is no
terminal, and beside LightZero's own output, plain lines take the place of the bar. What LightZero, DI-engine and their
worker processes print goes to a log file.
"""
import contextlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from types import SimpleNamespace
from typing import Iterator, List, Optional, Sequence, TextIO, Tuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from ..host.patches import applied
from ..run_files import TRAIN
from ..summary import Result, number_text, rate_text, reward_text
from ..text import drawn, time_text

# What a training prints is kept in files, where a path should be in one piece.
PLAIN_WIDTH = 240
# Below this, only the text has room, on two lines if need be.
WIDE = 140
PLAIN_EVERY_SECONDS = 15.0
PACKAGE_LOGGER = 'lzero_kvcache'
TableRows = Sequence[Tuple[str, ...]]
# clear_caches() prints this line, as LightZero's own does; everything else of the package is logged.
PRINTED = re.compile(r'^Cleared WorldModel ')


class Terminal:
    """
    A terminal or a file; ``live=False`` gives plain lines even on a terminal. In a file, a table is at most as wide as
    COLUMNS says.
    """

    def __init__(self, file: TextIO, live: bool = True) -> None:
        is_terminal = file.isatty()
        self.console = Console(file=file, highlight=False, markup=False, soft_wrap=True,
                               width=None if is_terminal else shutil.get_terminal_size((PLAIN_WIDTH, 0)).columns)
        self.live = live and is_terminal and not self.console.is_dumb_terminal
        self._repeated: Counter[str] = Counter()

    def line(self, text: str) -> None:
        """Show one line, above the bar."""
        self.console.print(Text(text))

    def repeated(self, text: str) -> None:
        """Show a line that comes after every training phase: the first time in full, and at the end how often."""
        self._repeated[text] += 1
        if self._repeated[text] == 1:
            self.line(text)

    def repetitions(self) -> None:
        """Say how often such lines came."""
        for text, count in self._repeated.items():
            if count > 1:
                self.line(f'{text} ({count:,} times)')

    def table(self, title: str, rows: TableRows) -> None:
        """Show names and values."""
        self.console.print(drawn(title, (), rows), soft_wrap=False)


class Bar:
    """A bar over steps with a text; plain lines from time to time where there is no terminal."""

    def __init__(self, terminal: Terminal, total: Optional[int], done: int = 0, every: float = PLAIN_EVERY_SECONDS
                 ) -> None:
        self._terminal, self._every = terminal, every
        self._next, self._shown = time.monotonic() + every, ''
        self._progress: Optional[Progress] = None
        if terminal.live:
            wide = terminal.console.width >= WIDE
            self._progress = Progress(
                TextColumn('{task.description}', table_column=Column(overflow='fold')),
                *([BarColumn(bar_width=None)] if wide else []), TimeElapsedColumn(table_column=Column(no_wrap=True)),
                console=terminal.console, refresh_per_second=4, transient=True, expand=wide, redirect_stdout=False,
                redirect_stderr=False)
            self._task = self._progress.add_task('', total=total, completed=done)
            self._progress.start()

    def update(self, done: int, text: str, total: Optional[int] = None) -> None:
        """Show how far it is; ``total`` replaces the number of steps, if that has changed."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=text, total=total)
        elif time.monotonic() >= self._next:
            self._plain(text)

    def close(self, text: str = '') -> None:
        """End the bar; a plain line says how it ended."""
        if self._progress is not None:
            self._progress.stop()
        elif text:
            self._plain(text)

    def _plain(self, text: str) -> None:
        self._next = time.monotonic() + self._every
        if text != self._shown:
            self._shown = text
            self._terminal.line(text)


def megabytes_text(number: Optional[float]) -> str:
    return '-' if number is None else f'{number_text(number)} MiB'


def steps_text(trained_on: int, collected: int) -> str:
    """Both counts; the first one alone if they are the same, or the second was not counted."""
    return f'{trained_on:,}' if collected <= trained_on else f'{trained_on:,} trained on, {collected:,} collected'


def summary_rows(result: Result) -> List[Tuple[str, str]]:
    """The table at the end of a run: names and values."""
    last = result.evaluations[-1] if result.evaluations else None
    if last is not None:
        reward = f'{reward_text(last)}, after {last.env_step:,} steps'
    else:
        reward = '- (no evaluation yet; policy.eval_freq says how often)' if result.task == TRAIN else '-'
    rates = '  '.join(f'{pool} {rate_text(rate)}' for pool, rate in result.hit_rates.items())
    skipped = result.counters.get('skipped')
    return [
        ('cache system', result.cache),
        *([('processes', str(result.processes))] if result.processes > 1 else []),
        ('time', time_text(result.seconds)),
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


# ---- where output goes ---------------------------------------------------------------------------------------------

class Output:
    """
    Takes standard output and error over, on file descriptors, since environments in processes of their own print as
    well. What is written before the experiment's folder is known waits in a temporary file. ``verbose`` shows
    everything on the terminal too, ``silent`` nothing.
    """

    def __init__(self, verbose: bool = False, silent: bool = False) -> None:
        self.verbose = verbose and not silent
        self.path: Optional[str] = None
        encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
        self._shown = _text(os.open(os.devnull, os.O_WRONLY) if silent else os.dup(1), encoding)
        self._errors = _text(os.dup(2), encoding)
        self.terminal = Terminal(self._shown, live=not verbose)
        # Log records of this package are shown as lines of the terminal.
        self._handler = logging.StreamHandler(SimpleNamespace(write=self.terminal.line, flush=lambda: None))
        self._handler.setLevel(logging.INFO)
        self._handler.setFormatter(logging.Formatter('%(levelname)s: %(message)s'))
        self._handler.terminator = ''

    def __enter__(self) -> 'Output':
        sys.stdout.flush()
        sys.stderr.flush()
        self._opened = contextlib.ExitStack()
        for file in (self._errors, self._shown):
            self._opened.enter_context(file)
        self._log = self._opened.enter_context(tempfile.TemporaryFile(buffering=0))
        self._opened.enter_context(applied(
            descriptors=lambda original: original if self.verbose else self._log.fileno(),
            stdout=lambda original: _Lines(self, self._shown), stderr=lambda original: _Lines(self, self._errors),
            plain_logs=lambda present: present or '1',
        ))
        logging.getLogger(PACKAGE_LOGGER).addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(PACKAGE_LOGGER).removeHandler(self._handler)
        self._opened.close()

    def attach(self, path: str) -> None:
        """Append what was written so far, and all that follows, to a file of the experiment."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'ab', buffering=0) as file:
            self._log.seek(0)
            file.write(self._log.read())
            for descriptor in (self._log.fileno(), *(() if self.verbose else (1, 2))):
                os.dup2(file.fileno(), descriptor)
        self.path = path

    def write_log(self, text: str) -> None:
        """Write to the log file alone."""
        os.write(self._log.fileno(), text.encode('utf-8', 'replace'))


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """A context in which this package logs nothing, for trials of a config: the run will log the same lines."""
    logger = logging.getLogger(PACKAGE_LOGGER)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _text(descriptor: int, encoding: str) -> TextIO:
    """A descriptor as a text file, in which '?' stands for characters that its encoding lacks."""
    return open(descriptor, 'w', encoding=encoding, errors='replace', buffering=1)


class _Lines(io.TextIOBase):
    """Standard output or error of the Python code of this process."""

    encoding = 'utf-8'

    def __init__(self, output: Output, shown: TextIO) -> None:
        self._output = output
        self._shown = shown
        self._pid = os.getpid()
        self._rest = ''

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._output.write_log(text)
        if self._output.verbose:
            self._shown.write(text)
            self._shown.flush()
        # A forked environment must not speak for this process.
        elif os.getpid() == self._pid:
            *lines, self._rest = (self._rest + text).split('\n')
            for line in lines:
                if PRINTED.match(line):
                    self._output.terminal.repeated(line)
        return len(text)

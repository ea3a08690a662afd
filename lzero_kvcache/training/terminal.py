"""
What reaches the terminal, and what the log file. LightZero, DI-engine and their worker processes write to the log file;
the terminal has this package's log lines, a progress bar over environment steps and a table at the end. On anything
that is no terminal, and beside LightZero's own output, plain lines take the place of the bar.
"""
import io
import logging
import os
import re
import sys
import tempfile
import time
from typing import Dict, List, Optional, TextIO, Tuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..host.patches import applied
from .summary import Status, number_text, rate_text

PACKAGE_LOGGER = 'lzero_kvcache'
# clear_caches() prints this line, as LightZero's own does; everything else of the package is logged.
PRINTED = re.compile(r'^Cleared WorldModel ')
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
        columns: List[ProgressColumn]
        columns = [TextColumn(text) for text in ('{task.description}', '{task.fields[steps]}', '{task.fields[facts]}')]
        columns.append(TimeElapsedColumn())
        if wide:
            columns.insert(1, BarColumn(bar_width=None))
        if wide and total is not None:
            columns.append(TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, refresh_per_second=4, transient=True, expand=wide,
                                  redirect_stdout=False, redirect_stderr=False)
        self._task = self._progress.add_task('start', total=total, completed=done, steps='', facts='')
        self._progress.start()

    def update(self, status: Status) -> None:
        """Show how far the run is."""
        if self._progress is not None:
            self._progress.update(
                self._task, completed=status.collected, description=f'{status.phase:<8}',
                steps=self._steps(status, f'+{status.collected - status.env_step:,}'), facts=self._facts(status)
            )
        elif time.monotonic() >= self._next_plain:
            self._plain(status)

    def finish(self, status: Status) -> None:
        """End the bar; ``status`` is the run as it ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        elif self._total is not None:
            self._plain(status)
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

    def _plain(self, status: Status) -> None:
        steps = f'{self._steps(status)} env steps, {status.collected:,} collected'
        text = f'{steps}, {status.train_iter:,} iterations  {self._facts(status)}'
        self._next_plain = time.monotonic() + PLAIN_EVERY_SECONDS
        if text != self._last_plain:
            self._last_plain = text
            self.line(text)

    def _steps(self, status: Status, further: str = '') -> str:
        total = '' if self._total is None else f'/{self._total:,}'
        return f'{status.env_step:,}{further}{total}'

    @staticmethod
    def _facts(status: Status) -> str:
        reward, rate, speed = number_text(status.last_reward), rate_text(status.hit_rate), number_text(status.speed)
        return f'reward {reward}  hit rate {rate}  {speed} steps/s'


class Output:
    """
    Takes standard output and error over, on file descriptors, since environments in processes of their own print as
    well. What is written before the experiment's folder is known waits in a temporary file. ``verbose`` shows
    everything on the terminal too, ``silent`` nothing but errors.
    """

    def __init__(self, verbose: bool = False, silent: bool = False) -> None:
        self.verbose = verbose and not silent
        self.path: Optional[str] = None
        encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
        self._shown = _text(os.open(os.devnull, os.O_WRONLY) if silent else os.dup(1), encoding)
        self.errors = _text(os.dup(2), encoding)
        self.terminal = Terminal(self._shown, live=not verbose)
        self._handler = _TerminalHandler(self.terminal)

    def __enter__(self) -> 'Output':
        sys.stdout.flush()
        sys.stderr.flush()
        self._temporary: Optional[str]
        self._log, self._temporary = tempfile.mkstemp(prefix='lzero_kvcache_', suffix='.log')
        self._patches = applied(
            descriptors=lambda original: original if self.verbose else self._log,
            stdout=lambda original: _Lines(self, self._shown), stderr=lambda original: _Lines(self, self.errors),
            plain_logs=lambda present: present or '1',
        )
        self._patches.__enter__()
        logging.getLogger(PACKAGE_LOGGER).addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(PACKAGE_LOGGER).removeHandler(self._handler)
        self._patches.__exit__(None, None, None)
        os.close(self._log)
        self._shown.close()
        self.errors.close()
        if self._temporary is not None:
            os.unlink(self._temporary)

    def attach(self, path: str) -> None:
        """Go on writing in a file of the experiment, which is added to, after what was written so far."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        assert self._temporary is not None
        with open(self._temporary, 'rb') as earlier:
            os.write(handle, earlier.read())
        os.unlink(self._temporary)
        self._temporary = None
        for descriptor in (self._log, *(() if self.verbose else (1, 2))):
            os.dup2(handle, descriptor)
        os.close(handle)
        self.path = path

    def write_log(self, text: str) -> None:
        """Write to the log file alone."""
        os.write(self._log, text.encode('utf-8', 'replace'))


def _text(descriptor: int, encoding: str) -> TextIO:
    """A terminal that cannot show a character shows '?' for it, and the run goes on."""
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


class _TerminalHandler(logging.Handler):
    """Shows a record of this package as ``LEVEL: message``."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.INFO)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._terminal.line(f'{record.levelname}: {record.getMessage()}')
        except Exception:
            self.handleError(record)

"""
Where output goes: LightZero, DI-engine and their worker processes write to the log file, and this package's log lines
are shown on the terminal.
"""
import io
import logging
import os
import re
import sys
import tempfile
from typing import Optional, TextIO

from ..host.patches import applied
from .terminal import Terminal

PACKAGE_LOGGER = 'lzero_kvcache'
# clear_caches() prints this line, as LightZero's own does; everything else of the package is logged.
PRINTED = re.compile(r'^Cleared WorldModel ')


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

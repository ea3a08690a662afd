"""
Where output goes: LightZero, DI-engine and their worker processes write to the log file, and this package's log lines
are shown on the terminal.
"""
import contextlib
import io
import logging
import os
import re
import sys
import tempfile
from types import SimpleNamespace
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
    everything on the terminal too, ``silent`` nothing.
    """

    def __init__(self, verbose: bool = False, silent: bool = False) -> None:
        self.verbose = verbose and not silent
        self.path: Optional[str] = None
        encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
        self._shown = _text(os.open(os.devnull, os.O_WRONLY) if silent else os.dup(1), encoding)
        self._errors = _text(os.dup(2), encoding)
        self.terminal = Terminal(self._shown, live=not verbose)
        # Records of this package are lines of the terminal.
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
        """Go on writing in a file of the experiment, which is added to, after what was written so far."""
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

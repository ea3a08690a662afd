"""
Where output goes: LightZero, DI-engine and their worker processes write to a log file; only what this package has to
say reaches the terminal. Done on file descriptors, since environments in processes of their own print as well.
"""
import io
import logging
import os
import re
import sys
import tempfile
from typing import Callable, Optional, TextIO

PACKAGE_LOGGER = 'lzero_kvcache'
# clear_caches() prints this line, as LightZero's own does; everything else of the package is logged.
PRINTED = re.compile(r'^Cleared WorldModel ')


class Output:
    """
    Overview:
        Takes standard output and error over for the time of a run. What is written before the experiment's folder is
        known waits in a temporary file.
    Arguments:
        - verbose (:obj:`bool`): Show everything on the terminal as well.
        - silent (:obj:`bool`): Show nothing but errors.
    """

    def __init__(self, verbose: bool = False, silent: bool = False) -> None:
        self.verbose = verbose and not silent
        self.path: Optional[str] = None
        self.on_log: Callable[[str], None] = lambda line: None
        self.on_printed: Callable[[str], None] = lambda line: None
        encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
        self._saved = (os.dup(1), os.dup(2))
        self._streams = (sys.stdout, sys.stderr)
        # A terminal that cannot show a character shows '?' for it, and the run goes on.
        self.terminal = _text(os.open(os.devnull, os.O_WRONLY) if silent else os.dup(1), encoding)
        self.errors = _text(os.dup(2), encoding)
        self._log: int = -1
        self._handler: Optional[logging.Handler] = None

    def __enter__(self) -> 'Output':
        for stream in self._streams:
            stream.flush()
        self._temporary: Optional[str]
        handle, self._temporary = tempfile.mkstemp(prefix='lzero_kvcache_', suffix='.log')
        self._use(handle)
        sys.stdout, sys.stderr = _Lines(self, self._saved[0], True), _Lines(self, self._saved[1], False)
        # The pretty handler of ditk wraps a log file at 80 characters.
        os.environ.setdefault('DISABLE_RICH', '1')
        self._handler = _TerminalHandler(self)
        logging.getLogger(PACKAGE_LOGGER).addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            logging.getLogger(PACKAGE_LOGGER).removeHandler(self._handler)
        sys.stdout, sys.stderr = self._streams
        for target, saved in zip((1, 2), self._saved):
            os.dup2(saved, target)
            os.close(saved)
        os.close(self._log)
        self.terminal.close()
        self.errors.close()
        if self._temporary is not None:
            os.unlink(self._temporary)

    def attach(self, path: str) -> None:
        """
        Overview:
            Go on writing in a file of the experiment, after what was written so far.
        Arguments:
            - path (:obj:`str`): The log file; it may exist already, and is added to.
        """
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if self._temporary is not None:
            with open(self._temporary, 'rb') as earlier:
                os.write(handle, earlier.read())
            os.unlink(self._temporary)
            self._temporary = None
        old = self._log
        self._use(handle)
        os.close(old)
        self.path = path

    def write_log(self, text: str) -> None:
        """
        Overview:
            Write to the log file alone.
        Arguments:
            - text (:obj:`str`): Any text, lines with their ends.
        """
        os.write(self._log, text.encode('utf-8', 'replace'))

    def _use(self, handle: int) -> None:
        self._log = handle
        if not self.verbose:
            os.dup2(handle, 1)
            os.dup2(handle, 2)


def _text(descriptor: int, encoding: str) -> TextIO:
    return open(descriptor, 'w', encoding=encoding, errors='replace', buffering=1)


class _Lines(io.TextIOBase):
    """Standard output or error of the Python code of this process."""

    encoding = 'utf-8'

    def __init__(self, output: Output, echo_to: int, watch: bool) -> None:
        self._output = output
        self._echo_to = echo_to
        self._watch = watch
        self._pid = os.getpid()
        self._rest = ''

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._output.write_log(text)
        if self._output.verbose:
            os.write(self._echo_to, text.encode('utf-8', 'replace'))
        # A forked environment must not speak for this process.
        elif self._watch and os.getpid() == self._pid:
            *lines, self._rest = (self._rest + text).split('\n')
            for line in lines:
                if PRINTED.match(line):
                    self._output.on_printed(line)
        return len(text)


class _TerminalHandler(logging.Handler):
    """Shows a record of this package as ``LEVEL: message``."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.INFO)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._output.on_log(f'{record.levelname}: {record.getMessage()}')
        except Exception:
            self.handleError(record)

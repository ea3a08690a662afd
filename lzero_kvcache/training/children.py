"""
The trainings of an experiment as processes: started, watched, interrupted together, shown on the terminal. What they
are, and where they begin, is said by ``experiment.py``.
"""
import contextlib
import datetime
import os
import re
import signal
import subprocess
import time
from collections import deque
from typing import IO, Any, Deque, Dict, Iterator, List, Optional, TextIO

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .experiment import Experiment, Run
from .terminal import Terminal, number_text

POLL_SECONDS = 0.25
PLAIN_EVERY_SECONDS = 60.0
# In every line that a training prints of how far it is.
STEPS = re.compile(r'([\d,]+)(?:/[\d,]+)? env steps')


class Child:
    """
    Overview:
        One training in a process of its own.
    Arguments:
        - run (:obj:`Run`): The training.
        - command (:obj:`List[str]`): What trains it.
        - lock (:obj:`int`): Held for as long as the process lives.
    """

    def __init__(self, run: Run, command: List[str], lock: int) -> None:
        self.run = run
        self.env_step = 0
        self._rest = ''
        with open(run.log, 'ab') as log:
            self._read: IO[str] = open(run.log, encoding='utf-8', errors='replace')
            self._read.seek(0, os.SEEK_END)
            # In a session of its own, Ctrl-C reaches it once and not twice.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                pass_fds=[lock]
            )

    def look(self) -> Optional[int]:
        """
        Overview:
            Read how far it is.
        Returns:
            - code (:obj:`Optional[int]`): Its exit code, None while it runs.
        """
        code = self.process.poll()
        *lines, self._rest = (self._rest + self._read.read()).split('\n')
        for line in lines:
            for steps in STEPS.findall(line):
                self.env_step = int(steps.replace(',', ''))
        if code is not None:
            self._read.close()
        return code


class Board:
    """
    Overview:
        What an experiment shows: a bar over the environment steps of all runs and one for each that is running. Plain
        lines where there is no terminal.
    Arguments:
        - file (:obj:`TextIO`): Where to write.
        - experiment (:obj:`Experiment`): What is shown.
    """

    def __init__(self, file: TextIO, experiment: Experiment) -> None:
        self._terminal = Terminal(file)
        self._runs, self._each = len(experiment.runs), experiment.max_env_step
        self._done = 0
        self._bars: Dict[str, Any] = {}
        self._next_plain = time.monotonic() + PLAIN_EVERY_SECONDS
        self._progress: Optional[Progress] = None
        if self._terminal.live:
            self._progress = Progress(
                TextColumn('{task.description}'), BarColumn(), TextColumn('{task.completed:,.0f}/{task.total:,.0f}'),
                TimeElapsedColumn(), console=self._terminal.console, transient=True,
            )
            self._all = self._progress.add_task('', total=self._runs * self._each)
            self._progress.start()

    def line(self, text: str) -> None:
        """
        Overview:
            Show a line, above the bars.
        """
        self._terminal.line(text)

    def done(self) -> None:
        """
        Overview:
            Count a run that is done.
        """
        self._done += 1

    def update(self, children: List[Child]) -> None:
        """
        Overview:
            Show how far all are.
        Arguments:
            - children (:obj:`List[Child]`): Those that are running.
        """
        steps = {child.run.name: min(child.env_step, self._each) for child in children}
        said = f'{self._done} of {self._runs} runs done'
        if self._progress is None:
            if time.monotonic() >= self._next_plain:
                self._next_plain = time.monotonic() + PLAIN_EVERY_SECONDS
                self.line('; '.join([said, *(f'{name} {step:,}/{self._each:,}' for name, step in steps.items())]))
            return
        for name in set(self._bars) - set(steps):
            self._progress.remove_task(self._bars.pop(name))
        for name, step in steps.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=self._each)
            self._progress.update(self._bars[name], completed=step)
        self._progress.update(self._all, description=said, completed=self._done * self._each + sum(steps.values()))

    def close(self) -> None:
        """
        Overview:
            End the bars.
        """
        if self._progress is not None:
            self._progress.stop()


class Children:
    """
    Overview:
        Runs what an experiment lacks. ``failed`` are the runs whose process failed, ``interrupted`` is the signal that
        ended all.
    Arguments:
        - experiment (:obj:`Experiment`): The experiment, opened.
        - lock (:obj:`int`): What ``Experiment.opened`` gave.
        - jobs (:obj:`int`): How many run at once.
        - board (:obj:`Board`): Where it is shown.
    """

    def __init__(self, experiment: Experiment, lock: int, jobs: int, board: Board) -> None:
        self.failed: List[Run] = []
        self.interrupted: Optional[int] = None
        self._experiment, self._lock, self._jobs, self._board = experiment, lock, jobs, board
        self._waiting: Deque[Run] = deque()
        self._running: List[Child] = []
        self._signals: Deque[int] = deque()

    def run(self) -> None:
        """
        Overview:
            Start what is not done, and wait for its end, or for that of what was started when a signal came.
        """
        for run in self._experiment.runs:
            if run.result is None:
                self._waiting.append(run)
            else:
                self._board.done()
                self._board.line(f'{run.name}: is done already')
        with self._caught():
            while self._running or (self._waiting and self.interrupted is None):
                while self._waiting and len(self._running) < self._jobs and self.interrupted is None:
                    self._start(self._waiting.popleft())
                for child in list(self._running):
                    code = child.look()
                    if code is not None:
                        self._running.remove(child)
                        self._ended(child.run, code)
                self._board.update(self._running)
                time.sleep(POLL_SECONDS)
                while self._signals:
                    self._stop(self._signals.popleft())

    def _start(self, run: Run) -> None:
        command = self._experiment.command(run)
        how = f'goes on from {command[command.index("--resume") + 1]}' if '--resume' in command else 'begins'
        self._board.line(f'{run.name}: {how}')
        self._running.append(Child(run, command, self._lock))

    def _ended(self, run: Run, code: int) -> None:
        result = run.result
        if result is not None:
            self._board.done()
            time_taken = datetime.timedelta(seconds=round(result.seconds))
            reward = number_text(result.last_reward)
            self._board.line(f'{run.name}: done, {result.env_step:,} env steps in {time_taken}, last reward {reward}')
        elif self.interrupted is not None:
            self._board.line(f'{run.name}: interrupted')
        else:
            self.failed.append(run)
            self._board.line(f'{run.name}: failed with exit code {code}; {run.log} says why')

    def _stop(self, signum: int) -> None:
        self.interrupted = signum
        if self._running:
            self._board.line('interrupted; waiting for checkpoints')
        for child in self._running:
            child.process.send_signal(signum)

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, lambda signum, _: self._signals.append(signum))
                  for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

"""The trainings of an experiment as processes: started, watched, interrupted together, shown on the terminal."""
import datetime
import subprocess
import time
from collections import deque
from typing import Deque, List, Optional, TextIO

from ..host.patches import applied
from ..summary import read_progress
from .experiment import Experiment, Trial
from .terminal import Bar, Terminal, number_text

POLL_SECONDS = 0.25
PLAIN_EVERY_SECONDS = 60.0


class Child:
    """One training in a process of its own, which holds the experiment's lock for as long as it lives."""

    def __init__(self, trial: Trial, command: List[str], lock: int) -> None:
        self.trial = trial
        with open(trial.log, 'ab') as log:
            # In a session of its own, Ctrl-C reaches it once and not twice.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                pass_fds=[lock]
            )

    @property
    def env_step(self) -> int:
        """How far it is."""
        return read_progress(self.trial.folder)[1]


class Board:
    """What an experiment shows: a bar over the environment steps of all trials, and how far the running ones are."""

    def __init__(self, file: TextIO, experiment: Experiment) -> None:
        terminal = Terminal(file)
        self.line = terminal.line
        self.done = 0
        self._trials, self._each = len(experiment.trials), experiment.max_env_step
        self._bar = Bar(terminal, self._trials * self._each, every=PLAIN_EVERY_SECONDS)
        self.close = self._bar.close

    def update(self, children: List[Child]) -> None:
        """Show how far the running ones are."""
        steps = {child.trial.name: min(child.env_step, self._each) for child in children}
        running = [f'{name} {step:,}/{self._each:,}' for name, step in steps.items()]
        self._bar.update(self.done * self._each + sum(steps.values()),
                         '; '.join([f'{self.done} of {self._trials} runs done', *running]))


class Children:
    """
    Runs what an experiment lacks, ``jobs`` at once. ``failed`` are the trials whose process failed, ``interrupted`` is
    the signal that ended all.
    """

    def __init__(self, experiment: Experiment, lock: int, jobs: int, board: Board) -> None:
        self.failed: List[Trial] = []
        self.interrupted: Optional[int] = None
        self._experiment, self._lock, self._jobs, self._board = experiment, lock, jobs, board
        self._waiting: Deque[Trial] = deque()
        self._running: List[Child] = []
        self._signals: Deque[int] = deque()

    def run(self) -> None:
        """Start what is not done, and wait for its end, or after a signal for the end of what was started."""
        for trial in self._experiment.trials:
            if trial.result is None:
                self._waiting.append(trial)
            else:
                self._board.done += 1
                self._board.line(f'{trial.name}: is done already')
        with applied(interrupts=lambda original: lambda signum, frame: self._signals.append(signum)):
            while self._running or (self._waiting and self.interrupted is None):
                while self._waiting and len(self._running) < self._jobs and self.interrupted is None:
                    self._start(self._waiting.popleft())
                for child in list(self._running):
                    code = child.process.poll()
                    if code is not None:
                        self._running.remove(child)
                        self._ended(child.trial, code)
                self._board.update(self._running)
                time.sleep(POLL_SECONDS)
                while self._signals:
                    self._stop(self._signals.popleft())

    def _start(self, trial: Trial) -> None:
        command = self._experiment.command(trial)
        how = f'goes on from {command[command.index("--resume") + 1]}' if '--resume' in command else 'begins'
        self._board.line(f'{trial.name}: {how}')
        self._running.append(Child(trial, command, self._lock))

    def _ended(self, trial: Trial, code: int) -> None:
        result = trial.result
        if result is not None:
            self._board.done += 1
            time_taken = datetime.timedelta(seconds=round(result.seconds))
            reward = number_text(result.last_reward)
            self._board.line(f'{trial.name}: done, {result.env_step:,} env steps in {time_taken}, last reward {reward}')
        elif self.interrupted is not None:
            self._board.line(f'{trial.name}: interrupted')
        else:
            self.failed.append(trial)
            self._board.line(f'{trial.name}: failed with exit code {code}; {trial.log} says why')

    def _stop(self, signum: int) -> None:
        self.interrupted = signum
        if self._running:
            self._board.line('interrupted; waiting for checkpoints')
        for child in self._running:
            child.process.send_signal(signum)

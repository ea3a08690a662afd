"""The trainings of an experiment as processes: started, watched, interrupted together, shown on the terminal."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from typing import IO, Deque, Dict, Iterator, List, Optional

from ..config import ConfigError
from ..host.patches import applied
from ..lock_files import tell_holders
from ..summary import number_text, read_progress
from ..text import time_text
from .experiment import Experiment, Trial
from .terminal import Bar, Terminal

PROGRAM = (sys.executable, '-m', 'lzero_kvcache_options', 'train')
POLL_SECONDS = 0.25
LINES_EVERY_SECONDS = 60.0


class TrialProcesses:
    """
    Runs what an experiment lacks, ``jobs`` at once, each training in a process of its own that holds the experiment's
    lock for as long as it lives. ``failed`` are the trials whose process failed, ``interrupted`` is the signal that
    ended all.
    """

    def __init__(self, experiment: Experiment, lock: IO[str], jobs: int) -> None:
        self.failed: List[Trial] = []
        self.interrupted: Optional[int] = None
        self.running: Dict[Trial, subprocess.Popen] = {}
        self._done = 0
        self._experiment, self._lock, self._jobs = experiment, lock, jobs
        self._terminal = Terminal(sys.stdout)
        self._signals: Deque[int] = deque()

    def run(self) -> None:
        """Start and await all trials that are not done; after a signal, await the running ones and start no more."""
        trials = self._experiment.trials
        waiting = deque(trial for trial in trials if trial.result is None)
        for trial in trials:
            if trial not in waiting:
                self._terminal.line(f'{trial.name}: is done already')
        self._done = len(trials) - len(waiting)
        steps_of_all = len(trials) * self._experiment.max_env_step
        bar = Bar(self._terminal, steps_of_all, every=LINES_EVERY_SECONDS)
        with contextlib.closing(bar), self._stopped_on_error(), applied(
                interrupts=lambda original: lambda signum, frame: self._signals.append(signum)):
            while self.running or (waiting and self.interrupted is None):
                while waiting and len(self.running) < self._jobs and self.interrupted is None:
                    self.start(waiting.popleft())
                for trial, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[trial]
                        self._tell_who_runs()
                        self._ended(trial, process.returncode)
                self._show(bar)
                time.sleep(POLL_SECONDS)
                while self._signals:
                    self._stop(self._signals.popleft())

    @contextlib.contextmanager
    def _stopped_on_error(self) -> Iterator[None]:
        """A context that interrupts and awaits all running trainings after an error."""
        try:
            yield
        except BaseException:
            self._stop(signal.SIGTERM)
            for process in self.running.values():
                process.wait()
            raise

    def start(self, trial: Trial) -> None:
        """Begin a trial, or go on with it."""
        try:
            asked = self._experiment.ask(trial, self._terminal.line)
        except ConfigError as error:
            self.failed.append(trial)
            self._terminal.line(f'{trial.name}: {error}')
            return
        self._terminal.line(f'{trial.name}: {f"goes on from {asked.resume}" if asked.resume else "begins"}')
        with open(trial.log, 'ab') as log:
            # In a session of its own, Ctrl-C reaches it once and not twice.
            self.running[trial] = subprocess.Popen(
                [*PROGRAM, *asked.arguments()], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[self._lock.fileno()])
        self._tell_who_runs()

    def _tell_who_runs(self) -> None:
        """Write into the lock file the processes that run, also those that go on if this one is killed."""
        tell_holders(self._lock, [os.getpid(), *(process.pid for process in self.running.values())])

    def _show(self, bar: Bar) -> None:
        """Show how far each running trial is, and all together."""
        each = self._experiment.max_env_step
        steps = {trial.name: min(read_progress(trial.folder).get('collected_env_step', 0), each)
                 for trial in self.running}
        running = [f'{name} {step:,}/{each:,}' for name, step in steps.items()]
        bar.update(self._done * each + sum(steps.values()),
                   '; '.join([f'{self._done} of {len(self._experiment.trials)} runs done', *running]))

    def _ended(self, trial: Trial, code: int) -> None:
        result = trial.result
        if result is not None:
            self._done += 1
            how = (f'done, {result.env_step:,} env steps in {time_text(result.seconds)}, '
                   f'last reward {number_text(result.last_reward)}')
        elif self.interrupted is not None:
            how = 'interrupted'
        else:
            self.failed.append(trial)
            how = f'failed with exit code {code}; {trial.log} says why' if code >= 0 else f'was killed ({_name(-code)})'
        self._terminal.line(f'{trial.name}: {how}')

    def _stop(self, signum: int) -> None:
        self.interrupted = signum
        if self.running:
            self._terminal.line('interrupted; waiting for checkpoints')
        for process in self.running.values():
            process.send_signal(signum)


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in set(signal.Signals) else f'signal {signum}'

"""
What runs left behind: event files, the saved config and the summary. The arrays of a curve have one dimension, an
element for each point.
"""
import itertools
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from ..config import ConfigError
from ..run_files import (
    CONFIG_FILE,
    DONE,
    EVALUATE,
    EVENT_FILE,
    EVENT_FILES,
    EXPERIMENT,
    LOADED,
    NO_END,
    SUMMARY,
    Record,
)
from .event_files import ITERATIONS, REWARD, EventFile, Span, Unreadable

FILE_NAME = re.compile(r'events\.out\.tfevents\.\d+\.(?P<host>.+?)(\.\d+\.\d+)?$')

OLD = 'old'
# What an experiment appends to the name of a run that was cut off before its first checkpoint.
CUT_OFF = re.compile(r'_cut_off\d+$')
# The time that train.py and DI-engine append to a name that exists, and what looks like a seed in a name.
STAMP = re.compile(r'_\d{6}_\d{6}(_\d+)?$')
SEED = re.compile(r'(?i)(?:(?<=[_\-.])|^)(?:seed|s)[_\-]?(\d+)(?=[_\-.]|$)|(?<=[_\-.])(\d+)$')


class Curve(NamedTuple):
    """Every point of a tag by step; ``seconds`` is the training time up to each."""
    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass
class TrainedRun(Record):
    """
    A run: where its files are, event files oldest first, a name that tells it apart from the others, and, when it was
    read, what is in them. It has several spans if it was cut off and resumed. ``env_step`` is the last step in its
    event files, ``points`` counts the scalars of all tags.
    """
    event_files: List[str] = field(default_factory=list)
    name: str = ''
    curves: Dict[str, Curve] = field(default_factory=dict)
    spans: List[Span] = field(default_factory=list)
    env_step: Optional[int] = None
    first_step: Optional[int] = None
    first_iteration: Optional[int] = None
    points: int = 0
    damaged: bool = False

    @property
    def steps(self) -> Optional[int]:
        """Environment steps that it has trained on: those of the summary, since event files may be damaged."""
        said = finite(self.summary.get('env_step'))
        if said is None:
            return self.env_step
        # What a run that has no summary says of itself is some seconds old.
        return max(int(said), self.env_step or 0) if self.outcome == NO_END else int(said)

    @property
    def before(self) -> Optional[int]:
        """
        The environment steps before the checkpoint that it went on from, if its files lack that earlier part; 0 if
        LightZero's own entry counted them anew; None if the run is whole.
        """
        resumed, earlier = self.summary.get('resumed_at'), self.summary.get('earlier')
        if isinstance(resumed, list) and isinstance(earlier, list) and len(resumed) > len(earlier):
            return resumed[-1 - len(earlier)]
        if not self.first_iteration:
            return None
        return 0 if self.config.get(LOADED) else self.first_step if resumed is None else None

    @property
    def outcome(self) -> str:
        """How it ended, as far as that is known."""
        return str(self.summary.get('outcome', DONE))

    @property
    def host(self) -> Optional[str]:
        """The host in the name of its event files, None if they have other names."""
        match = FILE_NAME.match(os.path.basename(self.event_files[0]))
        return match['host'] if match else None

    @property
    def seconds(self) -> float:
        """How long it went on, without the time between its spans, and without parts before that its summary lacks."""
        spans = self.spans if self.before is None else self.spans[-len(self.parts):]
        return sum(ended - started for started, ended in spans)

    @property
    def seed(self) -> Optional[int]:
        """The seed of the summary or the config, or else the one in the name."""
        for known in (self.summary, self.config):
            if isinstance(known.get('seed'), int):
                return known['seed']
        match = SEED.search(STAMP.sub('', self.name))
        return int(match[1] or match[2]) if match else None

    @property
    def name_without_seed(self) -> str:
        name = os.path.basename(self.name)
        return SEED.sub('', STAMP.sub('', name)).strip('_-.') or name

    @property
    def parts(self) -> List[Dict[str, Any]]:
        """What each part of a run that went on in place was started with; of any other run there is one."""
        return [*(self.summary.get('earlier') or []), self.summary]

    def from_summary(self, *keys: str) -> Any:
        """What the summary says under nested keys, None if nothing."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def last(self, tag: str) -> Optional[float]:
        return self._reduced(tag, lambda values: values[-1])

    def highest(self, tag: str) -> Optional[float]:
        return self._reduced(tag, np.nanmax)

    def mean(self, tag: str) -> Optional[float]:
        return self._reduced(tag, np.nanmean)

    def _reduced(self, tag: str, function: Callable[[np.ndarray], Any]) -> Optional[float]:
        curve = self.curves.get(tag)
        return None if curve is None or np.isnan(curve.values).all() else finite(float(function(curve.values)))


def finite(value: Any) -> Optional[float]:
    """The value if it is a number that a float can be, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


# ---- finding ---------------------------------------------------------------------------------------------------------

def find_runs(paths: Sequence[str]) -> List[TrainedRun]:
    """The runs below paths (of runs, of folders of runs, or of event files), each once, in the order of the paths."""
    found: Dict[str, TrainedRun] = {}
    for path in paths:
        for folder, files in _look_into(os.path.expanduser(path)).items():
            run = found.setdefault(os.path.realpath(folder), TrainedRun(folder))
            run.event_files += [file for file in files if file not in run.event_files]
    for real, run in found.items():
        run.event_files.sort(key=lambda file: (os.path.basename(file), file))
        run.name = _distinct_end(real, list(found))
    return list(found.values())


def _look_into(path: str) -> Dict[str, List[str]]:
    """The event files of each run's folder below a path."""
    if os.path.isfile(path):
        if EVENT_FILE not in os.path.basename(path):
            raise ConfigError(f'{path}: an event file has {EVENT_FILE} in its name; give one, or the folder of a run')
        return {_run_folder_of(os.path.dirname(os.path.abspath(path))): [os.path.realpath(path)]}
    if not os.path.isdir(path):
        raise ConfigError(f'{path}: no such folder or event file')
    found: Dict[str, List[str]] = {}
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        events = [os.path.realpath(os.path.join(folder, file)) for file in files if EVENT_FILE in file]
        if events:
            found.setdefault(_run_folder_of(os.path.abspath(folder)), []).extend(events)
        elif CONFIG_FILE in files:
            found.setdefault(os.path.abspath(folder), [])
    return found or {path: []}


def _run_folder_of(folder: str) -> str:
    """The folder of the run whose event files lie in ``folder``: this one or one above it."""
    above = folder
    for _ in range(4):
        if any(os.path.exists(os.path.join(above, file)) for file in (CONFIG_FILE, SUMMARY)):
            return above
        above = os.path.dirname(above)
    before, log, _ = (folder + os.sep).partition(os.sep + EVENT_FILES + os.sep)
    return before if log else folder


def _distinct_end(path: str, paths: Sequence[str]) -> str:
    """As few last parts of a path as tell it apart from the others."""
    parts = path.split(os.sep)
    depth = 1
    while depth < len(parts) and sum(other.split(os.sep)[-depth:] == parts[-depth:] for other in paths) > 1:
        depth += 1
    return os.sep.join(parts[-depth:])


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_run(run: TrainedRun) -> None:
    """Read all that a run left behind."""
    if CUT_OFF.search(run.name) and os.path.exists(os.path.join(os.path.dirname(run.folder), EXPERIMENT)):
        raise Unreadable('its experiment began it anew')
    run.read()
    if run.from_summary('task') == EVALUATE:
        raise Unreadable('it evaluated a checkpoint and trained nothing')
    _read_events(run)


def _read_events(run: TrainedRun) -> None:
    if not run.event_files:
        raise Unreadable('no event file in it')
    files = [EventFile(path) for path in run.event_files]
    faults = [file for file in files if file.fault]
    filled = [file for file in files if file.scalars.any()]
    if not filled:
        raise Unreadable('; '.join(file.fault for file in faults if file.fault)
                         or 'no scalar in ' + ', '.join(map(os.path.basename, run.event_files)))
    for earlier, later in itertools.combinations(filled, 2):
        if earlier.begins_like(later):
            raise Unreadable('its event files are of more than one run, and each run needs a folder of its own')
        earlier.cut_off(later)
    run.spans = _united([file.span for file in filled if file.end])
    run.points = sum(int(file.scalars.sum()) for file in filled)
    for tag in sorted({tag for file in filled for tag in file.points}):
        parts = sorted(filter(len, (file.curve(tag) for file in filled)), key=lambda part: part[0, 0])
        if parts:
            steps, times, values = np.concatenate(parts).T
            seconds = sum((np.clip(times, *span) - span[0] for span in run.spans), np.zeros_like(times))
            run.curves[tag] = Curve(steps.astype(int), seconds, values)
    env_steps = np.concatenate([file.env_steps for file in filled])
    if len(env_steps):
        run.env_step = int(env_steps.max())
        run.first_step = int(env_steps.min())
    iterations = [file.steps[ITERATIONS][0, 0] for file in filled if len(file.steps[ITERATIONS])]
    run.first_iteration = int(min(iterations)) if iterations else None
    set_back, abandoned = sum(file.set_back for file in filled), sum(file.abandoned for file in filled)
    run.damaged, of = bool(faults), run.steps if run.summary else None
    run.notes += [f'{file.fault}: its events end at {_step_text(file.last_step, of)}' for file in faults]
    lacking = [f'{held:,} of {said:,} {what}' for what, held, said in (
        ('iterations', max(file.iterations for file in filled), run.from_summary('train_iter')),
        ('evaluations', len(run.curves.get(REWARD, ([], ))[0]), len(run.from_summary('evaluations') or [])),
    ) if faults and said and held < said]
    if lacking:
        run.notes.append(f'its event files have {" and ".join(lacking)}, and its means and curves are of these')
    if set_back:
        run.notes.append(f'its clock was set back by {set_back:,.0f} s in all; no time is counted there')
    if len(run.spans) < sum(file.end > 0 for file in filled):
        run.notes.append('its event files overlap in time, which is counted once')
    if abandoned:
        run.notes.append(f'{abandoned:,} points and their time do not count: it went on from a checkpoint before them')


def _step_text(step: Optional[int], of: Optional[int]) -> str:
    """As 'step 790 of 1,013'."""
    if step is None:
        return 'their beginning'
    return f'step {step:,}' + (f' of {of:,}' if of is not None and of >= step else '')


def _united(spans: Sequence[Span]) -> List[Span]:
    """Spans in their order, those that overlap as one."""
    united: List[Span] = []
    for started, ended in sorted(spans):
        if united and started <= united[-1][1]:
            united[-1] = united[-1][0], max(ended, united[-1][1])
        else:
            united.append((started, ended))
    return united

"""
The files of runs: finding them, and reading event files, saved configs and summaries. The arrays of a curve have one
dimension, an element for each point; those of an event file are ``[N, 3]``, a row for each point.
"""
import itertools
import os
import re
import sys
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from google.protobuf.message import DecodeError

from .. import run_files
from ..config import ConfigError

FILE_NAME = re.compile(r'events\.out\.tfevents\.\d+\.(?P<host>.+?)(\.\d+\.\d+)?$')
# What an experiment appends to the name of a run that was cut off before its first checkpoint.
CUT_OFF = re.compile(r'_cut_off\d+$')
# The time that train.py and DI-engine append to a name that exists, and what looks like a seed in a name.
STAMP = re.compile(r'_\d{6}_\d{6}(_\d+)?$')
SEED = re.compile(r'(?i)(?:(?<=[_\-.])|^)(?:seed|s)[_\-]?(\d+)(?=[_\-.]|$)|(?<=[_\-.])(\d+)$')

# The tags that are compared, or how they begin.
REWARD = 'evaluator_step/reward_mean'
MEMORY_OF_HOST = 'Buffer/memory_usage/process'
MEMORY_OF_DEVICE = 'learner_iter/Max_GPU_avg'
CACHE, CACHE_BY_STEP = 'kv_cache_iter/', 'kv_cache_step/'
COMPARED = (REWARD, MEMORY_OF_HOST, MEMORY_OF_DEVICE, CACHE, CACHE_BY_STEP)
# The axes of tags. A later file starts at the checkpoint that it goes on from: its first point on each axis shows which
# points of earlier files were undone. It has more environment steps than the checkpoint. An evaluation that earlier
# files have too was made again.
AXES = ENV_STEPS, ITERATIONS, EVALUATED = '_step/', '_iter/', run_files.EVALUATIONS[1]
# Seconds by which the events of one file may be out of order.
CLOCK_TOLERANCE = 1.

# From when to when, in seconds since 1970.
Span = Tuple[float, float]


class Unreadable(Exception):
    """A run that cannot be compared; the message says why, in one line."""


class Curve(NamedTuple):
    """Every point of a tag by step; ``seconds`` is the training time up to each."""
    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass
class TrainedRun(run_files.Record):
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
        # The progress of a run without a summary is some seconds old.
        return max(int(said), self.env_step or 0) if self.outcome == run_files.NO_END else int(said)

    @property
    def own_steps(self) -> Optional[int]:
        """The environment steps that its time was spent on."""
        return None if self.steps is None else self.steps - (self.before or 0)

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
        return 0 if self.config.get(run_files.LOADED) else self.first_step if resumed is None else None

    @property
    def outcome(self) -> str:
        """How it ended, as far as that is known."""
        return str(self.summary.get('outcome', run_files.DONE))

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
        """The summaries of all parts of a run that went on in place; any other run has one part."""
        return [*(self.summary.get('earlier') or []), self.summary]

    def from_summary(self, *keys: str) -> Any:
        """The summary's value under nested keys, None if there is none."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def reduced(self, tag: str, function: Callable[[np.ndarray], Any]) -> Optional[float]:
        """The number that a function makes of the values of a tag, None if there is none."""
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
    for path in map(os.path.expanduser, paths):
        for folder, file in _look_into(path) or [(path, '')]:
            run = found.setdefault(os.path.realpath(folder), TrainedRun(folder))
            if run_files.EVENT_FILE in os.path.basename(file) and os.path.realpath(file) not in run.event_files:
                run.event_files.append(os.path.realpath(file))
    for real, run in found.items():
        run.event_files.sort(key=lambda file: (os.path.basename(file), file))
        run.name = _distinct_end(real, list(found))
    return list(found.values())


def _look_into(path: str) -> List[Tuple[str, str]]:
    """The event files and saved configs below a path, each with the folder of its run, folders before those in them."""
    if os.path.isfile(path):
        if run_files.EVENT_FILE not in os.path.basename(path):
            raise ConfigError(
                f'{path}: an event file has {run_files.EVENT_FILE} in its name; give one, or the folder of a run')
        files = [os.path.abspath(path)]
    elif os.path.isdir(path):
        files = [os.path.join(folder, name) for folder, _, names in os.walk(os.path.abspath(path)) for name in names
                 if run_files.EVENT_FILE in name or name == run_files.CONFIG_FILE]
    else:
        raise ConfigError(f'{path}: no such folder or event file')
    folders = [(_run_folder_of(os.path.dirname(file)), file) for file in files]
    return sorted(folders, key=lambda found: os.path.dirname(found[1]).split(os.sep))


def _run_folder_of(folder: str) -> str:
    """The folder of the run whose event files lie in ``folder``: this one or one above it."""
    for above in [folder, *map(str, Path(folder).parents)][:4]:
        if any(os.path.exists(os.path.join(above, file)) for file in (run_files.CONFIG_FILE, run_files.SUMMARY)):
            return above
    before, log, _ = (folder + os.sep).partition(os.sep + run_files.EVENT_FILES + os.sep)
    return before if log else folder


def _distinct_end(path: str, paths: Sequence[str]) -> str:
    """As few last parts of a path as tell it apart from the others."""
    parts = path.split(os.sep)
    depth = 1
    while depth < len(parts) and sum(other.split(os.sep)[-depth:] == parts[-depth:] for other in paths) > 1:
        depth += 1
    return os.sep.join(parts[-depth:])


# ---- event files -----------------------------------------------------------------------------------------------------

class EventFile:
    """
    The intact part of one event file; ``fault`` says what is wrong with the rest. For each scalar, ``points`` has, by
    tag, the step, the number of the event and the value; ``along`` has, by axis, the step, the number of the event and
    the last checkpoint that was saved before it.
    """

    def __init__(self, path: str) -> None:
        self.fault, name, whole = '', os.path.basename(path), 0
        points: Dict[str, array] = defaultdict(lambda: array('d'))
        times = array('d')
        try:
            size = os.path.getsize(path)  # before it is read, since its training may go on
            for end, event in run_files.events(path):
                for value in event.summary.value:
                    if value.HasField('simple_value'):
                        points[value.tag].extend((event.step, len(times), value.simple_value))
                times.append(event.wall_time)
                whole = end
            if whole < size:
                self.fault = f'{name} breaks off or is damaged'
        except OSError as error:
            self.fault = f'{name} cannot be read ({error.strerror})'
        except DecodeError:
            self.fault = f'{name} is no event file'
        self.points = {tag: np.array(held).reshape(-1, 3) for tag, held in points.items()}
        self.along = {axis: self._along(axis) for axis in AXES}
        # The number of the event that each scalar is in.
        self.scalars = np.concatenate([np.empty(0), *(held[:, 1] for held in self.points.values())])
        self.end = len(times)
        # Where the clock was set back, all later times are moved forward by as much.
        passed = np.diff(times, prepend=times[:1])
        back = np.where(passed < -CLOCK_TOLERANCE, -passed, 0.)
        self.set_back = back.sum()
        self._clock = np.maximum.accumulate(np.array(times) + np.cumsum(back))

    def _along(self, axis: str) -> np.ndarray:
        found = [np.empty((0, 3))]
        for tag, points in self.points.items():
            if axis in tag and not tag.startswith(run_files.COLLECTIONS[0]):  # environment steps tell of these
                saved_after = axis == ENV_STEPS or tag.startswith(run_files.EVALUATIONS[0])
                found.append(np.column_stack([points[:, :2], points[:, 0] - saved_after]))
        joined = np.concatenate(found)
        return joined[np.argsort(joined[:, 1], kind='stable')]

    def cut_off(self, later: 'EventFile') -> None:
        """Drop the points after the checkpoint from which a later file goes on, if it lies within this file."""
        own, others = self.along[ITERATIONS][:, 0], later.along[ITERATIONS][:, 0]
        together = np.array_equal(own[:1], others[:1])
        if together and len(own) and min(own.max(), others.max()) > own[0] and self.points.keys() & later.points.keys():
            raise Unreadable('its event files are of more than one run, and each run needs a folder of its own')
        for axis, along in self.along.items():
            first = later.along[axis][:1, 0]
            if len(along) and len(first) and along[0, 0] < first[0] + (axis == EVALUATED and together):
                self.end = min([self.end, *along[along[:, 2] >= first[0], 1][:1].astype(int)])

    @property
    def span(self) -> Span:
        last = self.scalars[self.scalars < self.end].max(initial=0)
        return self._clock[0], self._clock[int(last)]

    def end_text(self, of: Optional[int]) -> str:
        """Where it ends or breaks off, as 'step 790 of 1,013'."""
        steps = self.along[ENV_STEPS][:, 0]
        if not len(steps):
            return 'their beginning'
        return f'step {steps.max():,.0f}' + (f' of {of:,}' if of is not None and of >= steps.max() else '')

    def kept(self, points: np.ndarray) -> np.ndarray:
        """The points that are not cut off."""
        return points[points[:, 1] < self.end]

    def curve(self, tag: str) -> np.ndarray:
        """Step, time and value of the points of a tag, by step."""
        curve = self.kept(self.points.get(tag, np.empty((0, 3))))
        curve[:, 1] = self._clock[curve[:, 1].astype(int)]
        return curve[np.argsort(curve[:, 0], kind='stable')]


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_run(run: TrainedRun) -> None:
    """Read all that a run left behind."""
    if CUT_OFF.search(run.name) and os.path.exists(os.path.join(os.path.dirname(run.folder), run_files.EXPERIMENT)):
        raise Unreadable('its experiment began it anew')
    run.read()
    if run.from_summary('task') == run_files.EVALUATE:
        raise Unreadable('it evaluated a checkpoint and trained nothing')
    if not run.event_files:
        raise Unreadable('no event file in it')
    files = [EventFile(path) for path in run.event_files]
    faults = [file for file in files if file.fault]
    filled = [file for file in files if file.points]
    if not filled:
        raise Unreadable('; '.join(file.fault for file in faults)
                         or 'no scalar in ' + ', '.join(map(os.path.basename, run.event_files)))
    for earlier, later in itertools.combinations(filled, 2):
        earlier.cut_off(later)
    _join(run, filled)
    run.damaged = bool(faults)
    run.notes += _notes(run, faults, filled)


def _join(run: TrainedRun, files: Sequence[EventFile]) -> None:
    """Put the points of a run's event files that are not cut off into the run."""
    run.points = sum(len(file.scalars) for file in files)
    for started, ended in sorted(file.span for file in files if file.end):
        if run.spans and started <= run.spans[-1][1]:
            started, ended = run.spans[-1][0], max(ended, run.spans.pop()[1])
        run.spans.append((started, ended))
    for tag in sorted({tag for file in files for tag in file.points if tag.startswith(COMPARED)}):
        parts = sorted(filter(len, (file.curve(tag) for file in files)), key=lambda part: part[0, 0])
        if parts:
            steps, times, values = np.concatenate(parts).T
            seconds = sum((np.clip(times, *span) - span[0] for span in run.spans), np.zeros_like(times))
            run.curves[tag] = Curve(steps.astype(int), seconds, values)
    env_steps = np.concatenate([file.kept(file.along[ENV_STEPS])[:, 0] for file in files])
    if len(env_steps):
        run.first_step, run.env_step = int(env_steps.min()), int(env_steps.max())
    iterations = [int(file.along[ITERATIONS][0, 0]) for file in files if len(file.along[ITERATIONS])]
    run.first_iteration = min(iterations, default=None)


def _notes(run: TrainedRun, faults: Sequence[EventFile], filled: Sequence[EventFile]) -> Iterator[str]:
    """The notes about a run's event files."""
    for file in faults:
        yield f'{file.fault}: its events end at {file.end_text(run.steps if run.summary else None)}'
    evaluated: Sequence[int] = run.curves[REWARD].steps.tolist() if REWARD in run.curves else []
    iterations = max(int((file.along[ITERATIONS][:, 2] + 1).max(initial=0)) for file in filled)
    lacking = [f'{held:,} of {said:,} {what}' for what, held, said in (
        ('iterations', iterations, run.from_summary('train_iter')),
        ('evaluations', len(evaluated), len(run.from_summary('evaluations') or [])),
    ) if faults and said and held < said]
    if lacking:
        yield f'its event files have {" and ".join(lacking)}, and its means and curves are of these'
    set_back = sum(file.set_back for file in filled)
    if set_back:
        yield f'its clock was set back by {set_back:,.0f} s in all; no time is counted there'
    if len(run.spans) < sum(file.end > 0 for file in filled):
        yield 'its event files overlap in time, which is counted once'
    abandoned = sum((file.scalars >= file.end).sum() for file in filled)
    if abandoned:
        yield f'{abandoned:,} points and their time do not count: it went on from a checkpoint before them'
    again = {step for file in filled for step, number, _ in file.points.get(REWARD, ()) if number >= file.end}
    again.intersection_update(evaluated)
    if again:
        yield f'its event files have some evaluations more than once ({len(again)}): the last of each counts'

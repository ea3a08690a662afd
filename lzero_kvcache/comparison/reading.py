"""
What runs left behind: event files, the saved config and the summary. tensorboard's own reader reads every point of the
tags that are compared. The arrays of a curve have one dimension, an element for each point.
"""
import ast
import json
import os
import re
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2
from tensorboard.util import tensor_util

from ..config import FLAG, OPTIONS, ConfigError

EVENT_FILE, CONFIG_FILE, SUMMARY_FILE = 'tfevents', 'total_config.py', 'summary.json'
# Where LightZero puts event files, below an experiment's folder.
LOG_FOLDER = os.path.join('log', 'serial')
FILE_NAME = re.compile(r'events\.out\.tfevents\.\d+\.(?P<host>.+?)(\.\d+\.\d+)?$')
# A record is its length, a checksum of it, the event, and a checksum of that.
RECORD_FRAME = 8 + 4 + 4
# Seconds by which the events of one file may be out of order.
CLOCK_TOLERANCE = 1.

REWARD = 'evaluator_step/reward_mean'
HOST_MEMORY = 'Buffer/memory_usage/process'
DEVICE_MEMORY = 'learner_iter/Max_GPU_avg'
CACHE, CACHE_BY_STEP = 'kv_cache_iter/', 'kv_cache_step/'
POOLS = {'init': 'roots', 'recur': 'nodes', 'total': 'all'}
TAGS = frozenset([
    REWARD, HOST_MEMORY, DEVICE_MEMORY, *(CACHE_BY_STEP + name for name in ('init_hit_rate', 'search_ms', 'memory_mb')),
    *(CACHE + name for name in ('search_ms', 'step_ms', 'memory_mb', 'total_evictions')),
    *(f'{CACHE}{pool}_{count}' for pool in POOLS for count in ('hits', 'queries')),
])
# LightZero and this package write what they write against environment steps under NAME_step/TAG.
AGAINST_ENV_STEPS = '_step/'

WORLD_MODEL = 'policy.model.world_model_cfg.'
OLD = 'old'
# The time that train.py and DI-engine append to a name that exists, and what looks like a seed in a name.
STAMP = re.compile(r'_\d{6}_\d{6}(_\d+)?$')
SEED = re.compile(r'(?i)(?:(?<=[_\-.])|^)(?:seed|s)[_\-]?(\d+)(?=[_\-.]|$)|(?<=[_\-.])(\d+)$')

# From when to when, in seconds since 1970.
Span = Tuple[float, float]


class Unreadable(Exception):
    """A run that cannot be compared; the message says why, in one line."""


class Curve(NamedTuple):
    """Every point of a tag by step; ``seconds`` are those that the run had gone on for."""
    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass
class TrainedRun:
    """
    A run: where its files are, event files oldest first, a name that tells it apart from the others, and, when it was
    read, what is in them. It has several spans if it was cut off and resumed; ``points`` counts the scalars of all
    tags. ``config`` has dotted keys; it and ``summary`` are empty where nothing was saved. ``notes`` say what is
    missing.
    """
    folder: str
    event_files: List[str]
    name: str = ''
    curves: Dict[str, Curve] = field(default_factory=dict)
    spans: List[Span] = field(default_factory=list)
    env_step: Optional[int] = None
    points: int = 0
    config: Dict[str, Any] = field(default_factory=dict)
    summary: Dict[str, Any] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    @property
    def host(self) -> Optional[str]:
        """The host in the name of its event files, None if they have other names."""
        match = FILE_NAME.match(os.path.basename(self.event_files[0]))
        return match['host'] if match else None

    @property
    def seconds(self) -> float:
        """How long it went on, without the time between its spans."""
        return sum(ended - started for started, ended in self.spans)

    @property
    def cache(self) -> Optional[str]:
        """'old', 'new' or the name of a registered manager."""
        if not self.config:
            return self.summary.get('cache')
        if not self.config.get(WORLD_MODEL + FLAG, False):
            return OLD
        return self.config.get(f'{WORLD_MODEL}{OPTIONS}.type', 'new')

    @property
    def caches(self) -> List[str]:
        """The cache systems of its segments, several if it was resumed with another one."""
        segments = self.from_summary('segments')
        systems = [segment.get('cache') for segment in segments if isinstance(segment, dict)] \
            if isinstance(segments, list) else []
        return list(dict.fromkeys(filter(None, systems or [self.cache])))

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
    """The value if it is a finite number, else None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value) else None


# ---- finding ---------------------------------------------------------------------------------------------------------

def find_runs(paths: Sequence[str]) -> List[TrainedRun]:
    """The runs below paths (of runs, of folders of runs, or of event files), each once, in the order of the paths."""
    found: Dict[str, TrainedRun] = {}
    for path in paths:
        for folder, files in _look_into(os.path.expanduser(path)).items():
            run = found.setdefault(os.path.realpath(folder), TrainedRun(folder, []))
            run.event_files += [file for file in files if file not in run.event_files]
    for real, run in found.items():
        run.event_files.sort(key=lambda file: (os.path.basename(file), file))
        run.name = _distinct_end(real, list(found))
    return list(found.values())


def _look_into(path: str) -> Dict[str, List[str]]:
    """The event files of each run's folder below a path."""
    if os.path.isfile(path):
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
        if any(os.path.exists(os.path.join(above, file)) for file in (CONFIG_FILE, SUMMARY_FILE)):
            return above
        above = os.path.dirname(above)
    before, log, _ = (folder + os.sep).partition(os.sep + LOG_FOLDER + os.sep)
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
    _read_events(run)
    try:
        run.config = read_config(os.path.join(run.folder, CONFIG_FILE))
    except ValueError as error:
        run.notes.append(str(error))
    try:
        run.summary = _read_summary(os.path.join(run.folder, SUMMARY_FILE))
    except (OSError, ValueError) as error:
        run.notes.append(f'{SUMMARY_FILE} cannot be parsed ({error})')
    if run.from_summary('task') == 'evaluate':
        raise Unreadable('it evaluated a checkpoint and trained nothing')


class _EventFile:
    """
    One event file as far as it is whole; ``fault`` says what is missing. ``points`` has step, number of the event and
    value in turn for each tag, and under AGAINST_ENV_STEPS the steps of all tags of this kind.
    """

    def __init__(self, path: str) -> None:
        self.points: Dict[str, array] = defaultdict(lambda: array('d'))
        self.fault: Optional[str] = None
        self.scalars = last = 0
        times = array('d')
        try:
            for event in _events(path):
                for value in event.summary.value:
                    number = _scalar(value)
                    if number is None:
                        continue
                    self.scalars, last = self.scalars + 1, len(times)
                    if value.tag in TAGS:
                        self.points[value.tag].extend((event.step, last, number))
                    if AGAINST_ENV_STEPS in value.tag:
                        self.points[AGAINST_ENV_STEPS].extend((event.step, last, 0.))
                times.append(event.wall_time)
        except Unreadable as error:
            self.fault = str(error)
        # Times are those of a clock that is never set back.
        passed = np.diff(times, prepend=times[:1])
        back = np.where(passed < -CLOCK_TOLERANCE, -passed, 0.)
        self.set_back = back.sum()
        self._clock = np.maximum.accumulate(np.array(times) + np.cumsum(back))
        self.span = (self._clock[0], self._clock[last]) if times else (0., 0.)

    def curve(self, tag: str) -> np.ndarray:
        """The points of a tag by step, with their times: ``[N, 3]``."""
        points = np.array(self.points[tag]).reshape(-1, 3)
        points[:, 1] = self._clock[points[:, 1].astype(int)]
        return points[np.argsort(points[:, 0], kind='stable')]


def _read_events(run: TrainedRun) -> None:
    if not run.event_files:
        raise Unreadable('no event file in it')
    files = [_EventFile(path) for path in run.event_files]
    faults = [file.fault for file in files if file.fault]
    filled = [file for file in files if file.scalars]
    if not filled:
        raise Unreadable('; '.join(faults) or 'no scalar in ' + ', '.join(map(os.path.basename, run.event_files)))
    run.spans = _united([file.span for file in filled])
    run.points = sum(file.scalars for file in filled)
    abandoned = 0
    for tag in sorted({tag for file in filled for tag in file.points}):
        steps, times, values = np.concatenate(_parts_that_count([file.curve(tag) for file in filled])).T
        abandoned += sum(len(file.points[tag]) // 3 for file in filled) - len(steps)
        seconds = sum((np.clip(times, *span) - span[0] for span in run.spans), np.zeros_like(times))
        run.curves[tag] = Curve(steps.astype(int), seconds, values)
    if AGAINST_ENV_STEPS in run.curves:
        run.env_step = int(run.curves.pop(AGAINST_ENV_STEPS).steps[-1])
    set_back = sum(file.set_back for file in filled)
    run.notes += faults
    if set_back:
        run.notes.append(f'its clock was set back by {set_back:,.0f} s in all; no time is counted there')
    if len(run.spans) < len(filled):
        run.notes.append('its event files overlap in time, which is counted once')
    if abandoned:
        run.notes.append(f'{abandoned:,} points are not counted: it went on from a checkpoint before them')


def _parts_that_count(parts: Sequence[np.ndarray]) -> List[np.ndarray]:
    """Parts of a curve by step; one that begins within the steps of an earlier one went on from a checkpoint there."""
    counted: List[np.ndarray] = []
    for part in filter(len, parts):
        first = part[0, 0]
        counted = [earlier[earlier[:, 0] < first] if earlier[0, 0] < first < earlier[-1, 0] else earlier
                   for earlier in counted]
        counted.append(part)
    return sorted(counted, key=lambda part: part[0, 0])


def _events(file: str) -> Iterator[Any]:
    """The events of a file. tensorboard's reader stops at a damaged record without a word, so its bytes are counted."""
    name = os.path.basename(file)
    done = 0
    try:
        size = os.path.getsize(file)
        for record in RawEventFileLoader(file).Load():
            done += len(record) + RECORD_FRAME
            yield event_pb2.Event.FromString(record)
    except OSError as error:
        raise Unreadable(f'{name} cannot be read ({error.strerror})') from error
    except DecodeError as error:
        raise Unreadable(f'{name} is no event file') from error
    if done < size:
        raise Unreadable(f'{name} breaks off or is damaged after {done:,} of {size:,} bytes; '
                         f'the rest, {(size - done) / size:.1%}, is missing')


def _scalar(value: Any) -> Optional[float]:
    """A scalar of the older or the newer form; None for anything else."""
    kind = value.WhichOneof('value')
    if kind == 'simple_value':
        return value.simple_value
    if kind == 'tensor' and value.metadata.plugin_data.plugin_name == 'scalars':
        return float(tensor_util.make_ndarray(value.tensor).item())
    return None


def _united(spans: Sequence[Span]) -> List[Span]:
    """Spans in their order, those that overlap as one."""
    united: List[Span] = []
    for started, ended in sorted(spans):
        if united and started <= united[-1][1]:
            united[-1] = united[-1][0], max(ended, united[-1][1])
        else:
            united.append((started, ended))
    return united


class Source(str):
    """An expression that is no literal, as ``float("inf")``."""

    __repr__ = str.__str__


def read_config(path: str) -> Dict[str, Any]:
    """A ``total_config.py``, parsed and never run, by dotted key; empty if there is none."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding='utf-8') as file:
            source = file.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f'{os.path.basename(path)} cannot be parsed ({error})') from error
    dicts = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    if not dicts:
        raise ValueError(f'{os.path.basename(path)} has no config in it')
    return dict(_flattened(dicts[0], '', source))


def _flattened(node: ast.Dict, prefix: str, source: str) -> Iterator[Tuple[str, Any]]:
    for key, value in zip(node.keys, node.values):
        name = prefix + ('**' if key is None else str(_value(key, source)))
        if isinstance(value, ast.Dict) and value.keys:
            yield from _flattened(value, name + '.', source)
        else:
            yield name, _value(value, source)


def _value(node: ast.AST, source: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Source(' '.join((ast.get_source_segment(source, node) or '').split()))


def _read_summary(path: str) -> Dict[str, Any]:
    if not os.path.exists(path):
        return {}
    with open(path, encoding='utf-8') as file:
        summary = json.load(file)
    if not isinstance(summary, dict):
        raise ValueError('it holds no object')
    return summary

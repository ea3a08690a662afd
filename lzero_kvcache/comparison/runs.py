"""One run: what it was (config, seed, machine) and what it came to, from its summary or else from its events."""
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import numpy as np

from ..config import FLAG, OPTIONS
from .events import Curve, Recording, Unreadable, read_events
from .finding import CONFIG_FILE, SUMMARY_FILE, Experiment
from .saved_config import read_config

REWARD = 'evaluator_step/reward_mean'
HOST_MEMORY = 'Buffer/memory_usage/process'
DEVICE_MEMORY = 'learner_iter/Max_GPU_avg'
CACHE, CACHE_BY_STEP = 'kv_cache_iter/', 'kv_cache_step/'
POOLS = {'init': 'roots', 'recur': 'nodes', 'total': 'all'}
PLOTTED = ('init_hit_rate', 'search_ms', 'memory_mb')
TAGS = [
    REWARD, HOST_MEMORY, DEVICE_MEMORY, *(CACHE_BY_STEP + name for name in PLOTTED),
    *(CACHE + name for name in ('search_ms', 'step_ms', 'memory_mb', 'total_evictions')),
    *(f'{CACHE}{pool}_{count}' for pool in POOLS for count in ('hits', 'queries')),
]
WORLD_MODEL = 'policy.model.world_model_cfg.'
# The time that train.py and DI-engine append to a name that exists, and what looks like a seed in a name.
STAMP = re.compile(r'_\d{6}_\d{6}(_\d+)?$')
SEED = re.compile(r'(?i)(?:(?<=[_\-.])|^)(?:seed|s)[_\-]?(\d+)(?=[_\-.]|$)|(?<=[_\-.])(\d+)$')


@dataclass
class Run:
    """
    Overview:
        A run that could be read. ``config`` has dotted keys and, like ``summary``, is empty where nothing was saved;
        ``notes`` say what else could not be read.
    """
    name: str
    folder: str
    event_files: List[str]
    recording: Recording
    config: Dict[str, Any] = field(default_factory=dict)
    summary: Dict[str, Any] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    @property
    def cache(self) -> Optional[str]:
        """The cache system: 'old', 'new' or the name of a registered manager."""
        if not self.config:
            return self.summary.get('cache')
        if not self.config.get(WORLD_MODEL + FLAG, False):
            return 'old'
        return self.config.get(f'{WORLD_MODEL}{OPTIONS}.type', 'new')

    @property
    def seed(self) -> Optional[int]:
        """The seed that was asked for, or else the one in its name."""
        for known in (self.summary, self.config):
            if isinstance(known.get('seed'), int):
                return known['seed']
        match = SEED.search(STAMP.sub('', self.name))
        return int(match[1] or match[2]) if match else None

    @property
    def name_without_seed(self) -> str:
        name = os.path.basename(self.name)
        return SEED.sub('', STAMP.sub('', name)).strip('_-.') or name

    def curve(self, tag: str) -> Optional[Curve]:
        return self.recording.curves.get(tag)

    def told(self, *keys: str) -> Any:
        """What the summary says."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def noted(self, *keys: str) -> Optional[float]:
        """A number of the summary."""
        return finite(self.told(*keys))

    def last(self, tag: str) -> Optional[float]:
        return self._of(tag, lambda values: values[-1])

    def highest(self, tag: str) -> Optional[float]:
        return self._of(tag, np.nanmax)

    def mean(self, tag: str) -> Optional[float]:
        return self._of(tag, np.nanmean)

    def _of(self, tag: str, function: Callable[[np.ndarray], Any]) -> Optional[float]:
        curve = self.curve(tag)
        return None if curve is None or np.isnan(curve.values).all() else finite(float(function(curve.values)))


class Measure(NamedTuple):
    """
    Overview:
        A row of the comparison: its name, its title, how its values are written ('time', 'count', 'number' or 'share'),
        and what says it, by the name of the source: the first one that most runs have is used for all of them.
    """
    name: str
    title: str
    kind: str
    sources: Dict[str, Callable[[Run], Optional[float]]]


def _hit_rate(pool: str) -> Measure:

    def counted(run: Run) -> Optional[float]:
        return divided(run.last(f'{CACHE}{pool}_hits'), run.last(f'{CACHE}{pool}_queries'))

    return Measure(f'{pool}_hit_rate', f'hit rate, {POOLS[pool]}', 'share', {
        'summary': lambda run: run.noted('hit_rates', pool), 'events': counted})


def _device_memory(run: Run) -> Optional[float]:
    gigabytes = run.highest(DEVICE_MEMORY)
    return gigabytes * 1024 if gigabytes else None


MEASURES = (
    Measure('seconds', 'training time', 'time', {
        'summary': lambda run: run.noted('seconds'),
        'events': lambda run: run.recording.seconds}),
    Measure('env_step', 'environment steps', 'count', {
        'summary': lambda run: run.noted('env_step'), 'events': lambda run: finite(run.recording.env_step)}),
    Measure('env_steps_per_second', 'environment steps per second', 'number', {
        'summary': lambda run: run.noted('env_steps_per_second'),
        'events': lambda run: divided(run.recording.env_step, run.recording.seconds)}),
    Measure('search_ms', 'search, ms', 'number', {'events': lambda run: run.mean(CACHE + 'search_ms')}),
    Measure('step_ms', 'recurrent step, ms', 'number', {'events': lambda run: run.mean(CACHE + 'step_ms')}),
    Measure('host_memory_mb', 'peak host memory, MiB', 'number', {
        'summary': lambda run: run.noted('host_memory_mb'), 'events': lambda run: run.highest(HOST_MEMORY)}),
    Measure('device_memory_mb', 'peak device memory, MiB', 'number', {
        'summary': lambda run: run.noted('device_memory_mb'), 'events': _device_memory}),
    Measure('cache_memory_mb', 'peak cache memory, MiB', 'number', {
        'events': lambda run: run.highest(CACHE + 'memory_mb'), 'summary': lambda run: run.noted('cache_memory_mb')}),
    *map(_hit_rate, POOLS),
    Measure('evictions', 'evictions', 'count', {
        'summary': lambda run: run.noted('counters', 'total', 'evictions'),
        'events': lambda run: run.last(CACHE + 'total_evictions')}),
    Measure('last_reward', 'last reward', 'number', {
        'summary': lambda run: run.noted('last_reward'), 'events': lambda run: run.last(REWARD)}),
    Measure('best_reward', 'best reward', 'number', {
        'summary': lambda run: run.noted('best_reward'), 'events': lambda run: run.highest(REWARD)}),
)


def read_run(experiment: Experiment, advance: Callable[[int], None]) -> Run:
    """
    Overview:
        Read all that a run left behind.
    Arguments:
        - experiment (:obj:`Experiment`): Where it is.
        - advance (:obj:`Callable[[int], None]`): Called with numbers of bytes that were read.
    Returns:
        - run (:obj:`Run`): The run.
    Raises:
        - Unreadable: If its event files are damaged, cut off or empty, or it was no training.
    """
    recording = read_events(experiment.event_files, TAGS, advance)
    run = Run(experiment.name, experiment.folder, experiment.event_files, recording, notes=list(recording.notes))
    try:
        run.config = read_config(experiment.path(CONFIG_FILE)) or {}
    except ValueError as error:
        run.notes.append(str(error))
    try:
        run.summary = _read_summary(experiment.path(SUMMARY_FILE))
    except (OSError, ValueError) as error:
        run.notes.append(f'{SUMMARY_FILE} cannot be parsed ({error})')
    if run.told('task') == 'evaluate':
        raise Unreadable('it evaluated a checkpoint and trained nothing')
    return run


def finite(value: Any) -> Optional[float]:
    """
    Overview:
        A number that can be calculated with.
    Arguments:
        - value (:obj:`Any`): Anything.
    Returns:
        - number (:obj:`Optional[float]`): None if it is no number, nan or infinite.
    """
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value) else None


def divided(one: Optional[float], other: Optional[float]) -> Optional[float]:
    """
    Overview:
        A ratio of two positive numbers.
    Arguments:
        - one (:obj:`Optional[float]`), other (:obj:`Optional[float]`): The numbers.
    Returns:
        - ratio (:obj:`Optional[float]`): None where it would say nothing: a number is missing or negative, or the \
            other is zero.
    """
    return one / other if one is not None and one >= 0 and other is not None and other > 0 else None


def _read_summary(path: str) -> Dict[str, Any]:
    if not os.path.exists(path):
        return {}
    with open(path, encoding='utf-8') as file:
        summary = json.load(file)
    if not isinstance(summary, dict):
        raise ValueError('it holds no object')
    return summary

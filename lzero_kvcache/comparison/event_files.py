"""
A run's event files, of which tensorboard's own reader reads every point of the tags that are compared. The arrays of a
file have one dimension, an element for each point.
"""
import os
from array import array
from collections import defaultdict
from typing import Any, Dict, Iterator, Optional, Tuple

import numpy as np
from google.protobuf.message import DecodeError

from ..run_files import COLLECTIONS, EVALUATIONS, POOLS, events

# Seconds by which the events of one file may be out of order.
CLOCK_TOLERANCE = 1.

REWARD = 'evaluator_step/reward_mean'
MEMORY_OF_HOST = 'Buffer/memory_usage/process'
MEMORY_OF_DEVICE = 'learner_iter/Max_GPU_avg'
CACHE, CACHE_BY_STEP = 'kv_cache_iter/', 'kv_cache_step/'
TAGS = frozenset([
    REWARD, MEMORY_OF_HOST, MEMORY_OF_DEVICE,
    *(CACHE_BY_STEP + name for name in ('init_hit_rate', 'search_ms', 'memory_mb')),
    *(CACHE + name for name in ('search_ms', 'step_ms', 'memory_mb', 'total_evictions')),
    *(f'{CACHE}{pool}_{count}' for pool in POOLS for count in ('hits', 'queries')),
])
# Along each of these a file's first point tells which points of earlier files were abandoned: tags against environment
# steps, tags against iterations, and evaluations. A file that goes on from a checkpoint begins at its iteration, but
# with more environment steps. An evaluation was made again if a later file has one at as many steps, or at fewer.
AXES = ENV_STEPS, ITERATIONS, AGAIN = '_step/', '_iter/', EVALUATIONS[1]

# From when to when, in seconds since 1970.
Span = Tuple[float, float]


class Unreadable(Exception):
    """A run that cannot be compared; the message says why, in one line."""


class EventFile:
    """
    One event file as far as it is whole; ``fault`` says if it is not. ``points`` has step, number of the event and
    value in turn for each tag. ``steps`` has, for each scalar of an axis, the step, the number of the event and whether
    a checkpoint of this step comes after it.
    """

    def __init__(self, path: str) -> None:
        self.fault: Optional[str] = None
        self.points: Dict[str, array] = defaultdict(lambda: array('d'))
        steps: Dict[str, array] = {axis: array('q') for axis in AXES}
        times, scalars = array('d'), array('q')
        try:
            for event in _whole_events(path):
                numbers = {value.tag: value.simple_value for value in event.summary.value
                           if value.HasField('simple_value')}
                for tag, number in numbers.items():
                    if tag in TAGS:
                        self.points[tag].extend((event.step, len(times), number))
                    for axis in AXES:
                        if axis in tag and not tag.startswith(COLLECTIONS[0]):  # environment steps tell of these
                            before = axis == ENV_STEPS or tag.startswith(EVALUATIONS[0])
                            steps[axis].extend((event.step, len(times), before))
                times.append(event.wall_time)
                scalars.append(len(numbers))
        except Unreadable as error:
            self.fault = str(error)
        self.end = len(times)
        self.steps = {axis: np.array(held).reshape(-1, 3) for axis, held in steps.items()}
        self.scalars = np.array(scalars)  # of each event
        # Where the clock was set back, all later times are moved forward by as much.
        passed = np.diff(times, prepend=times[:1])
        back = np.where(passed < -CLOCK_TOLERANCE, -passed, 0.)
        self.set_back = back.sum()
        self._clock = np.maximum.accumulate(np.array(times) + np.cumsum(back))

    def cut_off(self, later: 'EventFile') -> None:
        """Drop the points after the checkpoint from which a later file goes on, if it lies within this file."""
        # Neither may have more than an evaluation of the iteration where both begin.
        together = np.array_equal(self.steps[ITERATIONS][:1, 0], later.steps[ITERATIONS][:1, 0])
        for axis, own in self.steps.items():
            of_later = later.steps[axis]
            if len(own) and len(of_later) and own[0, 0] < of_later[0, 0] + (axis == AGAIN and together):
                beyond = own[own[:, 0] >= of_later[0, 0] + own[:, 2], 1]
                self.end = min([self.end, *beyond[:1]])

    def begins_like(self, other: 'EventFile') -> bool:
        """Whether both have points from one iteration on, as no parts of one run do."""
        own, others = (file.steps[ITERATIONS][:, 0] for file in (self, other))
        return bool(self.points.keys() & other.points.keys() and len(own) and len(others) and own[0] == others[0]
                    and min(own.max(), others.max()) > own[0])

    @property
    def abandoned(self) -> int:
        """How many points are cut off."""
        return self.scalars[self.end:].sum()

    @property
    def env_steps(self) -> np.ndarray:
        """Those of all scalars that are not cut off."""
        steps, numbers, _ = self.steps[ENV_STEPS].T
        return steps[numbers < self.end]

    @property
    def last_step(self) -> Optional[int]:
        """The environment step at which it ends or breaks off."""
        steps = self.steps[ENV_STEPS]
        return int(steps[:, 0].max()) if len(steps) else None

    @property
    def iterations(self) -> int:
        """How many training iterations there were when it ends or breaks off."""
        steps, _, before = self.steps[ITERATIONS].T
        return int((steps + 1 - before).max(initial=0))

    @property
    def span(self) -> Span:
        last = np.flatnonzero(self.scalars[:self.end]).max(initial=0)
        return (self._clock[0], self._clock[last]) if self.end else (0., 0.)

    def curve(self, tag: str) -> np.ndarray:
        """The points of a tag by step, with their times: ``[N, 3]``."""
        points = np.array(self.points[tag]).reshape(-1, 3)
        points = points[points[:, 1] < self.end]
        points[:, 1] = self._clock[points[:, 1].astype(int)]
        return points[np.argsort(points[:, 0], kind='stable')]


def _whole_events(path: str) -> Iterator[Any]:
    """The events of a file, and at the end the fault of one that is not whole."""
    name, done = os.path.basename(path), 0
    try:
        size = os.path.getsize(path)
        for end, event in events(path):
            yield event
            done = end
    except OSError as error:
        raise Unreadable(f'{name} cannot be read ({error.strerror})') from error
    except DecodeError as error:
        raise Unreadable(f'{name} is no event file') from error
    if done < size:
        raise Unreadable(f'{name} breaks off or is damaged')

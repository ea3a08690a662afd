"""
Event files to curves, by tensorboard's own reader: every point of every tag that is compared, and not a sample of them.
"""
import os
import re
from array import array
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Sequence

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2
from tensorboard.util import tensor_util

# A record is its length, a checksum of it, the event, and a checksum of that.
RECORD_FRAME = 8 + 4 + 4
# The bar need not move more often than this.
ADVANCE_BYTES = 1 << 18
# LightZero and this package write what they write against environment steps under NAME_step/TAG.
AGAINST_ENV_STEPS = '_step/'
FILE_NAME = re.compile(r'events\.out\.tfevents\.\d+\.(?P<host>.+?)(\.\d+\.\d+)?$')


class Unreadable(Exception):
    """A run that cannot be compared; the message says why, in one line."""


class Curve(NamedTuple):
    """
    Overview:
        Every point of a tag: at which step, how many seconds after the run began, and its value. One dimension each.
    """
    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass
class Recording:
    """
    Overview:
        What the event files of one run hold. ``started``, when the first file was begun, and ``ended``, at the last
        scalar, are seconds since 1970; ``env_step`` is the last one that anything was written for, ``points`` counts
        the scalars of all tags.
    """
    curves: Dict[str, Curve]
    started: float
    ended: float
    env_step: Optional[int]
    points: int
    host: Optional[str]


class _Points:

    def __init__(self) -> None:
        self.steps, self.times, self.values = array('q'), array('d'), array('d')

    def curve(self, started: float) -> Curve:
        times = np.array(self.times)
        order = np.argsort(times, kind='stable')
        return Curve(np.array(self.steps)[order], times[order] - started, np.array(self.values)[order])


def read_events(files: Sequence[str], tags: Sequence[str], advance: Callable[[int], None]) -> Recording:
    """
    Overview:
        Read the event files of one run.
    Arguments:
        - files (:obj:`Sequence[str]`): The files.
        - tags (:obj:`Sequence[str]`): The tags to keep.
        - advance (:obj:`Callable[[int], None]`): Called with the number of bytes that were read since the last call.
    Returns:
        - recording (:obj:`Recording`): Their points together, in the order of time.
    Raises:
        - Unreadable: If a file is damaged or ends in the middle of a record, or there is no point in any.
    """
    if not files:
        raise Unreadable('no event file in it')
    points = {tag: _Points() for tag in tags}
    started, ended, count = float('inf'), float('-inf'), 0
    env_step: Optional[int] = None
    for file in files:
        for event in _events(file, advance):
            started = min(started, event.wall_time)
            for value in event.summary.value:
                number = _scalar(value)
                if number is None:
                    continue
                count += 1
                ended = max(ended, event.wall_time)
                if AGAINST_ENV_STEPS in value.tag:
                    env_step = max(env_step or 0, event.step)
                if value.tag in points:
                    kept = points[value.tag]
                    kept.steps.append(event.step)
                    kept.times.append(event.wall_time)
                    kept.values.append(number)
    if not count:
        raise Unreadable('no scalar in ' + ', '.join(map(os.path.basename, files)))
    curves = {tag: kept.curve(started) for tag, kept in points.items() if kept.steps}
    return Recording(curves, started, ended, env_step, count, host_of(files[0]))


def host_of(file: str) -> Optional[str]:
    """
    Overview:
        The host that an event file was written on.
    Arguments:
        - file (:obj:`str`): Its path.
    Returns:
        - host (:obj:`Optional[str]`): From its name; None if that has another form.
    """
    match = FILE_NAME.match(os.path.basename(file))
    return match['host'] if match else None


def _events(file: str, advance: Callable[[int], None]) -> Iterator[Any]:
    """The events of a file. tensorboard's reader stops at a damaged record without a word, so its bytes are counted."""
    done = reported = 0
    try:
        size = os.path.getsize(file)
        for record in RawEventFileLoader(file).Load():
            done += len(record) + RECORD_FRAME
            if done - reported >= ADVANCE_BYTES:
                advance(done - reported)
                reported = done
            yield event_pb2.Event.FromString(record)
    except OSError as error:
        raise Unreadable(f'{os.path.basename(file)} cannot be read ({error.strerror})') from error
    except DecodeError as error:
        raise Unreadable(f'{os.path.basename(file)} is no event file') from error
    finally:
        advance(done - reported)
    if done < size:
        raise Unreadable(f'{os.path.basename(file)} breaks off or is damaged after {done:,} of {size:,} bytes')


def _scalar(value: Any) -> Optional[float]:
    """A scalar of the older or the newer form; None for anything else."""
    kind = value.WhichOneof('value')
    if kind == 'simple_value':
        return value.simple_value
    if kind == 'tensor' and value.metadata.plugin_data.plugin_name == 'scalars':
        return float(tensor_util.make_ndarray(value.tensor).item())
    return None

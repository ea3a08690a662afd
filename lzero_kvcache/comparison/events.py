"""
Event files to curves, by tensorboard's own reader: every point of every tag that is compared, and not a sample of them.
"""
import os
import re
from array import array
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

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


# From when to when.
Span = Tuple[float, float]


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
        What the event files of one run hold. ``spans`` are when it went on, in seconds since 1970, several for a run
        that was cut off and resumed; ``env_step`` is the last one that anything was written for, ``points`` counts the
        scalars of all tags; ``notes`` say what was lost.
    """
    curves: Dict[str, Curve]
    spans: List[Span]
    env_step: Optional[int]
    points: int
    host: Optional[str]
    notes: List[str]

    @property
    def seconds(self) -> float:
        """How long it went on, without the time between its parts."""
        return sum(ended - started for started, ended in self.spans)


class _Points:
    """Of one tag."""

    def __init__(self) -> None:
        self.steps, self.times, self.values = array('q'), array('d'), array('d')

    def curve(self, spans: Sequence[Span]) -> Curve:
        times = np.array(self.times)
        order = np.argsort(times, kind='stable')
        return Curve(np.array(self.steps)[order], _seconds_into(spans, times[order]), np.array(self.values)[order])


class _File:
    """What there is to know of one event file; its points go to those of the run."""

    def __init__(self, path: str, points: Dict[str, _Points], advance: Callable[[int], None]) -> None:
        self.started, self.ended, self.count = float('inf'), float('-inf'), 0
        self.env_step: Optional[int] = None
        self.fault: Optional[str] = None
        try:
            for event in _events(path, advance):
                self.started = min(self.started, event.wall_time)
                for value in event.summary.value:
                    self._add(event, value, points)
        except Unreadable as error:
            self.fault = str(error)

    def _add(self, event: Any, value: Any, points: Dict[str, _Points]) -> None:
        number = _scalar(value)
        if number is None:
            return
        self.count += 1
        self.ended = max(self.ended, event.wall_time)
        if AGAINST_ENV_STEPS in value.tag:
            self.env_step = max(self.env_step or 0, event.step)
        if value.tag in points:
            kept = points[value.tag]
            kept.steps.append(event.step)
            kept.times.append(event.wall_time)
            kept.values.append(number)


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
        - Unreadable: If there is no point in any file, or one is damaged or breaks off and the run did not go on in \
            another.
    """
    if not files:
        raise Unreadable('no event file in it')
    points = {tag: _Points() for tag in tags}
    read = [_File(path, points, advance) for path in files]
    filled = [file for file in read if file.count]
    for file in read:
        if file.fault and not any(other.started >= file.ended for other in filled if other is not file):
            raise Unreadable(file.fault)
    if not filled:
        raise Unreadable('no scalar in ' + ', '.join(map(os.path.basename, files)))
    spans = _united([(file.started, file.ended) for file in filled])
    curves = {tag: kept.curve(spans) for tag, kept in points.items() if kept.steps}
    env_steps = [file.env_step for file in filled if file.env_step is not None]
    notes = [f'{file.fault}; the run went on in another file' for file in read if file.fault]
    return Recording(curves, spans, max(env_steps, default=None), sum(file.count for file in filled),
                     host_of(files[0]), notes)


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


def _united(spans: Sequence[Span]) -> List[Span]:
    """Spans that overlap as one, in their order."""
    united: List[Span] = []
    for started, ended in sorted(spans):
        if united and started <= united[-1][1]:
            united[-1] = united[-1][0], max(ended, united[-1][1])
        else:
            united.append((started, ended))
    return united


def _seconds_into(spans: Sequence[Span], times: np.ndarray) -> np.ndarray:
    """How long a run had gone on at some moments."""
    return sum((np.clip(times, *span) - span[0] for span in spans), np.zeros_like(times))

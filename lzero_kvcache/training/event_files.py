"""Tensorboard's event files of a training that goes on where an earlier part of it was."""
import os
from typing import Iterator, Tuple

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

# The length of a record and its checksum before it, and one checksum after it.
RECORD_FRAME = 8 + 4 + 4


def purge(folder: str, train_iter: int) -> int:
    """
    Cut what was written after a checkpoint of ``train_iter`` off event files, since training goes on from there and
    writes it again; returns how many points that were. Tensorboard's own purge knows one kind of step for all tags, and
    here some count iterations and some environment steps.
    """
    points = 0
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        end = None
        for offset, event in _events(path):
            if end is None and any('_iter/' in value.tag and event.step >= train_iter for value in event.summary.value):
                end = offset
            points += len(event.summary.value) if end is not None else 0
        if end is not None:
            os.truncate(path, end)
    return points


def _events(path: str) -> Iterator[Tuple[int, Event]]:
    """The whole events of a file, each with the place where it begins."""
    offset = 0
    for record in RawEventFileLoader(path).Load():
        yield offset, Event.FromString(record)
        offset += len(record) + RECORD_FRAME

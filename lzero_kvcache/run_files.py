"""What a run leaves in its folder: tensorboard's event files, DI-engine's config, its progress and its summary."""
import ast
import contextlib
import json
import os
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from .config import FLAG, OPTIONS, PREFIX, ConfigError, picked_manager

# Where LightZero puts event files, and DI-engine the config, below a run's folder.
EVENT_FILES = os.path.join('log', 'serial')
EVENT_FILE = 'tfevents'  # in their names
CONFIG_FILE = 'total_config.py'
# All that DI-engine writes there before a training begins.
CONFIG_FILES = {CONFIG_FILE, 'formatted_total_config.py', 'git_log.txt', 'git_diff.txt'}
SUMMARY = 'summary.json'
PROGRESS = 'progress.json'
# What a run was for.
TRAIN, EVALUATE = 'train', 'evaluate'
# The outcomes of runs; NO_END is that of a run with a ``progress.json`` and no ``summary.json``.
DONE, STOPPED, NO_END = 'done', 'reward reached env.stop_value', 'it was killed, or failed, or is not done yet'
# In the folder of an experiment, above those of its runs.
EXPERIMENT = 'experiment.json'
# In a config: the checkpoint that DI-engine's learner loads as it begins.
LOADED = 'policy.learn.learner.hook.load_ckpt_before_run'
# At one iteration the order is: collection, evaluation, checkpoint, update. A checkpoint includes a collection or an
# evaluation of its own iteration if it counts that one's environment steps.
EVALUATIONS = ('evaluator_iter/', 'evaluator_step/')
COLLECTIONS = ('collector_iter/', 'collector_step/')
# The pools whose look-ups are counted.
POOLS = 'init', 'recur', 'total'
# What values of a summary are, where it has them: lists of some kind, or single ones of one of several kinds.
LISTS = {'resumed_at': int, 'earlier': dict, 'overrides': str, 'evaluations': dict}
SINGLE: Dict[str, Tuple[type, ...]] = {
    'outcome': (str, ), 'run_id': (str, ), 'cache': (str, type(None)),
    'max_env_step': (int, float, type(None)), 'max_train_iter': (int, float, type(None)),
}
# In an event file, a record is its length, a checksum of it, the event, and a checksum of that.
RECORD_FRAME = 8 + 4 + 4


@dataclass
class Record:
    """
    The contents of a run's folder. ``config`` has dotted keys; ``summary`` is the content of its progress file, if it
    has no summary and so has not ended. Both are empty where nothing was saved. ``notes`` say what is missing.
    """
    folder: str
    config: Dict[str, Any] = field(default_factory=dict)
    summary: Dict[str, Any] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    @property
    def cache(self) -> Optional[str]:
        """'old', 'new' or the name of a registered manager."""
        if not self.config:
            return self.summary.get('cache')
        flag, manager = (self.config.get(f'{PREFIX}.{key}') for key in (FLAG, f'{OPTIONS}.type'))
        return str(picked_manager({FLAG: flag, OPTIONS: {'type': manager}}))

    def read(self) -> 'Record':
        """Fill the record from the files in its folder, and return it."""
        try:
            self.config = read_config(os.path.join(self.folder, CONFIG_FILE))
        except ValueError as error:
            self.notes.append(str(error))
        for name, known in ((SUMMARY, {}), (PROGRESS, {'outcome': NO_END})):
            try:
                self.summary = {**read_said(os.path.join(self.folder, name)), **known}
                break
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                self.notes.append(f'{name} cannot be parsed ({error})')
        return self


def read_said(path: str) -> Dict[str, Any]:
    """What a run says of itself in its summary or its progress; ``ValueError`` where that cannot be."""
    return _checked(read_json(path))


def _checked(summary: Dict[str, Any]) -> Dict[str, Any]:
    """A summary whose values are of their kinds; ``ValueError`` for any other."""
    for name, kind in LISTS.items():
        held = summary.get(name) or []
        if not isinstance(held, list) or not all(isinstance(part, kind) for part in held):
            raise ValueError(f'{name} is {held!r}')
    for name, kinds in SINGLE.items():
        if not isinstance(summary.get(name, kinds[0]()), kinds):
            raise ValueError(f'{name} is {summary[name]!r}')
    for part in summary.get('earlier') or []:
        _checked(part)
    return summary


def events(path: str) -> Iterator[Tuple[int, Event]]:
    """The events of a file up to the first damaged one, each with the offset of its end."""
    end = 0
    for record in RawEventFileLoader(path).Load():
        end += len(record) + RECORD_FRAME
        yield end, Event.FromString(record)


def event_files(folder: str) -> List[str]:
    """The event files in a folder, in the order in which they were begun; none where there is no folder."""
    return sorted(map(str, Path(folder).glob(f'*{EVENT_FILE}*')))


def purge(folder: str, train_iter: int, env_step: int, evaluated: bool, see: Callable[[str, Event], None]) -> int:
    """
    Cut off event files what was written after the checkpoint of these counts: a training that goes on from there writes
    it again, and evaluates again, unless the checkpoint was ``evaluated`` before it was saved. ``see`` is shown each
    file's events. Returns the number of points that were cut off. Tensorboard's own purge expects one kind of step for
    all tags; here some count iterations and some environment steps.
    """
    points = 0
    for path in event_files(folder):
        whole, cut, undecided, found = 0, False, 0, False
        for end, event in readable_events(path):
            see(path, event)
            tags = [value.tag for value in event.summary.value]
            undecided += len(tags)
            for tag in tags:
                if tag.startswith(COLLECTIONS[1]):
                    cut = cut or event.step > env_step
                elif tag.startswith(EVALUATIONS[1]):
                    cut = cut or event.step > env_step - (not evaluated)
                    found = found or event.step == env_step
                elif '_iter/' in tag and not tag.startswith(COLLECTIONS[0]):
                    cut = cut or event.step >= train_iter + tag.startswith(EVALUATIONS[0])
            # A point of either against iterations stands before the same point against steps, and that one decides.
            if not cut and not any(tag.startswith((COLLECTIONS[0], EVALUATIONS[0])) for tag in tags):
                whole, undecided = end, 0
        evaluated = evaluated and not found  # the first file that has the evaluation keeps it
        points += undecided
        if undecided or _is_torn(path, whole):
            os.truncate(path, whole)
    return points


def readable_events(path: str) -> Iterator[Tuple[int, Event]]:
    """The events of a file, which is refused if it cannot be read."""
    try:
        yield from events(path)
    except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error.strerror}); move it away') from error
    except DecodeError as error:
        raise ConfigError(f'{path} is no event file; move it away') from error


def _is_torn(path: str, begin: int) -> bool:
    """Whether the record at an offset is not all there, as a kill leaves it; one that is damaged is no such record."""
    with open(path, 'rb') as file:
        file.seek(begin)
        length = int.from_bytes(file.read(8), 'little')
        return begin < os.path.getsize(path) < begin + RECORD_FRAME + length


@contextlib.contextmanager
def writing_to(folder: str) -> Iterator[None]:
    """Turn an ``OSError`` while writing into a folder of results into a ``ConfigError``."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f'--out {shlex.quote(folder)} cannot be written to ({error.strerror}); give another folder') from error


def remove_empty(folders: Iterable[str]) -> None:
    """Remove those of some folders that are there and empty, in their order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


@contextlib.contextmanager
def results_in(folder: str) -> Iterator[None]:
    """A context that begins with a folder that can be written to. After an error, folders that were made for it are
    removed, but for those with something in them."""
    made = [str(path) for path in (Path(folder), *Path(folder).parents) if not os.path.lexists(path)]
    try:
        with writing_to(folder):
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        yield
    except BaseException:
        remove_empty(made)
        raise


def write_json(path: str, content: Any) -> None:
    """Replace a file in one step, so that no reader sees half of it."""
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        json.dump(content, file, indent=2, default=str)
    os.replace(path + '.tmp', path)


def read_json(path: str) -> Dict[str, Any]:
    """The object in a file; ``ValueError`` if there is none."""
    with open(path, encoding='utf-8') as file:
        try:
            content = json.load(file)
        except RecursionError as error:
            raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError('it holds no object')
    return content


def read_if_whole(path: str) -> Dict[str, Any]:
    """The same; empty if there is no file, or no whole one."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


class Expression(str):
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
        return Expression(' '.join((ast.get_source_segment(source, node) or '').split()))

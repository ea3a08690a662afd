"""
Loads what a LightZero config file declares. Loading runs the file, which is Python code, but never a
training. Changing what was loaded is the business of ``plan.py``.
"""
import argparse
import ast
import atexit
import contextlib
import copy
import os
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

from easydict import EasyDict

import lzero_kvcache_options

from ..config import ConfigError, check_dict
from ..host.building import zoo_folder
from ..host.patches import ENTRIES, applied, forget_configs
from ..host.recorded import recorded_call, trainings
from ..loading import policy_type
from ..run_files import TRAIN
from .error_hints import hint

# The numbers that a config file may declare beside its configs and its entry.
COUNTS = 'seed', 'max_env_step', 'max_train_iter', 'threads'

MODULE = 'lzero.entry'  # of LightZero's trainings
# The dicts that every config has, parents first, and first those that tell the policy.
NEEDED = ('main_config', 'main_config.policy', 'create_config', 'create_config.policy', 'main_config.env',
          'main_config.policy.model', 'main_config.policy.model.world_model_cfg', 'create_config.env',
          'create_config.env_manager')

# The folder of the last config, with what removes it from the import path, of which the process has only one.
_beside: Dict[str, contextlib.ExitStack] = {}


@dataclass
class Plan:
    """
    Everything that a run needs: copies of a config file's dicts, so that no module changes with them, and the
    user's options. A training goes on from ``checkpoint``, in the same folder if ``in_place``; an evaluation
    evaluates it.
    """
    config: str
    main_config: EasyDict
    create_config: EasyDict
    entry: str
    seed: int = 0
    max_env_step: Optional[int] = None
    max_train_iter: Optional[int] = None
    threads: Optional[int] = None
    task: str = TRAIN
    checkpoint: Optional[str] = None
    in_place: bool = False
    keep_checkpoints: Optional[int] = None
    overrides: Sequence[str] = ()


def find_config(name: str) -> str:
    """The absolute path of a config file: of a path, of a name of ours, or of one of LightZero's own zoo."""
    try:
        return lzero_kvcache_options.path_of_config(name)
    except lzero_kvcache_options.UsageError as error:
        raise ConfigError(str(error)) from None


def load_config(name: str) -> Plan:
    """
    Load a config file that declares ``main_config`` and ``create_config``, or, as LightZero's Atari files do, builds
    them and trains where Python runs it as a program; no training starts. Files beside it can be imported from then on,
    until a config of another folder is loaded.
    """
    path = find_config(name)
    declared = _run_file(path)
    entry = declared.get('entry')
    if entry is not None:
        entry = getattr(entry, '__name__', entry) if callable(entry) else entry
        _check_entry(entry, f'{path}: entry is {entry!r}')
    missing = _missing(declared)
    if missing:
        raise ConfigError(
            f"--config {path}: it declares no {' and no '.join(missing)}; a LightZero config file has 'main_config' "
            f"and 'create_config', or calls {' or '.join(ENTRIES)}"
        )
    for key in NEEDED:
        node: Any = declared
        for part in key.split('.'):
            node = node.get(part)
        check_dict(node, f'{path}: {key}')
        if key == 'create_config.policy':
            policy_type(declared['main_config'], declared['create_config'])
    try:
        main_config, create_config = (
            EasyDict(copy.deepcopy(declared[name])) for name in ('main_config', 'create_config'))
    except TypeError as error:  # of a key that is no string
        raise ConfigError(f'{path}: {error}') from error
    counts: Dict[str, Any] = {key: _whole_number(declared[key], key, path)
                              for key in COUNTS if declared.get(key) is not None}
    return Plan(path, main_config, create_config, entry or _guessed_entry(main_config, path), **counts)


def capture_entry_call(function: Callable, *args: Any, **kwargs: Any) -> Dict[str, Any]:
    """
    Call a function that ends in one of LightZero's training entries, as ``main`` of
    ``zoo/atari/config/atari_unizero_segment_config.py``, and return what it would have trained: ``main_config``,
    ``create_config``, ``entry``, and ``seed`` and ``max_env_step`` where the call gave them.
    """
    with tempfile.TemporaryDirectory() as folder, applied(directory=lambda path: folder):
        declared = recorded_call(lambda: function(*args, **kwargs))
    if declared is None:
        raise ConfigError("{}() calls none of {}".format(function.__name__, ', '.join(ENTRIES)))
    _check_entry(declared['entry'], f'{function.__name__}() calls {declared["entry"]}')
    return declared


def _run_file(path: str) -> Dict[str, Any]:
    """What a file declares, and what it would have trained. It runs as a module; if that declares no configs, what it
    does as a program follows, in an empty folder and without arguments."""
    declared: Dict[str, Any] = dict(__name__='lzero_kvcache_config', __file__=path)
    look_beside(path)
    forget_configs(os.path.dirname(path))
    with _errors_of(path):
        module = ast.parse(Path(path).read_bytes(), path)
        called = recorded_call(lambda: exec(compile(module, path, 'exec'), declared)) or {}
        if not called and _missing(declared):
            declared['__name__'] = '__main__'
            program = ast.Module([node for node in module.body if _is_program(node)], [])
            with tempfile.TemporaryDirectory() as folder:
                with applied(directory=lambda _: folder, command_line=lambda _: [path]):
                    called = recorded_call(lambda: exec(compile(program, path, 'exec'), declared)) or {}
    if called:
        _check_entry(called['entry'], f'{path}: it calls {called["entry"]}')
    return {**declared, **called}


def _is_program(node: ast.stmt) -> bool:
    """Whether a statement is ``if __name__ == '__main__'``."""
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == '__name__' for part in ast.walk(node.test)
    )


def _missing(declared: Dict[str, Any]) -> List[str]:
    return [name for name in ('main_config', 'create_config') if name not in declared]


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Turn any error of a config file's code into a ``ConfigError`` of one line."""
    try:
        yield
    except ConfigError:
        raise
    except SystemExit as error:
        raise ConfigError(f'--config {path}: it ends the program ({error.code!r}) before it trains') from error
    except Exception as error:
        what = hint(error) or '{}: {}'.format(type(error).__name__, ' '.join(str(error).split()))
        where = _where(path, error)
        if path.startswith(zoo_folder() + os.sep):
            raise ConfigError(f"LightZero's own {where} fails: {what}") from error
        raise ConfigError(f'--config {where}: {what}') from error


def _where(path: str, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f'{path}:{error.lineno}'
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f'{path}:{lines[-1]}' if lines else path


def look_beside(config: str) -> None:
    """Let files beside a config be imported, as for a script that Python runs, until those beside another are."""
    folder = os.path.dirname(config)
    if folder not in _beside:
        while _beside:
            _beside.popitem()[1].close()
        _beside[folder] = contextlib.ExitStack()
        _beside[folder].enter_context(applied(neighbours=lambda path: folder))
        atexit.register(_beside[folder].close)


def _check_entry(entry: Any, said: str) -> None:
    if entry not in ENTRIES:
        raise ConfigError(f'{said}, which is not run here: {" and ".join(map(repr, ENTRIES))} are; call another in a '
                          'script of your own')


def _guessed_entry(main_config: EasyDict, path: str) -> str:
    """The entry that a file names, which is not run as a program; else the one that reads its config."""
    named = _trainings_in(path)
    served = sorted(named & set(ENTRIES))
    if named and not served:
        _check_entry(min(named), f'{path}: it calls {min(named)}')
    if len(served) == 1:
        return served[0]
    # The segment entry is the only one that reads these two, and reads them without a default.
    by_segments = 'num_segments' in main_config.policy or 'buffer_reanalyze_freq' in main_config.policy
    return 'train_unizero_segment' if by_segments else 'train_unizero'


def _trainings_in(path: str) -> Set[str]:
    """The trainings of LightZero that a file's code uses, by their names there. One that it imports from there counts
    even if this LightZero lacks it; its own functions do not, even with the same names."""
    nodes = list(ast.walk(ast.parse(Path(path).read_bytes(), path)))
    imported: Dict[str, str] = {}
    own: Set[str] = set()
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f'{node.module or ""}.' if isinstance(node, ast.ImportFrom) and not node.level else ''
            imported.update({alias.asname or alias.name: module + alias.name for alias in node.names})
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
    theirs = {name: origin for name, origin in imported.items() if origin.split('.')[0] == 'lzero'}
    named = trainings() - own - imported.keys()
    found = {node.id for node in nodes if isinstance(node, ast.Name)}
    found = (found & named) | {origin.rpartition('.')[2] for name, origin in theirs.items()
                               if name in found and origin.startswith(MODULE)}
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and _dotted(node.value, theirs) == MODULE}
    return {name for name in found if name.startswith('train_')}


def _dotted(node: ast.expr, imported: Dict[str, str]) -> str:
    """A name with its attributes as ``lzero.entry``, of an imported one by where it is from; or nothing."""
    if isinstance(node, ast.Attribute):
        return f'{_dotted(node.value, imported)}.{node.attr}'
    return imported.get(node.id, node.id) if isinstance(node, ast.Name) else ''


def _whole_number(value: Any, name: str, path: str) -> int:
    try:
        return lzero_kvcache_options.reader_of(name)(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f'{path}: {name} = {error}') from None

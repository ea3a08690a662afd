"""
Finds a LightZero config file and loads what it declares. Loading runs the file, which is Python code, but never a
training. Changing what was loaded is the business of ``overrides.py``.
"""
import contextlib
import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, Optional, Set, Tuple
from unittest import mock

from easydict import EasyDict

from lzero_kvcache.config import ConfigError

from .mending import mend

ENTRIES = ('train_unizero', 'train_unizero_segment')
POLICIES = ('unizero', 'sampled_unizero')
FOLDERS = ('', 'configs', 'zoo_configs')
PROJECT_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# LightZero's Atari files build their config in ``main(env_id, seed)``, whose arguments come from the command line.
MAIN_DEFAULTS = {'env_id': 'PongNoFrameskip-v4', 'seed': 0}

_beside: Dict[str, Set[str]] = {}  # the folder of the last config that was loaded, and the modules before it


@dataclass
class LoadedConfig:
    """
    Overview:
        What a config file declares, copied, so that changing it changes no module.
    """
    path: str
    main_config: EasyDict
    create_config: EasyDict
    entry: str
    seed: int = 0
    max_env_step: Optional[int] = None
    max_train_iter: Optional[int] = None
    threads: Optional[int] = None


class _EntryCalled(BaseException):
    """Carries the arguments of a call to a LightZero entry out of the code that made it."""

    def __init__(self, entry: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        super().__init__(entry)
        self.entry, self.args_of_call, self.kwargs_of_call = entry, args, kwargs

    def declared(self, signature: inspect.Signature) -> Dict[str, Any]:
        """What the call would have trained, as a config file declares it."""
        arguments = signature.bind(*self.args_of_call, **self.kwargs_of_call).arguments
        main_config, create_config = arguments['input_cfg']
        wanted: Dict[str, Any] = {key: arguments[key] for key in ('seed', 'max_env_step') if key in arguments}
        return dict(main_config=main_config, create_config=create_config, entry=self.entry, **wanted)


def find_config(name: str) -> str:
    """
    Overview:
        Find a config file. A name is looked for in the current folder, then in ``configs`` and ``zoo_configs``, of the
        current folder and of this project; ``.py`` may be left out.
    Arguments:
        - name (:obj:`str`): A file name or a path.
    Returns:
        - path (:obj:`str`): The absolute path of an existing file.
    """
    roots = [os.getcwd(), PROJECT_ROOT]
    folders = [os.path.join(root, folder) for root in roots for folder in FOLDERS]
    for folder in folders:
        for candidate in (name, name + '.py'):
            path = os.path.join(folder, candidate)
            if os.path.isfile(path):
                return os.path.abspath(path)
    known = sorted({
        entry
        for folder in folders if os.path.basename(folder) in FOLDERS[1:] and os.path.isdir(folder)
        for entry in os.listdir(folder) if entry.endswith('.py') and not entry.startswith('_')
    })
    nearest = difflib.get_close_matches(os.path.basename(name), known, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else \
        "give a path, or one of: {}".format(', '.join(known) or 'none here')
    raise ConfigError(f"--config {name}: no such file here, in configs/ or in zoo_configs/; {hint}")


def load_config(name: str) -> LoadedConfig:
    """
    Overview:
        Load a config file that declares ``main_config`` and ``create_config``, or, as LightZero's Atari files do,
        builds them in a function ``main`` that ends in a training. No training starts. What lies beside the file can
        be imported from then on, until a config of another folder is loaded.
    Arguments:
        - name (:obj:`str`): As in ``find_config``.
    Returns:
        - loaded (:obj:`LoadedConfig`): The configs, and the file's ``max_env_step``, ``seed``, ``entry``, ...
    """
    path = find_config(name)
    declared = _run_file(path)
    if 'main_config' not in declared or 'create_config' not in declared:
        declared = {**declared, **_captured_from_main(path, declared)}
    main_config = _as_config(declared['main_config'], 'main_config', path)
    create_config = _as_config(declared['create_config'], 'create_config', path)
    _check_shape(main_config, create_config, path)
    return LoadedConfig(
        path=path,
        main_config=main_config,
        create_config=create_config,
        entry=_entry_of(declared.get('entry'), main_config, path),
        seed=whole_number(declared.get('seed', 0), 'seed', path, minimum=0) or 0,
        max_env_step=whole_number(declared.get('max_env_step'), 'max_env_step', path),
        max_train_iter=whole_number(declared.get('max_train_iter'), 'max_train_iter', path),
        threads=whole_number(declared.get('threads'), 'threads', path),
    )


def capture_entry_call(function: Callable, *args: Any, **kwargs: Any) -> Dict[str, Any]:
    """
    Overview:
        Call a function that ends in one of LightZero's training entries, and return what it would have trained.
    Arguments:
        - function (:obj:`Callable`): For example ``main`` of ``zoo/atari/config/atari_unizero_segment_config.py``.
        - args, kwargs (:obj:`Any`): Its arguments.
    Returns:
        - declared (:obj:`Dict[str, Any]`): ``main_config``, ``create_config``, ``entry``, and ``seed`` and
          ``max_env_step`` where the call gave them.
    """
    declared = _declared_by(lambda: function(*args, **kwargs))
    if declared is None:
        raise ConfigError("{}() calls none of {}".format(function.__name__, ', '.join(ENTRIES)))
    return declared


def _declared_by(run: Callable[[], Any]) -> Optional[Dict[str, Any]]:
    """What is declared by the first call of a training entry in what runs; None where there is none."""
    signatures = _signatures()
    with _recorded_entries():
        try:
            run()
        except _EntryCalled as call:
            return call.declared(signatures[call.entry])
    return None


@functools.lru_cache(maxsize=None)
def _signatures() -> Dict[str, inspect.Signature]:
    """Those of the training entries, taken before their code is exchanged for the first time."""
    package = importlib.import_module('lzero.entry')
    return {name: inspect.signature(getattr(package, name)) for name in ENTRIES}


@contextlib.contextmanager
def _recorded_entries() -> Iterator[None]:
    """Let a call of a training entry, by whatever reference, be recorded instead: the functions' own code is exchanged.

    What it does to train on several GPUs, which joins the processes and divides the batch, is left to the run.
    """
    package = importlib.import_module('lzero.entry')
    stand_ins = [(getattr(package, name), stand_in) for name, stand_in in (
        ('train_unizero', _in_place_of_train_unizero), ('train_unizero_segment', _in_place_of_train_unizero_segment))]
    stand_ins.append((importlib.import_module('lzero.config.utils').lz_to_ddp_config, _as_it_is))
    context = importlib.import_module('ding.utils').DDPContext
    codes = [(function, function.__code__) for function, _ in stand_ins]
    for function, stand_in in stand_ins:
        function.__code__ = stand_in.__code__
    try:
        with mock.patch.multiple(
                context, __init__=lambda self: None, __enter__=lambda self: self, __exit__=lambda self, *args: None):
            yield
    finally:
        for function, code in codes:
            function.__code__ = code


# In LightZero's functions these run with the names of LightZero's modules, hence the imports.


def _in_place_of_train_unizero(*args, **kwargs):  # type: ignore[no-untyped-def]
    from lzero_kvcache.training.config_file import _EntryCalled
    raise _EntryCalled('train_unizero', args, kwargs)


def _in_place_of_train_unizero_segment(*args, **kwargs):  # type: ignore[no-untyped-def]
    from lzero_kvcache.training.config_file import _EntryCalled
    raise _EntryCalled('train_unizero_segment', args, kwargs)


def _as_it_is(main_config: Any) -> Any:
    return main_config


def _run_file(path: str) -> Dict[str, Any]:
    name = 'lzero_kvcache_config_' + os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    _look_beside(path)
    with _told_of(path):
        called = _declared_by(lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return {**vars(module), **(called or {})}


@contextlib.contextmanager
def _told_of(path: str) -> Iterator[None]:
    """Errors of a config file's own code are those of a config, in one line."""
    try:
        yield
    except ConfigError:
        raise
    except SystemExit as error:
        raise ConfigError(f'--config {path}: it ends the program ({error.code!r}) before it trains') from error
    except Exception as error:
        raise ConfigError(f"--config {_where(path, error)}: {mend(error) or _one_line(error)}") from error


def _look_beside(path: str) -> None:
    """Let what lies beside a config be imported for the rest of the process, as it is for a script that Python runs."""
    folder = os.path.dirname(path)
    if folder in _beside:
        return
    for earlier, present in _beside.items():
        with contextlib.suppress(ValueError):  # the config has taken it away
            sys.path.remove(earlier)
        # A neighbour of that config, as config_old.py, must not stand for this folder's file of that name.
        added = set(sys.modules) - present
        neighbours = {name for name in added if '.' not in name and _lies_in(earlier, sys.modules[name])}
        for name in [name for name in added if name.split('.')[0] in neighbours]:
            del sys.modules[name]
    _beside.clear()
    _beside[folder] = set(sys.modules)
    sys.path.insert(0, folder)


def _lies_in(folder: str, module: Any) -> bool:
    """Whether a module is a file of a folder, or a package in it."""
    where = list(getattr(module, '__path__', [])) or [getattr(module, '__file__', None) or '']
    return folder in map(os.path.dirname, where)


def _captured_from_main(path: str, declared: Dict[str, Any]) -> Dict[str, Any]:
    main = declared.get('main')
    if not inspect.isfunction(main):
        missing = [name for name in ('main_config', 'create_config') if name not in declared]
        raise ConfigError(
            "--config {}: it declares no {}; a LightZero config file has 'main_config' and 'create_config'".format(
                path, ' and no '.join(missing)
            )
        )
    arguments = {}
    for name, parameter in inspect.signature(main).parameters.items():
        if name in MAIN_DEFAULTS and parameter.default is parameter.empty:
            arguments[name] = MAIN_DEFAULTS[name]
        elif parameter.default is parameter.empty:
            raise ConfigError(f"--config {path}: its main() needs '{name}', which nothing gives")
    with _told_of(path):
        return capture_entry_call(main, **arguments)


def _entry_of(declared: Any, main_config: EasyDict, path: str) -> str:
    if callable(declared):
        declared = getattr(declared, '__name__', declared)
    if declared is None:
        # The segment entry is the only one that reads these two, and reads them without a default.
        by_segments = 'num_segments' in main_config.policy or 'buffer_reanalyze_freq' in main_config.policy
        return 'train_unizero_segment' if by_segments else 'train_unizero'
    if declared not in ENTRIES:
        raise ConfigError("{}: entry = {!r}; it can be {}".format(path, declared, ' or '.join(map(repr, ENTRIES))))
    return declared


def _check_shape(main_config: EasyDict, create_config: EasyDict, path: str) -> None:
    for tree, name, keys in ((main_config, 'main_config', ('env', 'policy')),
                             (create_config, 'create_config', ('env', 'env_manager', 'policy'))):
        for key in keys:
            if not isinstance(tree.get(key), dict):
                raise ConfigError(f"{path}: {name}.{key} is missing; LightZero's configs have it")
    policy = create_config.policy.get('type')
    if policy not in POLICIES:
        raise ConfigError(
            "{}: create_config.policy.type is {!r}; this trains {}".format(path, policy, ' and '.join(POLICIES))
        )
    if not isinstance(main_config.policy.get('model', {}).get('world_model_cfg'), dict):
        raise ConfigError(f"{path}: main_config.policy.model.world_model_cfg is missing")


def _as_config(value: Any, name: str, path: str) -> EasyDict:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name} is a {type(value).__name__}, not a dict")
    return EasyDict(copy.deepcopy(value))


def whole_number(value: Any, name: str, path: str, minimum: int = 1) -> Optional[int]:
    """
    Overview:
        Read a count that may be written as 2e5.
    Arguments:
        - value (:obj:`Any`): The count, or None.
        - name (:obj:`str`), path (:obj:`str`): What it is called, and where, for the error.
        - minimum (:obj:`int`): The least that makes sense.
    Returns:
        - number (:obj:`Optional[int]`): The count as an int, None for None.
    """
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value != value or value in (float('inf'), float('-inf')) or value != int(value):
        raise ConfigError(f"{path}: {name} = {value!r} is not a whole number")
    if value < minimum:
        raise ConfigError(f"{path}: {name} = {value!r}; it must be at least {minimum}")
    return int(value)


def _where(path: str, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f'{path}:{error.lineno}'
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f'{path}:{lines[-1]}' if lines else path


def _one_line(error: BaseException) -> str:
    return '{}: {}'.format(type(error).__name__, ' '.join(str(error).split()))

"""
Everything outside of this package that a training replaces for a time: of LightZero, of DI-engine and of the process.
``applied`` and ``with_globals`` replace what is in ``TABLE`` alone; docs/patches.md says what others do beside it.
"""
import contextlib
import importlib
import os
import signal
import sys
import types
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch

ENTRIES = ('train_unizero', 'train_unizero_segment')
COLLECTORS = ('lzero.worker.muzero_collector', 'lzero.worker.muzero_segment_collector')
Make = Callable[[Any], Any]


class Patch(NamedTuple):
    """
    A target is ``module:attribute``, ``copy of module:function:name`` for a name that a copy of the function finds,
    ``signal:NAME``, ``environ:NAME``, ``descriptor:NUMBER``, ``directory``, ``threads``, the process's own, or
    ``sys.path``, where a folder is added and its modules are forgotten at the end.
    """
    targets: Tuple[str, ...]
    replacement: str
    reason: str
    until: str


def _of_entries(name: str) -> Tuple[str, ...]:
    return tuple(f'lzero.entry.{entry}:{name}' for entry in ENTRIES)


def _of_models(name: str) -> Tuple[str, ...]:
    return tuple(
        f'copy of lzero.model.{module}:{model}.__init__:{name}'
        for module, model in (('unizero_model', 'UniZeroModel'), ('sampled_unizero_model', 'SampledUniZeroModel'))
    )


UNIZERO, SAMPLED = 'unizero:UniZeroPolicy', 'sampled_unizero:SampledUniZeroPolicy'
PPO = 'unizero_ppo:UniZeroPPOPolicy'  # of the main branch


def _of_policies(name: str, *policies: str) -> Tuple[str, ...]:
    return tuple(f'copy of lzero.policy.{policy}._forward_{mode}:{name}'
                 for mode in ('collect', 'eval') for policy in policies)


CALL = 'the call returns'
RUN, LOAD, OUTPUT = 'the run ends', 'the config is loaded', 'the command ends'
PRINTED = (
    'the log file; while a config loads, a stream that leaves out tracebacks of what ends its call',
    "Python code writes there; a config may print a traceback of what ends its call", f'{OUTPUT}, or {LOAD}'
)

TABLE: Dict[str, Patch] = {
    # ---- LightZero and DI-engine, while a config is loaded
    'entries': Patch(
        tuple(f'lzero.entry.{entry}:{entry}.__code__' for entry in ENTRIES), "code that raises the call's arguments",
        "configs may call an entry by any reference to it, when imported or run as a program", LOAD),
    'trainings': Patch(
        ('ding.config.config:compile_config.__code__', ), "code that raises the caller's name",
        'all other trainings begin with it', LOAD),
    'registered': Patch(
        ('ding.utils.registry:Registry._register_generic.__code__', ),
        'the same, but a module that was removed and is loaded again may register its classes again',
        'a config may be loaded again', LOAD),
    'ddp_config': Patch(
        ('lzero.config.utils:lz_to_ddp_config.__code__', ), 'code that returns its argument',
        'the share of each process is worked out when it runs', LOAD),
    'ddp_context': Patch(
        tuple(f'ding.utils:DDPContext.{name}' for name in ('__init__', '__enter__', '__exit__')), 'does nothing',
        'processes meet when they run', LOAD),
    'directory': Patch(
        ('directory', ), 'a temporary one', 'a config that is run as a program may make the folder of its run', LOAD),
    'command_line': Patch(
        ('sys:argv', ), "the config's name alone", 'a config that is run as a program may read its arguments', LOAD),
    # ---- LightZero and DI-engine, in a run
    'compile_config': Patch(
        _of_entries('compile_config'), 'the same with renew_dir=False', 'the folder has been made already', RUN),
    'learner': Patch(
        _of_entries('BaseLearner'), 'a subclass', 'restores a checkpoint; tells of iterations and interrupts', RUN),
    'collector': Patch(_of_entries('Collector'), 'a subclass', 'counts environment steps as they are taken', RUN),
    'evaluator': Patch(_of_entries('Evaluator'), 'a subclass', 'keeps the reward of each evaluation', RUN),
    'save_file': Patch(
        ('ding.worker.learner.learner_hook:save_file', ), 'the same in one step',
        'a kill during a save would leave a torn checkpoint', RUN),
    'reanalysis': Patch(
        ('lzero.mcts.buffer.game_buffer_unizero:UniZeroGameBuffer._compute_target_policy_reanalyzed', ),
        'a copy of it, or itself', 'it finds other roots and another search', RUN),
    'targets': Patch(
        ('lzero.mcts.buffer.game_buffer_unizero:UniZeroGameBuffer._compute_target_reward_value',
         'lzero.mcts.buffer.game_buffer_sampled_unizero:SampledUniZeroGameBuffer._compute_target_reward_value'),
        'buffers.target_values, or itself', 'they are inference, and most of what it computes is thrown away', RUN),
    # ---- LightZero and DI-engine, in a run of several processes
    'allreduce': Patch(
        tuple(f'{module}:allreduce_data' for module in COLLECTORS), 'a sum that carries interrupts',
        'it needs GPUs; all processes must leave a collection together', RUN),
    'broadcast': Patch(
        ('lzero.worker.muzero_evaluator:broadcast_object_list', ), 'a broadcast that carries interrupts',
        'all processes must leave an evaluation together', RUN),
    'buffers': Patch(
        ('lzero.mcts:UniZeroGameBuffer', 'lzero.mcts:SampledUniZeroGameBuffer'),
        'counts as much as the emptiest process has', 'all processes must begin to train together', RUN),
    'gradients': Patch(
        ('ding.policy.base_policy:Policy.sync_gradients', ), 'leaves out parameters without a gradient',
        'zero_grad leaves None, which it takes for a tensor', RUN),
    'hook_rank': Patch(
        ('ding.worker.learner.learner_hook:get_rank', ), "this process's device",
        'LogReduceHook moves numbers to the device that has the number of the rank', RUN),
    'updates': Patch(
        _of_entries('calculate_update_per_collect'), 'sums up the transitions of all processes',
        'on CPUs each process would count its own', RUN),
    'loggers': Patch(
        ('ding.worker.learner.base_learner:build_logger', *(f'{module}:build_logger' for module in COLLECTORS)),
        'loggers without files', "the files would be the first process's", RUN),
    # ---- names that a copy of one of LightZero's functions finds; LightZero's modules stay as they are
    'WorldModel': Patch(
        _of_models('WorldModel'), 'OldWorldModel or NewWorldModel', 'the flag picks the world model', CALL),
    'Tokenizer': Patch(
        _of_models('Tokenizer'), 'MemoryTokenizer', "LightZero cannot construct 'image_memory' models without", CALL),
    'MCTSCtree': Patch(
        (*_of_policies('MCTSCtree', UNIZERO, SAMPLED, PPO), 'copy of lzero.mcts.buffer.game_buffer_unizero:'
         'UniZeroGameBuffer._compute_target_policy_reanalyzed:MCTSCtree'),
        'roots that are searched in arrays', 'a search is one compiled call', CALL),
    'select_action': Patch(
        _of_policies('select_action', UNIZERO, SAMPLED, PPO), 'row_loops.Selection',
        'it selects for all rows at once', CALL),
    'search_exploration_metrics': Patch(
        _of_policies('search_exploration_metrics', UNIZERO, PPO), 'exploration.ExplorationMetrics',
        'it measures all rows at once, on the main branch', CALL),
    'np': Patch(
        _of_policies('np', UNIZERO, SAMPLED, PPO), 'numpy with another random.dirichlet',
        'it draws for all rows at once', CALL),
    'print': Patch(
        ('copy of lzero.model.unizero_world_models.world_model:WorldModel.clear_caches:print',
         'copy of lzero.policy.unizero:UniZeroPolicy._reset_collect:print',
         'copy of lzero.policy.unizero:UniZeroPolicy._reset_eval:print'), 'does nothing',
        "LightZero's line does not name the system that was cleared, and validation's shadow must not print", CALL),
    # ---- the process
    'interrupts': Patch(
        ('signal:SIGINT', 'signal:SIGTERM'), 'notes that an end was asked for',
        'a run ends after a whole update, with a checkpoint', 'the run, or the experiment, ends'),
    'descriptors': Patch(
        ('descriptor:1', 'descriptor:2'), 'the log file', 'worker processes and C code write there', OUTPUT),
    'stdout': Patch(('sys:stdout', ), *PRINTED),
    'stderr': Patch(('sys:stderr', ), *PRINTED),
    'threads': Patch(('threads', ), 'as many as were asked for', 'PyTorch computes with these', RUN),
    'plain_logs': Patch(
        ('environ:DISABLE_RICH', ), "'1'", "ditk's rich handler wraps a log file at 80 characters", OUTPUT),
    'neighbours': Patch(
        ('sys.path', ), "the config's folder", 'configs import files beside them, then and in the run',
        'a config of another folder is loaded, run or shown'),
}


@contextlib.contextmanager
def applied(**replacements: Make) -> Iterator[None]:
    """Replace the targets of rows of ``TABLE``; each replacement is made from what was there."""
    with contextlib.ExitStack() as stack:
        for name, make in replacements.items():
            for target in TABLE[name].targets:
                stack.enter_context(_replaced(target, make))
        yield


def with_globals(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of a function of ``TABLE``, or of a user's own in its place, or of such a bound method, that finds other
    objects under names of the table. It is made for one call, so that two policies or two threads never see each
    other's."""
    if isinstance(function, types.MethodType):
        return types.MethodType(with_globals(function.__func__, **names), function.__self__)
    assert isinstance(function, types.FunctionType)
    assert names.keys() <= TABLE.keys(), names
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
        function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
    return copy


def _replaced(target: str, make: Make) -> Any:
    kind, _, name = target.partition(':')
    if kind == 'sys.path':
        return _importable(make(sys.path))
    if kind == 'descriptor':
        return _descriptor(int(name), make)
    if kind == 'directory':
        return _exchanged(os.getcwd, os.chdir, make)
    if kind == 'threads':
        return _exchanged(torch.get_num_threads, torch.set_num_threads, make)
    if kind == 'environ':
        return _exchanged(partial(os.environ.get, name), partial(_set_variable, name), make)
    if kind == 'signal':
        number = getattr(signal, name)
        return _exchanged(partial(signal.getsignal, number), partial(signal.signal, number), make)
    *path, name = name.split('.')
    owner = importlib.import_module(kind)
    for part in path:
        owner = getattr(owner, part)
    return _exchanged(partial(getattr, owner, name), partial(setattr, owner, name), make)


@contextlib.contextmanager
def _exchanged(get: Callable[[], Any], put: Callable[[Any], Any], make: Make) -> Iterator[None]:
    original = get()
    put(make(original))
    try:
        yield
    finally:
        put(original)


def _set_variable(name: str, value: Optional[str]) -> None:
    if value is None:
        os.environ.pop(name)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def _descriptor(number: int, make: Make) -> Iterator[None]:
    original = os.dup(number)
    os.dup2(make(original), number)
    try:
        yield
    finally:
        os.dup2(original, number)
        os.close(original)


_imported: Dict[str, Dict[str, types.ModuleType]] = {}
"""Modules by their folders. One that registers an environment can be executed once in a process."""


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    before = set(sys.modules)
    kept = _imported.setdefault(folder, {})
    sys.modules.update({name: module for name, module in kept.items() if name not in before})
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the config may have removed it
            sys.path.remove(folder)
        added = set(sys.modules) - before
        tops = {name for name in added if '.' not in name and folder in _folders(sys.modules[name])}
        for name in added:
            if name.split('.')[0] in tops:
                kept[name] = sys.modules.pop(name)


def forget_configs(folder: str) -> None:
    """Let configs of a folder be read anew: a config changes the one that it imports, for itself alone."""
    for name, module in list(sys.modules.items()):
        declared = getattr(module, '__dict__', {})  # None stands for a module that cannot be imported
        if 'main_config' in declared and os.path.isfile(os.path.join(folder, name + '.py')):
            del sys.modules[name]


def _folders(module: Any) -> List[str]:
    """Where a module's file, or a package's folders, lie."""
    places = list(getattr(module, '__path__', [])) or [getattr(module, '__file__', None) or '']
    return [os.path.dirname(place) for place in places]

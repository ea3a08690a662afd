"""LightZero's training entries: how they are run, what they need of the process, and values that they pass to no hook,
which are read from their stack frames."""
import contextlib
import os
import shutil
import sys
import traceback
from types import FrameType
from typing import Any, Dict, Iterator, Optional, Tuple

from ding.worker.learner.learner_hook import LearnerHook, register_learner_hook
from easydict import EasyDict

from ..config import ConfigError
from ..run_files import CONFIG_FILES, LOADED
from ..run_hooks import BEGIN_HOOK, PROGRESS_HOOK, SUMMARY_HOOK, RunHook
from .buffers import reanalyzed_in_arrays, targets_of_engine
from .patches import applied

UNBOUNDED = int(1e10)  # what LightZero's entries are given for no limit
ENTRY_PACKAGE = 'lzero.entry'  # a user's function is no entry, whatever its variables are called
Configs = Tuple[EasyDict, EasyDict]
"""``main_config`` and ``create_config``."""


def run_entry(entry: str, configs: Configs, **arguments: Any) -> Any:
    """Run an entry; returns the trained policy."""
    import lzero.entry
    with applied(reanalysis=reanalyzed_in_arrays, targets=targets_of_engine):
        return getattr(lzero.entry, entry)(list(configs), **arguments)


def check_wandb_login() -> None:
    """Refuse a training that would be asked for a login, where nobody can answer."""
    import wandb
    try:
        mode = wandb.setup().settings.mode  # type: ignore[union-attr]
    except ValueError as error:
        raise ConfigError(
            f"policy.use_wandb=True, and wandb refuses its settings (WANDB_MODE={os.environ.get('WANDB_MODE')!r}): set "
            'WANDB_MODE=online or offline') from error
    if mode == 'online' and not wandb.api.api_key:
        raise ConfigError('policy.use_wandb=True, and there is no login: run wandb login, or set WANDB_MODE=offline')


def rewards_of_entry() -> Dict[str, Any]:
    """The last and the best reward of the entry that trains; nothing before its first evaluation."""
    known = _locals_of(ENTRY_PACKAGE, 'evaluator', 'reward')
    episodes = known['reward'].get('eval_episode_return') if isinstance(known.get('reward'), dict) else None
    if episodes is None:
        return {}
    last = float(sum(episodes)) / len(episodes)
    return dict(last_reward=last, best_reward=max(last, getattr(known['evaluator'], '_max_episode_return', last)))


def entry_that_trains() -> Dict[str, Any]:
    """Limits and name of the entry that trains, and the file that has called it, if it is one."""
    names = 'max_env_step', 'max_train_iter'
    frame = _frame_of(ENTRY_PACKAGE, *names)
    if frame is None:
        return {}
    limits = {name: frame.f_locals[name] for name in names}
    caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ''
    return dict({name: limit if limit and limit < UNBOUNDED else None for name, limit in limits.items()},
                entry=frame.f_code.co_name, config=os.path.abspath(caller) if os.path.isfile(caller) else '')


def source_of_checkpoint() -> str:
    """The option and the path of the checkpoint that DI-engine's learner or an entry is loading; nothing where another
    caller loads one."""
    of_learner = _locals_of(LearnerHook.__module__, 'engine', 'path', 'state_dict')
    if of_learner:
        return f'{LOADED}={of_learner["path"]}'
    of_entry = _locals_of(ENTRY_PACKAGE, 'model_path', 'create_cfg')
    return f'model_path={of_entry["model_path"]}' if of_entry else ''


def check_checkpoint_of_entry() -> None:
    """Refuse a checkpoint that is not there, which LightZero's own entry would load when its environments have
    begun."""
    path = _locals_of(ENTRY_PACKAGE, 'model_path', 'create_cfg').get('model_path')
    if isinstance(path, str) and not os.path.isfile(path):
        raise ConfigError(f'model_path={path}: there is no such file')


@contextlib.contextmanager
def leaving_no_folder() -> Iterator[None]:
    """Where LightZero's own entry is refused before it trains, remove the folder that DI-engine has just made for its
    config, if it holds nothing else."""
    try:
        yield
    except ConfigError:
        folder = getattr(_locals_of(ENTRY_PACKAGE, 'cfg', 'create_cfg').get('cfg'), 'exp_name', None)
        if folder and os.path.isdir(folder) and set(os.listdir(folder)) <= CONFIG_FILES:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _locals_of(module: str, *names: str) -> Dict[str, Any]:
    """Local variables by their names, if :func:`_frame_of` finds them. LightZero hands them to no hook."""
    frame = _frame_of(module, *names)
    return {} if frame is None else {name: frame.f_locals.get(name) for name in names}


def _frame_of(module: str, *names: str) -> Optional[FrameType]:
    """The innermost frame of a module, or of a package's, whose function has these local variables."""
    for frame, _ in traceback.walk_stack(sys._getframe()):
        of_module = f'{frame.f_globals.get("__name__")}.'.startswith(f'{module}.')
        if of_module and set(names) <= set(frame.f_code.co_varnames):
            return frame
    return None


class EntryHook(RunHook):
    """A run of one of LightZero's entries."""
    entry_that_trains, rewards_of_entry = staticmethod(entry_that_trains), staticmethod(rewards_of_entry)


for hook in (BEGIN_HOOK, PROGRESS_HOOK, SUMMARY_HOOK):
    register_learner_hook(hook, EntryHook)

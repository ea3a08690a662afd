"""LightZero's training entries and what they are made of: configs completed, calls recorded, runs and evaluations."""
import contextlib
import functools
import inspect
import os
import sys
import traceback
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
from easydict import EasyDict

from ..config import ConfigError, nearest
from .lightzero import lightzero
from .patches import ENTRIES, applied

Configs = Tuple[EasyDict, EasyDict]
"""``main_config`` and ``create_config``."""


def completed(main_config: EasyDict, create_config: EasyDict) -> EasyDict:
    """A config with all defaults of its policy, environment and learner, as a run has it; nothing is changed."""
    from ding.config import compile_config
    from ding.utils import ENV_MANAGER_REGISTRY, ENV_REGISTRY, MODEL_REGISTRY, import_module
    for key, registry, asked in (('create_config.env.type', ENV_REGISTRY, create_config.env),
                                 ('create_config.env_manager.type', ENV_MANAGER_REGISTRY, create_config.env_manager),
                                 ('policy.model.type', MODEL_REGISTRY, main_config.policy.model)):
        modules = asked.get('import_names', [])
        import_module(modules)
        if 'type' in asked and asked.type not in registry:
            raise ConfigError(
                f'{key}={asked.type!r} is registered by none of its import_names={modules}; '
                f'{nearest(asked.type, registry)}'
            )
    return compile_config(main_config, env=None, auto=True, create_cfg=create_config, save_cfg=False)


def try_environment(main_config: EasyDict, create_config: EasyDict) -> None:
    """Build and reset one environment, so that what it lacks is found before a worker process needs it, and hold what
    it returns to the model."""
    from ding.envs import get_vec_env_setting
    cfg = completed(main_config, create_config)
    env_fn, collector_configs, _ = get_vec_env_setting(cfg.env)
    with _fault_named():
        env = env_fn(cfg=collector_configs[0])
        try:
            first = env.reset()
        finally:
            env.close()
    model, which = cfg.policy.model, f'the environment of env.env_id={cfg.env.get("env_id")!r}'
    mask, seen = (first.get(key) for key in ('action_mask', 'observation')) if isinstance(first, dict) else (None, None)
    if not model.continuous_action_space and mask is not None and len(mask) != model.action_space_size:
        raise ConfigError(
            f'policy.model.action_space_size={model.action_space_size} contradicts {which}: its action masks are of '
            f'{len(mask)} actions'
        )
    shape, frames = model.observation_shape, model.get('frame_stack_num', 1)
    if isinstance(seen, np.ndarray) and seen.size * frames != np.prod(shape):
        raise ConfigError(
            f'policy.model.observation_shape={shape!r} contradicts {which}, and env.observation_shape if it has one: '
            f'it observes {seen.shape}, and policy.model.frame_stack_num={frames}'
        )


def build_policy(main_config: EasyDict, create_config: EasyDict) -> Any:
    """The policy of a config as its collector has it: without environments, optimizer and target model."""
    from ding.policy import create_policy
    cfg = completed(main_config, create_config).policy
    cfg.multi_gpu = False  # one process alone
    with _fault_named():
        return create_policy(cfg, enable_field=list(lightzero.POLICY_FIELDS))


@contextlib.contextmanager
def _fault_named() -> Iterator[None]:
    """Where LightZero's own code fails, or an environment of its zoo, say so in one line, with file and line."""
    import lzero
    try:
        yield
    except (TypeError, AttributeError, NotImplementedError, ImportError) as error:
        missing = isinstance(error, ModuleNotFoundError) or isinstance(error.__context__, ModuleNotFoundError)
        last = traceback.extract_tb(error.__traceback__)[-1]
        if missing or not last.filename.startswith((lzero.__path__[0] + os.sep, zoo_folder() + os.sep)):
            raise
        said = f'{type(error).__name__}: {" ".join(str(error).split())}'
        raise ConfigError(f"LightZero's own {last.filename}:{last.lineno} fails: {said}") from error


def atari_actions(env_id: str) -> Optional[int]:
    """How many actions an Atari game has, None where LightZero does not list it."""
    try:
        from zoo.atari.config.atari_env_action_space_map import atari_env_action_space_map
    except ImportError:
        return None
    return dict(atari_env_action_space_map).get(env_id)


def zoo_folder() -> str:
    """Where LightZero's zoo is."""
    import zoo
    return list(zoo.__path__)[0]


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


# ---- calls that are recorded instead of run --------------------------------------------------------------------------


class _EntryCalled(BaseException):
    """Carries the arguments of a call to an entry out of the code that made it."""

    def __init__(self, entry: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        super().__init__(entry)
        self.entry, self.arguments = entry, (args, kwargs)


class _Silenced:
    """A stream that passes on what is written, but not what is written as a recorded call is handled."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if isinstance(sys.exc_info()[1], _EntryCalled) else self._stream.write(text)


def recorded_call(run: Callable[[], Any]) -> Optional[Dict[str, Any]]:
    """What the first call of an entry in ``run`` would have trained; None if there is none. Nothing is trained."""
    signatures = _signatures()
    with applied(entries=lambda code: _raise_call.__code__, ddp_config=lambda code: _as_it_is.__code__,
                 ddp_context=lambda method: lambda self, *args: None, stdout=_Silenced,
                 stderr=_Silenced):
        try:
            run()
        except _EntryCalled as call:
            args, kwargs = call.arguments
            arguments = signatures[call.entry].bind(*args, **kwargs).arguments
            main_config, create_config = arguments['input_cfg']
            given: Dict[str, Any] = {key: arguments[key] for key in ('seed', 'max_env_step') if key in arguments}
            return dict(given, main_config=main_config, create_config=create_config, entry=call.entry)
    return None


@functools.lru_cache(maxsize=None)
def _signatures() -> Dict[str, inspect.Signature]:
    """Those of the entries. Calls are recorded inside of others, when the entries have other code."""
    import lzero.entry
    return {name: inspect.signature(getattr(lzero.entry, name)) for name in ENTRIES}


def _raise_call(*args, **kwargs):  # type: ignore[no-untyped-def]
    # As the code of an entry this runs with the names of the entry's module.
    from lzero_kvcache.host.entries import _EntryCalled
    raise _EntryCalled(__name__.rpartition('.')[2], args, kwargs)


def _as_it_is(main_config: Any) -> Any:
    return main_config


# ---- running ---------------------------------------------------------------------------------------------------------


def run_entry(entry: str, configs: Configs, **arguments: Any) -> Any:
    """Run an entry; returns the trained policy."""
    import lzero.entry

    from .reanalysis import in_arrays
    from .targets import of_new_system
    with applied(reanalysis=in_arrays, targets=of_new_system):
        return getattr(lzero.entry, entry)(list(configs), **arguments)


def make_evaluator(configs: Configs, seed: int, derive: Callable[[type], type], load: Callable[[Any], None]) -> Any:
    """
    LightZero's evaluator alone, of a class that ``derive`` makes of LightZero's, with a policy that ``load`` has
    filled: LightZero's own entry for this refuses sampled UniZero.
    """
    from ding.config import compile_config
    from ding.envs import create_env_manager, get_vec_env_setting
    from ding.policy import create_policy
    from ding.utils import set_pkg_seed
    from lzero.worker import MuZeroEvaluator
    from torch.utils.tensorboard import SummaryWriter
    cfg = compile_config(
        configs[0], seed=seed, env=None, auto=True, create_cfg=configs[1], save_cfg=True, renew_dir=False
    )
    env_fn, _, env_configs = get_vec_env_setting(cfg.env, collect=False)
    env = create_env_manager(cfg.env.manager, [functools.partial(env_fn, cfg=config) for config in env_configs])
    env.seed(seed, dynamic_seed=False)
    set_pkg_seed(seed, use_cuda=cfg.policy.cuda)
    policy = create_policy(cfg.policy, enable_field=['learn', 'collect', 'eval'])
    load(policy.learn_mode)
    return derive(MuZeroEvaluator)(
        eval_freq=cfg.policy.eval_freq, n_evaluator_episode=cfg.env.n_evaluator_episode, stop_value=cfg.env.stop_value,
        env=env, policy=policy.eval_mode, tb_logger=SummaryWriter(os.path.join(cfg.exp_name, 'log', 'serial')),
        exp_name=cfg.exp_name, policy_config=cfg.policy,
    )


def join_gpus() -> None:
    """Meet the other processes of a multi-GPU training, one on each GPU."""
    from ding.utils import dist_init
    dist_init()


def sums_steps(collector: type) -> bool:
    """Whether LightZero's collector adds up the environment steps of all processes."""
    return 'allreduce_data' in collector.collect.__code__.co_names  # type: ignore[attr-defined]


def divide_among_ranks(main_config: EasyDict) -> None:
    """Divide batch, episodes and segments by the number of processes, in place."""
    from lzero.config.utils import lz_to_ddp_config
    lz_to_ddp_config(main_config)

"""Building a config's defaults, environment and policy with LightZero; and the contents of its zoo."""
import contextlib
import copy
import importlib.util
import os
import traceback
from typing import Any, Iterable, Iterator, Optional, Sequence, Tuple

import numpy as np
from easydict import EasyDict

from ..config import OPTIONS, ConfigError, check_dict, missing, names_of_modules, nearest
from . import root_level
from .lightzero import lightzero
from .states import faults_under

UNKNOWN_ENVIRONMENT = 'UnregisteredEnv', 'DeprecatedEnv'
"""Errors of gym and of gymnasium for an id of which they have no environment."""


def completed(main_config: EasyDict, create_config: EasyDict) -> EasyDict:
    """A config with all defaults of its policy, environment and learner, as a run has it; nothing is changed."""
    from ding.config import compile_config
    from ding.utils import ENV_MANAGER_REGISTRY, ENV_REGISTRY, MODEL_REGISTRY, import_module
    names_of_modules(create_config.policy.get('import_names', []), 'create_config.policy.import_names')
    for part in ('env', 'env_manager'):
        if 'type' not in create_config[part]:
            raise missing(f'create_config.{part}.type')
    for key, registry, asked in (('create_config.env.type', ENV_REGISTRY, create_config.env),
                                 ('create_config.env_manager.type', ENV_MANAGER_REGISTRY, create_config.env_manager),
                                 ('env.type', ENV_REGISTRY, main_config.env),  # these two would take their place
                                 ('env.manager.type', ENV_MANAGER_REGISTRY, main_config.env.get('manager', {})),
                                 ('policy.model.type', MODEL_REGISTRY, main_config.policy.model)):
        check_dict(asked, key[:-len('.type')])
        modules = names_of_modules(asked.get('import_names', []), key.replace('.type', '.import_names'))
        import_module(modules)
        if 'type' in asked and asked.type not in registry:
            raise ConfigError(
                f'{key}={asked.type!r} is registered by none of its import_names={modules}; '
                f'{nearest(asked.type, registry)}'
            )
    return compile_config(main_config, env=None, auto=True, create_cfg=create_config, save_cfg=False)


def fault_of_segments(error: BaseException) -> Optional[str]:
    """What is wrong where LightZero's buffer cannot sample: it counts more steps of a segment than that has, if these
    are fewer than a target value takes and the episode goes on after the next segment."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == '_sample_orig_data':
            cfg = frame.f_locals['self']._cfg
            least = cfg.num_unroll_steps + cfg.td_steps
            if cfg.game_segment_length < least:
                return (
                    f'policy.game_segment_length={cfg.game_segment_length} is too short, since an episode had more '
                    f'than twice as many steps: it must be at least policy.num_unroll_steps + policy.td_steps={least}'
                )
    return None


def try_environment(main_config: EasyDict, create_config: EasyDict) -> None:
    """Build and reset one environment, so that missing parts are found before a worker process needs them, and check
    its observations and masks against the model's sizes."""
    from ding.envs import get_vec_env_setting
    cfg = completed(main_config, create_config)
    env_fn, collector_configs, _ = get_vec_env_setting(cfg.env)
    env_id = f'env.env_id={cfg.env.get("env_id")!r}'
    model, which = cfg.policy.model, f'the environment of {env_id}'
    with _fault_named(), _unknown_named(env_id):
        env = env_fn(cfg=collector_configs[0])
        try:
            first = env.reset()
            if model.continuous_action_space:
                _try_action(env, model.action_space_size, which)
        finally:
            env.close()
    mask, seen = (first.get(key) for key in ('action_mask', 'observation')) if isinstance(first, dict) else (None, None)
    if not model.continuous_action_space and mask is not None and len(mask) != model.action_space_size:
        raise ConfigError(
            f'action_space_size={model.action_space_size} of policy.model and of its world_model_cfg contradicts '
            f'{which}: its action masks are of {len(mask)} actions, so both must be {len(mask)}'
        )
    shape, frames = model.observation_shape, model.get('frame_stack_num', 1)
    if isinstance(seen, np.ndarray) and seen.size * frames != np.prod(shape):
        raise ConfigError(
            f'policy.model.observation_shape={shape!r} contradicts {which}, and env.observation_shape if it has one: '
            f'it observes {seen.shape}, and policy.model.frame_stack_num={frames}'
        )


def _try_action(env: Any, size: int, which: str) -> None:
    """Refuse a number of continuous actions that is not the environment's, if the environment fails with it; some take
    more and read only their own."""
    shape = getattr(getattr(env, 'action_space', None), 'shape', None)
    if shape and np.prod(shape) != size:
        try:
            env.step(np.zeros(size, np.float32))
        except Exception as error:
            raise ConfigError(
                f'action_space_size={size} of policy.model and of its world_model_cfg contradicts {which}: its actions '
                f'have {np.prod(shape)} numbers, so both must be {np.prod(shape)}'
            ) from error


def build_policy(main_config: EasyDict, create_config: EasyDict,
                 fields: Sequence[str] = lightzero.POLICY_FIELDS) -> Any:
    """The policy of a config on the CPU; as its collector has it, without optimizer and target model, or with more of
    its fields. The config is not changed."""
    from ding.policy import create_policy
    main_config = copy.deepcopy(main_config)
    world_model_cfg = main_config.policy.model.world_model_cfg
    world_model_cfg.device = main_config.policy.device = 'cpu'
    main_config.policy.cuda = False
    if isinstance(world_model_cfg.get(OPTIONS), dict):
        world_model_cfg[OPTIONS].pop('matmul', None)  # of a GPU
    cfg = completed(main_config, create_config).policy
    cfg.multi_gpu = cfg.use_wandb = False  # one process alone, which has no run
    with _fault_named():
        return create_policy(cfg, enable_field=list(fields))


def try_policy(main_config: EasyDict, create_config: EasyDict, states: Iterable[Tuple[str, Any]] = ()) -> None:
    """Build the policy of a training, and load states of checkpoints into it, each with the option and the path that it
    came by, so that what is refused of them is found before anything of the run is there."""
    with root_level.kept():
        policy = build_policy(main_config, create_config, ('learn', 'collect', 'eval'))
    for source, state in states:
        with faults_under(source):
            policy.learn_mode.load_state_dict(state)


@contextlib.contextmanager
def _fault_named() -> Iterator[None]:
    """Where LightZero's own code fails, or an environment of its zoo, say so in one line, with file and line."""
    import lzero
    try:
        yield
    except (TypeError, ValueError, AttributeError, NotImplementedError, ImportError) as error:
        missing = isinstance(error, ModuleNotFoundError) or isinstance(error.__context__, ModuleNotFoundError)
        last = traceback.extract_tb(error.__traceback__)[-1]
        if missing or not last.filename.startswith((lzero.__path__[0] + os.sep, zoo_folder() + os.sep)):
            raise
        said = f'{type(error).__name__}: {" ".join(str(error).split())}'
        raise ConfigError(f"LightZero's own {last.filename}:{last.lineno} fails: {said}") from error


@contextlib.contextmanager
def _unknown_named(env_id: str) -> Iterator[None]:
    """Where gym has no environment of an id, say so under its key."""
    try:
        yield
    except Exception as error:
        if not any(kind.__name__ in UNKNOWN_ENVIRONMENT for kind in type(error).__mro__):
            raise
        raise ConfigError(f'{env_id}: {" ".join(str(error).split())}') from error


def is_algorithm(name: Any) -> bool:
    """Whether LightZero has a policy of this name, of any algorithm."""
    return str(name).isidentifier() and importlib.util.find_spec(f'lzero.policy.{name}') is not None


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

"""The plan of a run: a config file with the user's changes, checked before anything is started."""
import os
import re
from dataclasses import replace
from typing import Any, Optional

import torch
from easydict import EasyDict

from lzero_kvcache_options import TrainOptions, UsageError

from ..config import LIGHTZERO, PREFIX, ConfigError, picked_system
from ..host import building
from ..loading import check_config, disable, enable, load_plugin, policy_type
from ..run_files import EVALUATE, TRAIN
from .checkpoints import CHECKPOINTS
from .config_file import Plan, load_config
from .limits import check
from .linked_keys import replace_token
from .overrides import CompleteConfig, apply_overrides


def make_plan(config: str, **asked: Any) -> Plan:
    """Load a config file and change it as asked, by fields of ``TrainOptions``, as ``max_env_step=300``."""
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(f'config={config!r} must be a path, or the name of a config')
    try:
        options = TrainOptions(os.fspath(config), **asked)
    except UsageError as error:
        raise ConfigError(str(error)) from None
    return plan_of(options)


def plan_of(asked: TrainOptions) -> Plan:
    """Load the config that the options name, apply the options to it, and check it."""
    plan = load_config(asked.config)
    main_config, create_config = plan.main_config, plan.create_config
    load_plugin(create_config)
    if asked.cache:
        set_cache(asked.cache, main_config, create_config)
    stem = os.path.splitext(os.path.basename(plan.config))[0]
    main_config.exp_name = str(main_config.get('exp_name') or f'data_unizero/{stem}')
    if asked.overrides:
        changed = apply_overrides(
            main_config, create_config, asked.overrides, building.completed(main_config, create_config))
        if 'seed' in changed:  # LightZero's entries take it as an argument
            raise ConfigError(
                f'--set seed={changed["seed"]}: give --seed {changed["seed"]} in its place (an experiment: --seeds)')
        policy_type(main_config, create_config)
    name = main_config.exp_name if asked.exp_name is None else asked.exp_name
    if not isinstance(name, str) or not name:
        raise ConfigError(f'exp_name={name!r} names no folder for the experiment')
    picked = picked_system(main_config.policy.model.world_model_cfg)
    if asked.cache and picked != asked.cache:
        raise ConfigError(f'--cache {asked.cache} contradicts --set, which picks {picked!r}: give one of them')
    set_device(asked.device, main_config)
    seed = plan.seed if asked.seed is None else asked.seed
    if seed >= 2 ** 32:
        raise ConfigError(f'seed={seed} must be below 2**32, as numpy needs')
    if asked.in_place:
        main_config.exp_name = _folder_of(asked.resume, asked.exp_name)
    elif asked.exp_name:
        main_config.exp_name = asked.exp_name
    elif asked.evaluate:
        main_config.exp_name += '_eval'
    else:
        main_config.exp_name = replace_token(main_config.exp_name, 'seed', plan.seed, seed)
    values = CompleteConfig(plan, asked.overrides)
    if values.get('policy.async_pipeline.enabled'):
        raise ConfigError(
            f'policy.async_pipeline.enabled=True, but {plan.entry} collects in this process: call '
            'train_unizero_segment_async, which needs ray, in a script of your own, or set it to False'
        )
    check(values, picked)
    check_config(main_config, create_config)
    return replace(
        plan, seed=seed, max_env_step=asked.max_env_step or plan.max_env_step,
        max_train_iter=asked.max_train_iter or plan.max_train_iter, threads=asked.threads or plan.threads,
        task=EVALUATE if asked.evaluate else TRAIN, checkpoint=asked.evaluate or asked.resume, in_place=asked.in_place,
        keep_checkpoints=asked.keep_checkpoints, overrides=asked.overrides)


def set_cache(cache: str, main_config: EasyDict, create_config: EasyDict) -> None:
    """Pick 'old', LightZero's own new manager or 'new', and change a name of the experiment that says another."""
    was = picked_system(main_config.policy.model.world_model_cfg)
    if cache == 'old':
        disable(main_config, create_config)
    elif LIGHTZERO in (cache, was):
        enable(main_config, create_config, type=cache)
    else:  # a user's manager stays
        enable(main_config, create_config)
    name = main_config.get('exp_name')
    if isinstance(name, str) and was != cache:
        main_config.exp_name = re.sub(rf'(?<![A-Za-z0-9]){was}(?![A-Za-z0-9])', cache, name)


def set_device(device: Optional[str], main_config: EasyDict) -> None:
    """Write 'auto', 'cpu', 'cuda', or for None what the config says, into all places that LightZero reads it from."""
    world_model = main_config.policy.model.world_model_cfg
    has_gpu = torch.cuda.is_available()
    if device == 'cuda' and not has_gpu:
        raise ConfigError('--device cuda: torch finds no GPU here; use --device cpu, or auto')
    if device is None:
        device = str(world_model.get('device', 'auto'))
    if device != 'auto':
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"{PREFIX}.device={device!r} is none of torch's: use cpu, cuda or auto") from error
    if device == 'auto' or not has_gpu:
        device = 'cuda' if has_gpu else 'cpu'
    world_model.device = main_config.policy.device = device
    main_config.policy.cuda = device.startswith('cuda')


def _folder_of(resume: Optional[str], exp_name: Optional[str]) -> str:
    """The folder of the experiment that wrote a checkpoint."""
    if not resume or exp_name:
        raise ConfigError('--in-place goes on where --resume was; give that, and no --exp-name')
    folder, ckpt = os.path.split(os.path.dirname(os.path.abspath(resume)))
    if ckpt != CHECKPOINTS:
        raise ConfigError(f'--in-place: {resume} is in no folder {CHECKPOINTS} of an experiment')
    return folder

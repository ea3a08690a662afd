"""Installed versions, available configs, and the memory that the cache of a config will take. Allocates nothing."""
import copy
import os
import platform
import re
from typing import Any, Callable, Dict, Optional

import torch
from easydict import EasyDict

from lzero_kvcache_options import lightzero_configs, our_configs

from .config import KV_CACHE_CFG, LIGHTZERO, MIB, OPTIONS, ConfigError, unread_options
from .engine.backends import picked
from .host import building
from .host.lightzero import lightzero
from .loading import check_config, enable
from .summary import version_of
from .training.config_file import Plan, look_beside
from .training.error_hints import hinted
from .training.limits import check_limits
from .training.overrides import CompleteConfig
from .training.plan import make_plan, set_cache
from .training.terminal import TableRows


def installed() -> TableRows:
    """Versions, and the device of runs."""
    device, named = 'cpu', f'{os.cpu_count()} processors'
    if torch.cuda.is_available():
        device, named = 'cuda', torch.cuda.get_device_name()
    return [
        ('lzero_kvcache', version_of('lzero_kvcache')),
        ('python', platform.python_version()),
        ('torch', torch.__version__),
        ('LightZero', f"{version_of('LightZero')}, {lightzero.NAME}: {lightzero.SIGN}"),
        ('served of it', lightzero.SERVED),
        ('DI-engine', version_of('DI-engine')),
        ('device', f'{device}, {named}'),
        ("backend 'auto'", picked('auto', torch.device(device))),
    ]


def of_plan(plan: Plan) -> Dict[str, TableRows]:
    """A plan's cache: its system, sizes, memory and options. Changes the plan's config."""
    look_beside(plan.config)
    configs = plan.main_config, plan.create_config
    device = str(plan.main_config.policy.model.world_model_cfg.device)
    options = check_config(*configs)
    policy = building.build_policy(*configs)
    model, evaluated = policy._model.world_model, policy._cfg.evaluator_env_num
    manager, sizes = model.kv_cache_manager, model.hyperparameters
    systems = {'old': 'old', LIGHTZERO: "LightZero's own new manager"}
    rows = [
        ('policy', str(plan.create_config.policy.type)),
        ('device', device),
        ('cache system', systems.get(options.system, f'new, with manager {options.type!r}')),
        ('init pools', f'{sizes["env_num"]} x {sizes["init_pool_size"]} contexts'),
        ('recurrent pool', f'{sizes["recurrent_pool_size"]:,} contexts'),
        ('working batch', f'{sizes["env_num"]} contexts'),
        ('context', f'{sizes["context_length"]} tokens'),
        ('memory now', f'{manager.counters()["memory_mb"]:,.2f} MiB'),
    ]
    if options.system != 'new':
        rows.append(('memory at the most', _at_most(manager)))
        if options.system == 'old':
            with_flag = copy.deepcopy(configs)
            refused = _fault_of(enable, *with_flag) or _fault_of(building.build_policy, *with_flag)
            rows += [('with the flag on', f'refused: {refused}')] if refused else []
        unread = unread_options(plan.main_config.policy.model.world_model_cfg)
        rows += [('not read', unread)] if unread else []
        return {'cache': rows}
    pages, page_bytes = manager.page_capacity, model.inference.shared.store.page_bytes
    rows += [
        ('search', _search(options.search, model.why_not_in_arrays(), device)),
        ('backend', picked(options.backend, torch.device(device))),
        ('init pools of evaluation', f'{evaluated} x {options.init_pool_size} contexts'),
        ('newest roots', f'{options.env_num} + {evaluated} contexts'),
        ('pages', f'{pages:,} of {page_bytes:,} bytes, {options.dtype}'),
        ('pages of a context', f'{manager.context_pages} at the most'),
        ('memory of pages', f'{pages * page_bytes / MIB:,.2f} MiB, beside what searches work in'),
        ('memory of the old system', _of_the_old_system(plan)),
    ]
    read = [(key, repr(getattr(options, key)), option.meaning) for key, option in KV_CACHE_CFG.items()]
    return {'cache': rows, OPTIONS: read}


def _of_the_old_system(plan: Plan) -> str:
    configs = plan.main_config, plan.create_config
    set_cache('old', *configs)
    try:
        check_limits(CompleteConfig(plan))
        return _at_most(building.build_policy(*configs)._model.world_model.kv_cache_manager)
    except ConfigError as error:
        return f'refused: {error}'


def _at_most(old: Any) -> str:
    return f'{old.full_memory_mb:,.2f} MiB, once every slot was used'


def _search(name: str, missing: Optional[str], device: str) -> str:
    """Where the search trees are, and why."""
    if name == 'tree':
        return "in LightZero's tree, as asked for"
    if device != 'cpu':  # where this model is not
        return f'in arrays on {device} where Triton runs'
    return 'in arrays, one compiled call' if missing is None else f"in LightZero's tree: {missing}"


def of_zoo() -> TableRows:
    """Our configs and LightZero's for UniZero: which extra each needs, and what is missing here."""
    rows = []
    ours = our_configs()
    extras: Dict[str, Optional[str]] = {}  # by environment
    tried: Dict[Any, Optional[ConfigError]] = {}
    for name, path in {**ours, **lightzero_configs()}.items():
        extra = _extra(ours.get(name.rpartition(':')[2]))  # LightZero's configs need what ours of the same name do
        try:
            with hinted():
                plan = make_plan(path)
                environment = plan.create_config.env.type
                extra = extra or extras.get(environment)  # or what ours of the same environment do
                extras[environment] = extra
                building.try_environment(plan.main_config, plan.create_config)
                # A model of each kind is built once, since LightZero may fail in it.
                model = plan.main_config.policy.model.world_model_cfg
                kind = plan.create_config.policy.type, model.get('obs_type'), model.get('continuous_action_space')
                if kind not in tried:
                    tried[kind] = _fault_of(building.build_policy, plan.main_config, plan.create_config)
            rows.append((name, f'{extra or "unknown"}: {tried[kind] or "installed"}'))
        except ConfigError as error:
            rows.append((name, f'{extra or "unknown"}: {error}'))
    return rows


def _fault_of(use: Callable[..., Any], main_config: EasyDict, create_config: EasyDict) -> Optional[ConfigError]:
    """Why a config cannot be used; None if it can."""
    try:
        use(main_config, create_config)
    except ConfigError as error:
        return error
    return None


def _extra(path: Optional[str]) -> Optional[str]:
    """Which extra of this package a config of ours asks for; the file is not run. None where there is no config."""
    if path is None:
        return None
    with open(path, encoding='utf-8') as file:
        needed = re.search(r'^Install: .*\[(\w+)\]', file.read(), re.MULTILINE)
    return f'extra {needed[1]}' if needed else 'no extra'

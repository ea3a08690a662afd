"""Switching a LightZero config between the two systems, and checking it before anything starts."""
import contextlib
import copy
from typing import Any, List

from ding.utils import POLICY_REGISTRY, deep_merge_dicts, import_module
from easydict import EasyDict

from .config import FLAG, OPTIONS, PREFIX, CacheConfig, ConfigError, check_dict, names_of_modules, nearest, settle
from .host import building, policies
from .host.lightzero import lightzero
from .host.refused import check_draws, check_policy

PLUGIN = 'lzero_kvcache'


def enable(main_config: EasyDict, create_config: EasyDict, **kv_cache_cfg: Any) -> None:
    """
    Overview:
        Make a LightZero UniZero config use the new cache: sets the flag and adds the import name, in place.
    Arguments:
        - main_config (:obj:`EasyDict`): LightZero's ``main_config``.
        - create_config (:obj:`EasyDict`): LightZero's ``create_config``.
        - kv_cache_cfg (:obj:`Any`): Options of ``world_model_cfg.kv_cache_cfg``; those not named stay as they are.
    Raises:
        - ConfigError: An option is wrong, or a config is none of UniZero; the configs are then as they were.
    """
    _check_shape(main_config, create_config)
    trial_main, trial_create = copy.deepcopy(main_config), copy.deepcopy(create_config)
    _switch(trial_main, trial_create, True, kv_cache_cfg)
    check_config(trial_main, trial_create)
    _switch(main_config, create_config, True, kv_cache_cfg)


def disable(main_config: EasyDict, create_config: EasyDict) -> None:
    """
    Overview:
        Make a config use LightZero's own caching again: turns the flag off, in place. The plugin stays loaded, so
        that both systems write the same tensorboard tags.
    Arguments:
        - main_config (:obj:`EasyDict`): LightZero's ``main_config``.
        - create_config (:obj:`EasyDict`): LightZero's ``create_config``.
    Raises:
        - ConfigError: A config has no policy, or something else where LightZero's configs have a dict, or names.
    """
    _check_shape(main_config, create_config)
    _switch(main_config, create_config, False, {})


def check_config(main_config: EasyDict, create_config: EasyDict) -> CacheConfig:
    """
    Overview:
        Validate a config before anything starts; it is not changed. What its policy imports is imported.
    Arguments:
        - main_config (:obj:`EasyDict`): LightZero's ``main_config``.
        - create_config (:obj:`EasyDict`): LightZero's ``create_config``.
    Returns:
        - config (:obj:`CacheConfig`): The caching options as they will be read.
    Raises:
        - ConfigError: The message is one line that says which key to change to what.
    """
    _check_shape(main_config, create_config)
    main_config, create_config = EasyDict(copy.deepcopy(main_config)), EasyDict(copy.deepcopy(create_config))
    name = policy_type(main_config, create_config)
    with contextlib.suppress(ImportError):  # a module that is missing is reported where it is needed
        import_module(import_names(create_config))  # these register a user's policy
    policy = POLICY_REGISTRY.get(name)
    merged = deep_merge_dicts(policy.default_config(), main_config.policy)
    config = settle(merged, lightzero.simulations_of(merged))
    check_policy(merged, config.system)
    if config.system == 'new':
        if name == 'sampled_unizero':
            check_draws(merged)
        if not issubclass(policy, policies.KVCachePolicy):
            raise ConfigError(
                f'{PREFIX}.{FLAG}=True, but {policy.__module__}.{policy.__qualname__}, which is registered as '
                f'{name!r}, is no policy of lzero_kvcache: derive it from lzero_kvcache.host.policies.UniZeroPolicy '
                'or SampledUniZeroPolicy'
            )
    return config


def policy_type(main_config: EasyDict, create_config: EasyDict) -> str:
    """The name of a config's policy; one that is not served is refused. DI-engine takes the one of ``main_config``, if
    it has one, and LightZero's entries the other."""
    name = create_config['policy'].get('type')
    if name not in lightzero.POLICIES:
        served = nearest(str(name), lightzero.POLICIES)
        if building.is_algorithm(name):  # another one, and not a misspelt name
            served = f'served are {", ".join(map(repr, lightzero.POLICIES))}'
        raise ConfigError(f'create_config.policy.type={name!r} is not a UniZero policy: {served}')
    of_main = main_config['policy'].get('type', name)
    if of_main != name:
        raise ConfigError(
            f'policy.type={of_main!r} contradicts create_config.policy.type={name!r}: leave it out, and set the latter'
        )
    return name


def import_names(create_config: EasyDict) -> List[str]:
    """The modules that DI-engine imports for a config's policy."""
    return names_of_modules(create_config['policy'].get('import_names') or [], 'create_config.policy.import_names')


def load_plugin(create_config: EasyDict) -> None:
    """Add this package to what DI-engine imports, so that flag and statistics work in any LightZero config."""
    names = import_names(create_config)
    create_config['policy']['import_names'] = names if PLUGIN in names else [*names, PLUGIN]


def _switch(main_config: EasyDict, create_config: EasyDict, flag: bool, options: Any) -> None:
    load_plugin(create_config)
    model = main_config['policy'].setdefault('model', EasyDict())
    world_model_cfg = model.setdefault('world_model_cfg', EasyDict())
    world_model_cfg[FLAG] = flag
    held = world_model_cfg.get(OPTIONS)
    if options and (held is None or isinstance(held, dict)):  # anything else is refused when it is read
        world_model_cfg[OPTIONS] = EasyDict({**(held or {}), **options})


def _check_shape(main_config: Any, create_config: Any) -> None:
    """Refuse configs without the dicts that are changed and read here. LightZero completes what a model lacks."""
    for name, config in (('main_config', main_config), ('create_config', create_config)):
        check_dict(config, name)
        check_dict(config.get('policy'), f'{name}.policy')
    model = main_config['policy'].get('model', {})
    check_dict(model, 'main_config.policy.model')
    check_dict(model.get('world_model_cfg', {}), 'main_config.policy.model.world_model_cfg')

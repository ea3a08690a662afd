"""What a user may write into ``world_model_cfg`` about caching, its defaults, and its validation.

Knows configuration only: no tensors, no pools. Every error names the key, the value and what would be right.
"""
import difflib
import math
import numbers
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Optional

FLAG = 'use_new_cache_manager'
SIZES = ('game_segment_length', 'num_simulations', 'env_num')
OPTIONS = 'kv_cache_cfg'
PREFIX = 'policy.model.world_model_cfg'

EVICTIONS = ('fifo', 'lru', 'priority')
DTYPES = ('float32', 'bfloat16', 'float16')
ON_NAN = ('raise', 'skip')
BACKENDS = ('auto', 'eager', 'cudagraph')
VALIDATIONS = ('off', 'legacy', 'exact')
VALIDATION_ACTIONS = ('warn', 'raise')

# What LightZero's own code assumes where the key is absent.
DEFAULT_NUM_SIMULATIONS = 50
DEFAULT_ENV_NUM = 8


class ConfigError(ValueError):
    """
    Overview:
        A configuration that cannot be run; the message is one line that says which key to change to what.
    """


def lookup(cfg: Any, key: str, default: Any = None) -> Any:
    """
    Overview:
        Read ``key`` from a dict-like or attribute-like config.
    Arguments:
        - cfg (:obj:`Any`): A dict, an EasyDict or any object with attributes.
        - key (:obj:`str`): The name to read.
        - default (:obj:`Any`): What to return where it is absent.
    Returns:
        - value (:obj:`Any`): The value, or ``default``.
    """
    if isinstance(cfg, dict):
        return cfg.get(key, default)
    return getattr(cfg, key, default)


def nearest(name: str, valid: Iterable[str]) -> str:
    """
    Overview:
        A hint for an unknown name: the nearest valid one if there is one, else all valid ones.
    Arguments:
        - name (:obj:`str`): The name that was given.
        - valid (:obj:`Iterable[str]`): The names that would have been right.
    Returns:
        - hint (:obj:`str`): The end of an error message.
    """
    names = list(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f'did you mean {close[0]!r}?' if close else f'valid are {", ".join(map(repr, names))}'


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f'{PREFIX}.{key}={value!r} must be True or False')
    return value


def _positive_int(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f'{PREFIX}.{key}={value!r} must be a whole number of at least 1')
    if value < 1:
        raise ConfigError(f'{PREFIX}.{key}={value!r} must be at least 1')
    return int(value)


def _choice(value: Any, key: str, valid: Iterable[str]) -> str:
    if not isinstance(value, str) or value not in valid:
        raise ConfigError(f'{PREFIX}.{key}={value!r} is unknown: {nearest(value, valid)}')
    return value


def _backend(value: Any, key: str) -> str:
    if isinstance(value, str) and value == 'compile':
        raise ConfigError(f"{PREFIX}.{key}='compile' was removed: use 'auto'")
    return _choice(value, key, BACKENDS)


def _positive_number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ConfigError(f'{PREFIX}.{key}={value!r} must be a number above 0')
    return float(value)


@dataclass(frozen=True)
class CacheConfig:
    """
    Overview:
        The caching options of one world model, read once from its ``world_model_cfg`` and validated.
    Arguments:
        - use_new (:obj:`bool`): ``use_new_cache_manager``, the switch.
        - type (:obj:`str`): Name of the manager in ``KV_CACHE_REGISTRY``; what the flag picks when it is True.
        - eviction (:obj:`str`): 'fifo', 'lru' or 'priority'.
        - env_num (:obj:`int`): Environments that are collected or evaluated at once.
        - num_simulations (:obj:`int`): Simulations of one search.
        - init_pool_size (:obj:`int`): Root contexts kept for each environment.
        - recurrent_pool_size (:obj:`int`): Node contexts kept for one search, over all environments.
        - enable_stats (:obj:`bool`): Whether hits, misses and evictions are counted.
        - dtype (:obj:`str`): Storage type of keys and values: 'float32', 'bfloat16' or 'float16'.
        - max_memory_mb (:obj:`Optional[float]`): Upper bound of the page storage in MiB; None for no bound.
        - backend (:obj:`str`): How a recurrent step is launched: 'auto', 'eager' or 'cudagraph'.
        - on_nan (:obj:`str`): What a prediction with nan or inf does: 'raise' an error, or 'skip' storing its context.
        - validation (:obj:`str`): Whether searches are replayed by LightZero's own code: 'off', 'legacy' or 'exact'.
        - validation_freq (:obj:`int`): Every how many searches one is replayed.
        - validation_tol (:obj:`float`): The relative difference from which on a row counts as another.
        - validation_action (:obj:`str`): What such a row does: 'warn' in the log, or 'raise' an error.
    """
    use_new: bool
    type: str
    eviction: str
    env_num: int
    num_simulations: int
    init_pool_size: int
    recurrent_pool_size: int
    enable_stats: bool
    dtype: str
    max_memory_mb: Optional[float]
    backend: str
    on_nan: str
    validation: str
    validation_freq: int
    validation_tol: float
    validation_action: str

    @classmethod
    def read(cls, world_model_cfg: Any, managers: Optional[Iterable[str]] = None) -> 'CacheConfig':
        """
        Overview:
            Read and validate everything about caching in a ``world_model_cfg``, whichever way the flag stands.
        Arguments:
            - world_model_cfg (:obj:`Any`): The config, dict-like or with attributes.
            - managers (:obj:`Optional[Iterable[str]]`): Registered manager names, to check ``type`` against.
        Returns:
            - config (:obj:`CacheConfig`): The options with their defaults filled in.
        Raises:
            - ConfigError: An unknown key or strategy, a wrong type, a size below 1 or a contradiction.
        """
        _refuse_misspelt_keys(world_model_cfg)
        use_new = _flag(lookup(world_model_cfg, FLAG, False), FLAG)
        options = lookup(world_model_cfg, OPTIONS, None)
        options = {} if options is None else options
        if not isinstance(options, dict):
            raise ConfigError(f'{PREFIX}.{OPTIONS}={options!r} must be a dict of {", ".join(KV_CACHE_CFG)}')
        for key, value in options.items():
            if key not in KV_CACHE_CFG:
                raise ConfigError(f'{PREFIX}.{OPTIONS}.{key}={value!r} is unknown: {nearest(key, KV_CACHE_CFG)}')
        given = {key: value for key, value in options.items() if value is not None}

        def option(key: str, default: Any, check: Any, *args: Any) -> Any:
            return check(given[key], f'{OPTIONS}.{key}', *args) if key in given else default

        def size(key: str, default: int) -> int:
            value = lookup(world_model_cfg, key)
            return default if value is None else _positive_int(value, key)

        num_simulations = size('num_simulations', DEFAULT_NUM_SIMULATIONS)
        env_num = size('env_num', DEFAULT_ENV_NUM)
        roots = size('game_segment_length', max(256, 2 * num_simulations))
        kind = option('type', 'new', _choice, _registered(managers, given))
        if use_new and kind == 'old':
            raise ConfigError(
                f"{PREFIX}.{OPTIONS}.type='old' contradicts {FLAG}=True: set {FLAG}=False for the old system"
            )
        if use_new:
            _check_context_length(world_model_cfg)
        validation = option('validation', 'off', _choice, VALIDATIONS)
        return cls(
            use_new=use_new,
            type=kind,
            eviction=option('eviction', 'fifo', _choice, EVICTIONS),
            env_num=env_num,
            num_simulations=num_simulations,
            init_pool_size=option('init_pool_size', roots, _positive_int),
            recurrent_pool_size=option('recurrent_pool_size', num_simulations * env_num, _positive_int),
            enable_stats=option('enable_stats', True, _flag),
            dtype=option('dtype', 'float32', _choice, DTYPES),
            max_memory_mb=option('max_memory_mb', None, _positive_number),
            backend=option('backend', 'auto', _backend),
            on_nan=option('on_nan', 'raise', _choice, ON_NAN),
            validation=validation if use_new else 'off',  # switching back takes the flag alone
            validation_freq=option('validation_freq', 100, _positive_int),
            validation_tol=option('validation_tol', 1e-3, _positive_number),
            validation_action=option('validation_action', 'warn', _choice, VALIDATION_ACTIONS),
        )


# Every key of ``kv_cache_cfg`` with its meaning; README's table of options is tested against it.
KV_CACHE_CFG: Dict[str, str] = {
    'type': 'manager registered in KV_CACHE_REGISTRY that the flag picks',
    'eviction': "'fifo', 'lru' or 'priority'",
    'init_pool_size': 'root contexts kept per environment',
    'recurrent_pool_size': 'node contexts kept during one search',
    'enable_stats': 'count hits, misses and evictions',
    'dtype': "storage of keys and values: 'float32', 'bfloat16' or 'float16'",
    'max_memory_mb': 'upper bound of the page storage, in MiB',
    'backend': "how a recurrent step is launched: 'auto', 'eager' or 'cudagraph'",
    'on_nan': "what a prediction with nan or inf does: 'raise' an error or 'skip' storing its context",
    'validation': "replay searches by LightZero's own code: 'off', 'legacy' (as it is) or 'exact' (as it should be)",
    'validation_freq': 'every how many searches one is replayed',
    'validation_tol': 'the relative difference from which on a row counts as another',
    'validation_action': "what such a row does: 'warn' in the log or 'raise' an error",
}


def _registered(managers: Optional[Iterable[str]], given: Dict[str, Any]) -> Iterable[str]:
    if managers is not None:
        return sorted(managers)
    return ['new', 'old'] + [name for name in [given.get('type')] if isinstance(name, str)]


def _refuse_misspelt_keys(world_model_cfg: Any) -> None:
    keys = world_model_cfg.keys() if isinstance(world_model_cfg, dict) else vars(world_model_cfg)
    for key in keys:
        if key in (FLAG, OPTIONS) or not isinstance(key, str):
            continue
        close = difflib.get_close_matches(key, (FLAG, OPTIONS), n=1, cutoff=0.75)
        if key not in SIZES:
            close = close or difflib.get_close_matches(key, SIZES, n=1, cutoff=0.85)
        if close:
            value = lookup(world_model_cfg, key)
            raise ConfigError(f'{PREFIX}.{key}={value!r} is unknown: did you mean {close[0]!r}?')


def _check_context_length(world_model_cfg: Any) -> None:
    length = lookup(world_model_cfg, 'context_length')
    if length is None:  # a manager used by hand has no transformer
        return
    length = _positive_int(length, 'context_length')
    if length < 4 or length % 2:
        raise ConfigError(
            f'{PREFIX}.context_length={length} must be even and at least 4 with {FLAG}=True: '
            f'try {max(4, length + length % 2)}, or {FLAG}=False for the old system'
        )
    max_tokens = lookup(world_model_cfg, 'max_tokens')
    if isinstance(max_tokens, numbers.Integral) and length > max_tokens:
        raise ConfigError(f'{PREFIX}.context_length={length} must not exceed max_tokens={max_tokens}')


def settle(policy_cfg: Any, managers: Optional[Iterable[str]] = None) -> CacheConfig:
    """
    Overview:
        Validate what a policy config says about caching. In new mode, fill in the sizes that its ``world_model_cfg``
        lacks from the policy's own, and refuse those that would make a pool too small.
    Arguments:
        - policy_cfg (:obj:`Any`): A policy config, merged with its policy's defaults; changed in place.
        - managers (:obj:`Optional[Iterable[str]]`): Registered manager names.
    Returns:
        - config (:obj:`CacheConfig`): What the world model will read.
    Raises:
        - ConfigError: A key is unknown, has a wrong value or contradicts another.
    """
    if not policy_cfg['mcts_ctree']:
        raise ConfigError('policy.mcts_ctree=False cannot work: LightZero has no Python search for UniZero; set True')
    if policy_cfg['random_collect_episode_num'] > 0:
        raise ConfigError(
            f'policy.random_collect_episode_num={policy_cfg["random_collect_episode_num"]} cannot work: '
            'LightZero has no random policy for UniZero; set it to 0'
        )
    world_model_cfg = policy_cfg['model']['world_model_cfg']
    options = CacheConfig.read(world_model_cfg, managers)
    if not options.use_new:
        # LightZero's own default, which our policies leave out to see whether a user gave it.
        world_model_cfg.setdefault('env_num', DEFAULT_ENV_NUM)
        return options
    env_num = max(policy_cfg['collector_env_num'], policy_cfg['evaluator_env_num'])
    needed = {'env_num': env_num, 'num_simulations': policy_cfg['num_simulations']}
    sources = {'env_num': 'collector_env_num and policy.evaluator_env_num', 'num_simulations': 'num_simulations'}
    for key, least in needed.items():
        given = world_model_cfg.get(key)
        if given is None:
            world_model_cfg[key] = least
        elif given < least:
            raise ConfigError(
                f'{PREFIX}.{key}={given} is too small for policy.{sources[key]}: it must be at least {least}'
            )
    world_model_cfg['evaluator_env_num'] = policy_cfg['evaluator_env_num']
    options = CacheConfig.read(world_model_cfg, managers)
    nodes = env_num * policy_cfg['num_simulations']
    if options.recurrent_pool_size < nodes:
        raise ConfigError(
            f'{PREFIX}.{OPTIONS}.recurrent_pool_size={options.recurrent_pool_size} is too small for one search of '
            f'{env_num} environments: it must be at least {nodes}'
        )
    return options

"""The caching options of a ``world_model_cfg``, their defaults, and their validation.

A policy reads it once and hands it down, see :func:`handed_down`. Knows configuration only: no tensors, no pools.
Every error names the key, the value and what would be right.
"""
import copy
import difflib
import math
import numbers
import reprlib
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

from ding.utils.registry import Registry

FLAG = 'use_new_cache_manager'
SIZES = ('game_segment_length', 'num_simulations', 'env_num')
OPTIONS = 'kv_cache_cfg'
HANDED_DOWN = 'cache_config'
"""Attribute of a ``world_model_cfg`` that carries its :class:`CacheConfig` from the policy to model and manager."""
PREFIX = 'policy.model.world_model_cfg'
LIGHTZERO = 'lightzero'
"""``kv_cache_cfg.type`` of the manager that LightZero's main branch has of its own."""
MIB = 1024 * 1024

KV_CACHE_REGISTRY = Registry()
"""Cache managers by the name that ``world_model_cfg.kv_cache_cfg.type`` picks."""

# What LightZero's own code assumes where the key is absent.
DEFAULT_NUM_SIMULATIONS = 50
DEFAULT_ENV_NUM = 8
DEFAULT_EVALUATOR_ENV_NUM = 1
DEFAULT_CONTEXT_LENGTH = 8  # of a manager that is used by hand


class ConfigError(ValueError):
    """
    Overview:
        A configuration that cannot be run; the message is one line that says which key to change to what.
    """


def lookup(cfg: Any, key: str, default: Any = None) -> Any:
    """A key of a dict, an EasyDict or any object with attributes."""
    if isinstance(cfg, dict):
        return cfg.get(key, default)
    return getattr(cfg, key, default)


def missing(path: str) -> ConfigError:
    """The error for a key that a config lacks, and that has no default."""
    return ConfigError(f'{path} is missing: it has no default, so the config must give it')


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message for an unknown name: the nearest valid one if there is one, else all valid ones. A
    name with other numbers in it is not near: 'float64' is no misspelt 'float16'."""
    names, digits = list(valid), sorted(filter(str.isdigit, str(name)))
    alike = [other for other in names if not digits or sorted(filter(str.isdigit, other)) == digits]
    close = difflib.get_close_matches(str(name), alike, n=1, cutoff=0.65)
    return f'did you mean {close[0]!r}?' if close else f'valid are {", ".join(map(repr, names))}'


def names_of_modules(value: Any, key: str) -> List[str]:
    """The modules that ``import_names`` lists. A string is one name; DI-engine would import each of its letters."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{key}={value!r} must be a list of names of modules')
    return list(names)


# For each kind of option: the type of its values (a bool is no number), a test of a value, and the words for both.
KINDS: Dict[type, Tuple[type, Callable[[Any], bool], str]] = {
    bool: (bool, lambda value: True, 'True or False'),
    int: (numbers.Integral, lambda value: value >= 1, 'a whole number of at least 1'),
    float: (numbers.Real, lambda value: 0 < value < math.inf, 'a number above 0'),
}


def checked(kind: type, value: Any, key: str) -> Any:
    """A value of a kind of option; any other is refused under its key."""
    allowed, is_right, what = KINDS[kind]
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool) or not is_right(value):
        raise ConfigError(f'{key}={value!r} must be {what}')
    return kind(value)


def check_dict(value: Any, key: str) -> None:
    """Refuse a value that is no dict where LightZero's configs have one."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={reprlib.repr(value)} must be a dict, as LightZero's configs have it")


class Option(NamedTuple):
    """One key of ``kv_cache_cfg``."""
    kind: type
    default: Any  # None: computed from other keys, or no bound
    meaning: str  # as docs/options.md says it
    choices: Tuple[str, ...] = ()  # of a str
    refused: Mapping[str, str] = {}  # values that are no choices, and why

    def read(self, value: Any, key: str) -> Any:
        """The value of a config, checked; ``None`` stands for the default."""
        if value is None:
            return self.default
        if self.kind in KINDS:
            return checked(self.kind, value, f'{PREFIX}.{OPTIONS}.{key}')
        choices = sorted(KV_CACHE_REGISTRY) if key == 'type' else self.choices
        if not isinstance(value, str) or value not in choices:
            # The flag alone picks the old system.
            valid = [choice for choice in choices if key != 'type' or choice != 'old']
            why = self.refused.get(str(value), f'is unknown: {nearest(value, valid)}')
            raise ConfigError(f'{PREFIX}.{OPTIONS}.{key}={value!r} {why}')
        return value


def _option(*of_option: Any, **more: Any) -> Any:
    return field(metadata={'option': Option(*of_option, **more)})


@dataclass(frozen=True)
class CacheConfig:
    """
    Overview:
        The caching options of one world model, read from its ``world_model_cfg`` and validated.
    Arguments:
        - use_new (:obj:`bool`): ``use_new_cache_manager``, the switch.
        - env_num (:obj:`int`): Environments that are collected or evaluated at once.
        - evaluator_env_num (:obj:`int`): Environments that are evaluated at once.
        - num_simulations (:obj:`int`): Simulations of one search.
        - context_length (:obj:`int`): Tokens of a context, twice the pages of a window.

        The others are the keys of ``kv_cache_cfg``, as ``KV_CACHE_CFG`` describes them.
    """
    use_new: bool
    env_num: int
    evaluator_env_num: int
    num_simulations: int
    context_length: int
    type: str = _option(
        str, 'new', "manager registered in KV_CACHE_REGISTRY that the flag picks; 'lightzero' is LightZero's own, of "
        'its main branch', refused={
            LIGHTZERO: "is the manager of LightZero's main branch, which is not installed: use 'new', or the main "
            'branch'})
    eviction: str = _option(
        str, 'fifo', "which entry leaves a full pool: 'fifo', 'lru' or 'priority' (fewest hits); a training evicts "
        'nothing', ('fifo', 'lru', 'priority'))
    init_pool_size: int = _option(
        int, None, 'root contexts kept per environment for look-ups by key; by hand only')
    recurrent_pool_size: int = _option(
        int, None, 'nodes of one search: pages reserved for them, and size of the pool for look-ups of nodes by key')
    enable_stats: bool = _option(bool, True, 'count hits, misses and evictions')
    dtype: str = _option(
        str, 'float32', "storage of keys and values: 'float32', 'bfloat16' or 'float16'",
        ('float32', 'bfloat16', 'float16'))
    max_memory_mb: Optional[float] = _option(float, None, 'upper bound of the page storage, in MiB')
    backend: str = _option(
        str, 'auto', "how root inferences, and steps of searches in LightZero's tree, are launched: 'eager', "
        "'cudagraph', or 'auto': a CUDA graph on a GPU, eager on a CPU", ('auto', 'eager', 'cudagraph'),
        refused={'compile': "was removed: use 'auto'"})
    search: str = _option(
        str, 'auto', "where search trees are: 'device' (in arrays, a search is one compiled call, or on a GPU a "
        "replayed graph), 'tree' (LightZero's C++ tree), or 'auto': 'device' where it is served",
        ('auto', 'device', 'tree'))
    matmul: str = _option(
        str, 'float32', "products of searches on a GPU: 'float32', exact to 1e-4, or faster and less exact 'tf32', "
        "'bfloat16'", ('float32', 'tf32', 'bfloat16'))
    on_nan: str = _option(
        str, 'raise', "what a prediction with nan or inf does: 'raise' an error or 'skip' storing its context",
        ('raise', 'skip'))
    validation: str = _option(
        str, 'off', "replay searches by LightZero's own code: 'off', 'legacy' (as it is) or 'exact' (as it should be)",
        ('off', 'legacy', 'exact'))
    validation_freq: int = _option(int, 100, 'searches from one replay to the next')
    validation_tol: float = _option(
        float, 1e-3, 'rows that differ by more than this relative difference are reported')
    validation_action: str = _option(
        str, 'warn', 'how a row over the tolerance that no known cause explains is reported: '
        "'warn' in the log or 'raise' an error",
        ('warn', 'raise'))

    @property
    def system(self) -> str:
        """'new' (whichever manager), 'old', or 'lightzero': LightZero's own new one."""
        return system_of(self.type if self.use_new else 'old')

    @classmethod
    def of(cls, world_model_cfg: Any, env_num: Optional[int] = None, by_hand: bool = False) -> 'CacheConfig':
        """
        Overview:
            The options that a policy or a world model handed down with a ``world_model_cfg``; else what :meth:`read`
            finds in it. The attribute is removed, so that it never outlives a change of the config.
        Arguments:
            - world_model_cfg (:obj:`Any`): The config, dict-like or with attributes.
            - env_num (:obj:`Optional[int]`): As for :meth:`read`.
            - by_hand (:obj:`bool`): As for :meth:`read`.
        Returns:
            - config (:obj:`CacheConfig`): The options with their defaults filled in.
        Raises:
            - ConfigError: As by :meth:`read`.
        """
        found = getattr(world_model_cfg, '__dict__', {}).pop(HANDED_DOWN, None)
        return cls.read(world_model_cfg, env_num=env_num, by_hand=by_hand) if found is None else found

    @classmethod
    def read(cls, world_model_cfg: Any, *, env_num: Optional[int] = None, by_hand: bool = False) -> 'CacheConfig':
        """
        Overview:
            Read and validate everything about caching in a ``world_model_cfg``. With the flag off LightZero alone
            reads it: then misspelt keys are refused, and of the rest ``enable_stats=False`` counts alone.
        Arguments:
            - world_model_cfg (:obj:`Any`): The config, dict-like or with attributes.
            - env_num (:obj:`Optional[int]`): Environments where the config does not say; default 8.
            - by_hand (:obj:`bool`): Whether a manager by hand reads it, for which the flag need not be on.
        Returns:
            - config (:obj:`CacheConfig`): The options with their defaults filled in.
        Raises:
            - ConfigError: A misspelt key; with the flag on an unknown key or strategy, a wrong type, a size below 1 or
              a contradiction.
        """
        _refuse_misspelt_keys(world_model_cfg)
        use_new = checked(bool, lookup(world_model_cfg, FLAG, False), f'{PREFIX}.{FLAG}')
        if not use_new and not by_hand:
            world_model_cfg = {OPTIONS: _counting(lookup(world_model_cfg, OPTIONS))}
        num_simulations = _size(world_model_cfg, 'num_simulations', DEFAULT_NUM_SIMULATIONS)
        env_num = _size(world_model_cfg, 'env_num', DEFAULT_ENV_NUM if env_num is None else env_num)
        values = _read_options(lookup(world_model_cfg, OPTIONS))
        if values['init_pool_size'] is None:
            roots = max(256, 2 * num_simulations)
            values['init_pool_size'] = _size(world_model_cfg, 'game_segment_length', roots)
        if values['recurrent_pool_size'] is None:
            values['recurrent_pool_size'] = num_simulations * env_num
        if use_new and values['type'] == 'old':
            raise ConfigError(
                f"{PREFIX}.{OPTIONS}.type='old' contradicts {FLAG}=True: set {FLAG}=False for the old system"
            )
        is_new = use_new and system_of(values['type']) == 'new'
        if is_new or by_hand:
            _check_context_length(world_model_cfg, use_new)
        if is_new:
            _check_matmul(values, lookup(world_model_cfg, 'device'))
        else:
            values['validation'] = 'off'  # so that a user who switches back need not change it
        return cls(
            use_new=use_new, env_num=env_num, num_simulations=num_simulations,
            evaluator_env_num=_size(world_model_cfg, 'evaluator_env_num', DEFAULT_EVALUATOR_ENV_NUM),
            context_length=_size(world_model_cfg, 'context_length', DEFAULT_CONTEXT_LENGTH), **values
        )


KV_CACHE_CFG: Dict[str, Option] = {
    option.name: option.metadata['option'] for option in fields(CacheConfig) if option.metadata
}
"""Every key of ``kv_cache_cfg``; parsing, errors, the table in docs/options.md and that of ``info`` come from it."""


def handed_down(world_model_cfg: Any, options: CacheConfig) -> Any:
    """A copy of a ``world_model_cfg`` with the options that were read from it, for :meth:`CacheConfig.of`."""
    copied = copy.copy(world_model_cfg)
    copied.__dict__[HANDED_DOWN] = options  # of an EasyDict too an attribute alone, and no key
    return copied


def picked_manager(world_model_cfg: Any) -> str:
    """The name of the manager that a ``world_model_cfg`` picks, before it is checked; 'old' with the flag off."""
    if not lookup(world_model_cfg, FLAG, False):
        return 'old'
    return lookup(lookup(world_model_cfg, OPTIONS) or {}, 'type') or 'new'


def system_of(manager: str) -> str:
    """The system that a manager belongs to: 'old', 'lightzero', or 'new' for all others."""
    return manager if manager in ('old', LIGHTZERO) else 'new'


def picked_system(world_model_cfg: Any) -> str:
    """The system that a ``world_model_cfg`` picks, before it is checked."""
    return system_of(picked_manager(world_model_cfg))


def unread_options(world_model_cfg: Any) -> str:
    """The options in a ``kv_cache_cfg`` that LightZero's own caching does not read, in words."""
    given = lookup(world_model_cfg, OPTIONS)
    given = given if isinstance(given, dict) else {}
    unread = [key for key, option in KV_CACHE_CFG.items()
              if key not in ('type', 'enable_stats') and given.get(key) not in (None, option.default)]
    return ', '.join(f'{OPTIONS}.{key}={given[key]!r}' for key in unread)


def _read_options(options: Any) -> Dict[str, Any]:
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ConfigError(f'{PREFIX}.{OPTIONS}={options!r} must be a dict of {", ".join(KV_CACHE_CFG)}')
    _refuse_unknown_options(options)
    return {key: option.read(options.get(key), key) for key, option in KV_CACHE_CFG.items()}


def _counting(options: Any) -> Dict[str, Any]:
    """The part of ``kv_cache_cfg`` that is read with the flag off: ``enable_stats``. Misspelt keys are refused."""
    options = options if isinstance(options, dict) else {}
    near = {key: value for key, value in options.items() if difflib.get_close_matches(str(key), KV_CACHE_CFG, 1)}
    _refuse_unknown_options(near)
    return {'enable_stats': False} if options.get('enable_stats') is False else {}


def _refuse_unknown_options(options: Dict[str, Any]) -> None:
    for key, value in options.items():
        if key not in KV_CACHE_CFG:
            raise ConfigError(f'{PREFIX}.{OPTIONS}.{key}={value!r} is unknown: {nearest(key, KV_CACHE_CFG)}')


def _size(world_model_cfg: Any, key: str, default: int) -> int:
    value = lookup(world_model_cfg, key)
    return default if value is None else checked(int, value, f'{PREFIX}.{key}')


def _refuse_misspelt_keys(world_model_cfg: Any) -> None:
    if not hasattr(world_model_cfg, '__dict__'):
        check_dict(world_model_cfg, PREFIX)
    keys = world_model_cfg.keys() if isinstance(world_model_cfg, dict) else vars(world_model_cfg)
    for key in keys:
        if key in (FLAG, OPTIONS, HANDED_DOWN) or not isinstance(key, str):
            continue
        close = difflib.get_close_matches(key, (FLAG, OPTIONS), n=1, cutoff=0.75)
        if key not in SIZES:
            # LightZero has keys such as evaluator_env_num.
            near = [size for size in SIZES if size not in key]
            close = close or difflib.get_close_matches(key, near, n=1, cutoff=0.85)
        if close:
            value = lookup(world_model_cfg, key)
            raise ConfigError(f'{PREFIX}.{key}={value!r} is unknown: did you mean {close[0]!r}?')


def _check_context_length(world_model_cfg: Any, use_new: bool) -> None:
    """Refuse contexts that cannot slide, or that have no place in the model."""
    length = lookup(world_model_cfg, 'context_length')
    if length is None:  # a manager used by hand has no transformer
        return
    length = checked(int, length, f'{PREFIX}.context_length')
    if length < 4 or length % 2:
        better = f': try {max(4, length + length % 2)}'
        if use_new:
            better = f' with {FLAG}=True{better}, or {FLAG}=False for the old system'
        raise ConfigError(f'{PREFIX}.context_length={length} must be even and at least 4{better}')
    max_tokens = lookup(world_model_cfg, 'max_tokens')
    if isinstance(max_tokens, numbers.Integral) and length > max_tokens:
        raise ConfigError(f'{PREFIX}.context_length={length} must not exceed max_tokens={max_tokens}')


def _check_matmul(values: Dict[str, Any], device: Any) -> None:
    key = f"{PREFIX}.{OPTIONS}.matmul={values['matmul']!r}"
    if values['matmul'] == 'float32':
        return
    if str(device).startswith('cpu'):
        raise ConfigError(f"{key} is for a GPU, and {PREFIX}.device is {device!r}: use 'float32'")
    if values['search'] == 'tree':
        raise ConfigError(f"{key} is for searches in arrays, and {OPTIONS}.search is 'tree': use 'float32', or 'auto'")


def settle(policy_cfg: Any, simulations: int = 0) -> CacheConfig:
    """Validate what a policy config, merged with its policy's defaults, says about caching. ``simulations`` are those
    of its largest search, if that has more than ``num_simulations``.

    In new mode, sizes that ``world_model_cfg`` lacks are filled in from the policy's own, and sizes that would make a
    pool too small are refused.
    """
    world_model_cfg = policy_cfg['model']['world_model_cfg']
    if picked_system(world_model_cfg) != 'new':
        # LightZero's own default; our policies leave it out, so that a value is known to be the user's.
        world_model_cfg.setdefault('env_num', DEFAULT_ENV_NUM)
        return CacheConfig.read(world_model_cfg)
    for key in ('collector_env_num', 'evaluator_env_num', 'num_simulations'):
        checked(int, policy_cfg[key], f'policy.{key}')
    env_num = max(policy_cfg['collector_env_num'], policy_cfg['evaluator_env_num'])
    simulations = max(simulations, policy_cfg['num_simulations'])
    for key, least, source in (
            ('env_num', env_num, 'policy.collector_env_num and policy.evaluator_env_num'),
            ('num_simulations', policy_cfg['num_simulations'], 'policy.num_simulations')):
        given = _size(world_model_cfg, key, least)
        if given < least:
            raise ConfigError(f'{PREFIX}.{key}={given} is too small for {source}: it must be at least {least}')
        world_model_cfg[key] = given
    world_model_cfg['num_simulations'] = max(simulations, world_model_cfg['num_simulations'])
    world_model_cfg['evaluator_env_num'] = policy_cfg['evaluator_env_num']
    options = CacheConfig.read(world_model_cfg)
    nodes = env_num * simulations
    if options.recurrent_pool_size < nodes:
        raise ConfigError(
            f'{PREFIX}.{OPTIONS}.recurrent_pool_size={options.recurrent_pool_size} is too small for one search of '
            f'{env_num} environments: it must be at least {nodes}'
        )
    return options

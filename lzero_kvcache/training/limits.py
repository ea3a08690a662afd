"""
What single values of a complete config must be for any training to run. Every value with which LightZero runs is
allowed, even if it learns nothing. Only numbers of updates of 0 or less are refused: LightZero would train nothing
without saying so.
"""
import sys
from numbers import Integral, Real
from typing import Any, Callable, Collection, Mapping, NamedTuple, Set, Tuple

from ..config import FLAG, PREFIX, ConfigError
from ..host.lightzero import lightzero
from .linked_keys import COLLECTED, given_key_of


class Limit(NamedTuple):
    """What a value must be, and whether it is."""
    said: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Limit:
    return Limit('one of ' + ', '.join(choices), lambda value: value in choices)


REAL: Any = Real  # which mypy does not order
SIZE = Limit('a whole number above 0', lambda value: isinstance(value, Integral) and int(value) > 0)
# Or a float that is one.
ROUND = Limit(SIZE.said, lambda value: isinstance(value, REAL) and value > 0 and value % 1 == 0)
WHOLE = Limit('a whole number', lambda value: isinstance(value, Integral))
# nan is no number here; infinity is one, as 1e400 is in Python.
NUMBER = Limit('a number', lambda value: isinstance(value, REAL) and value == value)
POSITIVE = Limit('a number above 0', lambda value: NUMBER.holds(value) and value > 0)
NOT_ZERO = Limit('a number other than 0', lambda value: NUMBER.holds(value) and value != 0)
FINITE = Limit('a number, and finite', lambda value: isinstance(value, REAL) and abs(value) <= sys.float_info.max)
FINITE_POSITIVE = Limit('a number above 0, and finite', lambda value: FINITE.holds(value) and value > 0)
NOT_NEGATIVE = Limit('a number that is not below 0, and finite', lambda value: FINITE.holds(value) and value >= 0)
# LightZero computes int(value * env_num): '4' becomes int('4444'), with which it trains.
DIGITS = Limit(FINITE_POSITIVE.said, lambda value: isinstance(value, str) or FINITE_POSITIVE.holds(value))
SHARE = Limit('a number from 0 to 1', lambda value: isinstance(value, REAL) and 0 <= value <= 1)

RATIO = 'policy.replay_ratio'
LIMITS: Tuple[Tuple[Limit, Tuple[str, ...]], ...] = (
    (SIZE, (
        'env.collector_env_num', 'env.evaluator_env_num', 'env.n_evaluator_episode', 'policy.batch_size',
        'policy.collector_env_num', 'policy.evaluator_env_num', 'policy.num_simulations', 'policy.num_unroll_steps',
        'policy.update_per_collect', *COLLECTED.values(),
        *(f'{PREFIX}.{size}' for size in ('context_length', 'embed_dim', 'env_num', 'max_blocks', 'max_tokens',
                                          'num_layers', *lightzero.DIVIDE_EMBEDDING)),
    )),
    (ROUND, ('policy.game_segment_length', *lightzero.SCALES)),
    (WHOLE, ('policy.td_steps', )),
    (POSITIVE, ('policy.root_dirichlet_alpha', f'{PREFIX}.rope_theta')),
    (FINITE if lightzero.UPDATES_AT_LEAST_ONCE else FINITE_POSITIVE, (RATIO, )),
    (DIGITS, (f'{PREFIX}.num_simulations', )),
    (NOT_ZERO, ('policy.fixed_temperature_value', )),
    (NOT_NEGATIVE, ('policy.learning_rate', )),
    (NUMBER, (
        'env.stop_value', 'policy.eval_freq', 'policy.grad_clip_value', 'policy.replay_buffer_size',
        'policy.root_noise_weight',
    )),
    (FINITE, (
        'policy.discount_factor', 'policy.target_update_theta', 'policy.train_start_after_envsteps',
        'policy.weight_decay', f'{PREFIX}.gamma',
    )),
    (SHARE, ('policy.reanalyze_ratio', *(f'{PREFIX}.{part}_pdrop' for part in ('attn', 'embed', 'resid')))),
    (one_of('vector', 'image', 'image_memory', 'text'), (f'{PREFIX}.obs_type', )),
    (one_of('conv', 'mlp'), ('policy.model.model_type', )),
    (one_of('mse', 'group_kl', 'cos_sim'), (f'{PREFIX}.predict_latent_loss_type', )),
    (one_of('transition', 'episode'), ('policy.sample_type', )),
)
# These may be None.
OR_NONE = 'policy.update_per_collect', 'policy.root_dirichlet_alpha'


def check_limits(values: Mapping[str, Any], entry: str, given: Collection[str] = ()) -> None:
    """Refuse a value with which no training of an entry can run; ``values`` are those of a complete config, by path. Of
    copies, the error names the one in ``given``, the paths that the user has set."""
    unread = _unread(values, entry)
    for limit, paths in LIMITS:
        for path in paths:
            if path not in values or path in unread:
                continue
            value = values[path]
            if not (limit.holds(value) or value is None and path in OR_NONE):
                raise ConfigError(f'{given_key_of(path, given, values)}={value!r} must be {limit.said}')


def _unread(values: Mapping[str, Any], entry: str) -> Set[str]:
    """Paths that LightZero does not read in this config."""
    unread = set(COLLECTED.values()) - {COLLECTED[entry]}
    if values.get('policy.update_per_collect') is not None:
        unread.add(RATIO)
    if values.get('policy.manual_temperature_decay'):
        unread.add('policy.fixed_temperature_value')
    if not values.get(f'{PREFIX}.rotary_emb'):
        unread.add(f'{PREFIX}.rope_theta')
    if values.get(f'{PREFIX}.{FLAG}'):  # then they are options of the cache, which are checked with the others
        unread |= {f'{PREFIX}.env_num', f'{PREFIX}.num_simulations'}
    return unread

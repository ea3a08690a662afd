"""
Limits of single values of a complete config, and relations between values, without which no training runs. Every value
with which LightZero runs is allowed, even if it learns nothing. Only numbers of updates of 0 or less are refused:
LightZero would train nothing without saying so.
"""
import contextlib
import operator
import sys
from numbers import Integral, Real
from typing import Any, Callable, List, NamedTuple, Set, Tuple

from ..config import DEFAULT_ENV_NUM, FLAG, ConfigError, missing
from ..host.lightzero import lightzero
from .linked_keys import COLLECTED, RULES, WM
from .overrides import CREATE, CompleteConfig


class Limit(NamedTuple):
    """A condition of values: in words, and as a test."""
    said: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Limit:
    return Limit('one of ' + ', '.join(choices), lambda value: value in choices)


REAL: Any = Real  # which mypy does not order
SIZE = Limit('a whole number above 0', lambda value: isinstance(value, Integral) and int(value) > 0)
SHAPE = Limit('a whole number above 0, or a list of such', lambda value: all(map(
    SIZE.holds, value if isinstance(value, (list, tuple)) else [value])))
DICT = Limit('a dict', lambda value: isinstance(value, dict))
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

RATIO, BUFFER_SIZE, SEGMENTS = 'policy.replay_ratio', 'policy.replay_buffer_size', COLLECTED['train_unizero_segment']
LIMITS: Tuple[Tuple[Limit, Tuple[str, ...]], ...] = (
    (SIZE, (
        'env.collector_env_num', 'env.evaluator_env_num', 'env.n_evaluator_episode', 'policy.batch_size',
        'policy.collector_env_num', 'policy.evaluator_env_num', 'policy.num_simulations', 'policy.num_unroll_steps',
        'policy.update_per_collect', *COLLECTED.values(), 'policy.model.action_space_size', WM + 'action_space_size',
        *(WM + size for size in ('context_length', 'embed_dim', 'env_num', 'max_blocks', 'max_tokens', 'num_layers',
                                 *lightzero.DIVIDE_EMBEDDING)),
    )),
    (SHAPE, ('policy.model.observation_shape', )),
    (DICT, ('policy.eps', 'policy.learn', 'policy.learn.learner', 'policy.learn.learner.hook')),
    (ROUND, ('policy.game_segment_length', *lightzero.SCALES)),
    (WHOLE, ('policy.td_steps', )),
    (POSITIVE, ('policy.root_dirichlet_alpha', WM + 'rope_theta')),
    (FINITE if lightzero.UPDATES_AT_LEAST_ONCE else FINITE_POSITIVE, (RATIO, )),
    (DIGITS, (WM + 'num_simulations', )),
    (NOT_ZERO, ('policy.fixed_temperature_value', )),
    (NOT_NEGATIVE, ('policy.learning_rate', )),
    (NUMBER, (
        'env.stop_value', 'policy.eval_freq', 'policy.grad_clip_value', BUFFER_SIZE, 'policy.root_noise_weight',
    )),
    (FINITE, (
        'policy.discount_factor', 'policy.target_update_theta', 'policy.train_start_after_envsteps',
        'policy.weight_decay', WM + 'gamma',
    )),
    (SHARE, ('policy.reanalyze_ratio', *(f'{WM}{part}_pdrop' for part in ('attn', 'embed', 'resid')))),
    (one_of('vector', 'image', 'image_memory', 'text'), (WM + 'obs_type', )),
    (one_of('conv', 'mlp'), ('policy.model.model_type', )),
    (one_of('mse', 'group_kl', 'cos_sim'), (WM + 'predict_latent_loss_type', )),
    (one_of('transition', 'episode'), ('policy.sample_type', )),
)
# LightZero reads these, and has no default of them.
WITHOUT_DEFAULT = BUFFER_SIZE, 'env.collector_env_num', 'env.evaluator_env_num'
# These may be None.
OR_NONE = 'policy.update_per_collect', 'policy.root_dirichlet_alpha'


def _fits(kind: Any, shape: Any) -> bool:
    """Whether a model of vectors or of images is one for observations of a shape."""
    others = ('conv', 'image', 'image_memory') if isinstance(shape, int) else ('mlp', 'vector')
    return shape is None or kind not in others


def _within_segment(length: Any, unroll: Any, steps: Any, ends_ignored: Any, priority: Any, sampled: Any) -> Any:
    """Where ends of episodes are ignored, segments are taken to go on, and a sample must lie within its segment."""
    return not ends_ignored or priority or sampled != 'transition' or length >= unroll + steps


POLICY = CREATE + '.policy.type'
# The first is at least as large as the second.
LEAST = (
    ('env.n_evaluator_episode', 'env.evaluator_env_num'),
    *(((WM + 'max_blocks', 'policy.num_unroll_steps'), ) if lightzero.UNROLLS_WITHIN_BLOCKS else ()),
    (WM + 'env_num', 'env.collector_env_num'),
    (WM + 'env_num', 'env.evaluator_env_num'),
)
# The path of a value, paths of others, the test of all these values, and the error about the first where it fails.
Relation = Tuple[str, Tuple[str, ...], Callable[..., Any], str]
RELATIONS: Tuple[Relation, ...] = (
    *((path, ('policy.model.observation_shape', ), _fits, 'a vector has a number, an image a list of three')
      for path in ('policy.model.model_type', WM + 'obs_type')),
    ('policy.model.continuous_action_space', (POLICY, ),
     lambda continuous, policy: not continuous or policy != 'unizero', "it must be 'sampled_unizero'"),
    *((WM + part, (WM + 'embed_dim', ), lambda part, width: width % part == 0, 'it must divide that')
      for part in lightzero.DIVIDE_EMBEDDING),
    (WM + 'context_length', (WM + 'max_tokens', WM + 'rotary_emb'),
     lambda length, tokens, rotary: rotary or length <= tokens, 'it must not exceed max_tokens, twice max_blocks'),
    ('policy.game_segment_length', ('policy.num_unroll_steps', 'policy.td_steps', 'policy.ignore_done',
                                    'policy.use_priority', 'policy.sample_type'), _within_segment,
     'it must be at least the sum of the first two'),
    (BUFFER_SIZE, ('policy.batch_size', ), operator.gt, 'it must be larger than that'),
    # Of two copies it is not known which is right, and so they come last.
    ('policy.model.action_space_size', (WM + 'action_space_size', ), operator.eq, 'they must be the same'),
)


def check(values: CompleteConfig, system: str) -> None:
    """Refuse a config with which no training can run in any system."""
    check_limits(values)
    env_num = WM + 'env_num'
    if env_num not in values and system == 'new':
        values[env_num] = max(values['policy.collector_env_num'], values['policy.evaluator_env_num'])
        values.chosen.add(env_num)
    values.setdefault(env_num, DEFAULT_ENV_NUM)
    for rule in RULES:
        right = rule.right(values) if rule.needed and rule.target in values else None
        if right is not None and right != values[rule.target]:
            raise values.contradiction(rule.target, rule.sources, f'it must be {right!r}')
    pairs = *LEAST, *lightzero.least_environments(values[POLICY]), (COLLECTED[values.entry], 'env.collector_env_num')
    at_least: List[Relation] = [
        (path, (least, ), operator.ge, f'it must be {"the same" if path == SEGMENTS else "at least that"}')
        for path, least in pairs]
    for path, others, hold, said in (*at_least, *RELATIONS):
        with contextlib.suppress(TypeError):  # of values that are no numbers
            if not hold(values.get(path), *map(values.get, others)):
                raise values.contradiction(path, others, said)


def check_limits(values: CompleteConfig) -> None:
    """Refuse a value with which no training can run, independently of the other values."""
    for path in WITHOUT_DEFAULT:
        if path not in values:
            raise missing(path)
    unread = _unread(values)
    for limit, paths in LIMITS:
        for path in paths:
            value = values.get(path)
            if path in values and path not in unread and not limit.holds(value) and not (
                    value is None and path in OR_NONE):
                raise ConfigError(f'{values.said(path)} must be {limit.said}')


def _unread(values: CompleteConfig) -> Set[str]:
    """Paths that LightZero does not read in this config."""
    unread = set(COLLECTED.values()) - {COLLECTED[values.entry]}
    if values.get('policy.update_per_collect') is not None:
        unread.add(RATIO)
    if values.get('policy.manual_temperature_decay'):
        unread.add('policy.fixed_temperature_value')
    if not values.get(WM + 'rotary_emb'):
        unread.add(WM + 'rope_theta')
    if values.get(WM + FLAG):  # then they are options of the cache, which are checked with the others
        unread |= {WM + 'env_num', WM + 'num_simulations'}
    return unread

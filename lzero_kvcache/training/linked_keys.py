"""
LightZero's configs keep several copies of one number. If a relation held before a change, and the user changed one side
of it, the other side is changed so that it still holds, unless the user set that as well. A relation without which no
training can run is refused where it does not hold.
"""
import re
from typing import Any, Callable, Collection, Dict, Mapping, NamedTuple, Tuple

from ..config import PREFIX, ConfigError
from ..host.building import atari_actions
from ..host.lightzero import lightzero

WM = PREFIX + '.'

# Paths that hold the same value in every training that runs.
NEEDED_COPIES: Tuple[Tuple[str, ...], ...] = (
    ('policy.model.action_space_size', WM + 'action_space_size'),
)
# Paths that hold the same value in most configs; any of them may be the one that is set.
COPIES: Tuple[Tuple[str, ...], ...] = (
    ('env.collector_env_num', 'policy.collector_env_num', WM + 'collector_env_num'),
    ('env.evaluator_env_num', 'policy.evaluator_env_num', WM + 'evaluator_env_num'),
    ('policy.num_simulations', WM + 'num_simulations', 'policy.collect_num_simulations',
     'policy.eval_num_simulations'),
    ('policy.model.continuous_action_space', WM + 'continuous_action_space', 'env.continuous'),
    ('policy.model.num_of_sampled_actions', WM + 'num_of_sampled_actions'),
    ('policy.model.norm_type', WM + 'norm_type'),
    ('policy.model.model_type', WM + 'model_type'),
    ('policy.model.frame_stack_num', 'env.frame_stack_num'),
    ('policy.model.observation_shape', 'env.observation_shape'),
    ('policy.game_segment_length', WM + 'game_segment_length'),
    ('policy.gray_scale', 'env.gray_scale'),
    ('policy.transform2string', 'env.transform2string'),
)


class Rule(NamedTuple):
    """``target`` has the value that ``compute`` makes of ``sources``; ``needed``: no training runs where it has not."""
    target: str
    sources: Tuple[str, ...]
    compute: Callable[..., Any]
    needed: bool = False


def _same(value: Any) -> Any:
    return value


RULES = [
    *(Rule(target, (source, ), _same, group in NEEDED_COPIES)
      for group in NEEDED_COPIES + COPIES for target in group for source in group if source != target),
    # Fewer episodes or segments than environments stop the collectors by an assertion.
    Rule('policy.n_episode', ('env.collector_env_num', ), _same),
    Rule('policy.num_segments', ('env.collector_env_num', ), _same),
    Rule('env.n_evaluator_episode', ('env.evaluator_env_num', ), _same),
    Rule(WM + 'env_num', ('env.collector_env_num', 'env.evaluator_env_num'), max),
    Rule(WM + 'max_tokens', (WM + 'max_blocks', ), lambda blocks: 2 * blocks, needed=True),
    Rule(WM + 'support_size', (lightzero.SUPPORT, ), lightzero.support_size, needed=True),
    Rule(WM + 'num_unroll_steps', ('policy.num_unroll_steps', ), _same),
    Rule(WM + 'max_blocks', ('policy.num_unroll_steps', ), _same),
    Rule(WM + 'context_length_for_recurrent', (WM + 'context_length', ), _same),
    Rule('policy.device', (WM + 'device', ), _same),
    Rule('policy.cuda', (WM + 'device', ), lambda device: str(device).startswith('cuda')),
    Rule('policy.model.action_space_size', ('env.env_id', ), atari_actions, needed=True),
]

# What is at least as large as something else in every training that runs.
LEAST = (
    ('env.n_evaluator_episode', 'env.evaluator_env_num'),
    *(((WM + 'max_blocks', 'policy.num_unroll_steps'), ) if lightzero.UNROLLS_WITHIN_BLOCKS else ()),
    (WM + 'env_num', 'env.collector_env_num'),
    (WM + 'env_num', 'env.evaluator_env_num'),
)
# What models of vectors and of images are called.
VECTORS, IMAGES = ('mlp', 'vector'), ('conv', 'image', 'image_memory')
# What each entry collects at once: all its processes together.
SEGMENTS = 'policy.num_segments'
COLLECTED = {'train_unizero': 'policy.n_episode', 'train_unizero_segment': SEGMENTS}

# A segment of an episode, which goes on where ends are ignored, and what must then lie within.
SEGMENT = ('game_segment_length', 'num_unroll_steps', 'td_steps')

# How LightZero's experiment names spell a value: 'ns25', 'bs256'.
NAME_TOKENS = (
    ('policy.num_simulations', 'ns'),
    ('policy.update_per_collect', 'upc'),
    ('policy.replay_ratio', 'rr'),
    ('policy.reanalyze_ratio', 'rer'),
    ('policy.num_unroll_steps', 'H'),
    ('policy.num_unroll_steps', 'Htrain'),
    ('policy.batch_size', 'bs'),
    ('policy.game_segment_length', 'gsl'),
    ('policy.num_segments', 'numsegments-'),
    ('policy.buffer_reanalyze_freq', 'brf'),
    ('policy.reanalyze_batch_size', 'rbs'),
    ('policy.reanalyze_partition', 'rp'),
    (WM + 'num_layers', 'nlayer'),
)


def follow(before: Mapping[str, Any], changed: Mapping[str, Any]) -> Dict[str, Any]:
    """
    Complete a change with the copies of what it sets. ``before`` has every known path with its value before the change,
    ``changed`` what the user set.
    """
    complete = dict(changed)
    settled = False
    while not settled:
        settled = True
        for rule in RULES:
            if rule.target in complete or not any(source in complete for source in rule.sources):
                continue
            held, now = _right(rule, before), {**before, **complete}
            if held is None or held != before.get(rule.target) or None in (now[source] for source in rule.sources):
                continue
            complete[rule.target] = _right(rule, now)
            settled = False
            if complete[rule.target] is None:
                raise ConfigError(
                    f"{rule.sources[0]} = {complete[rule.sources[0]]!r}: nothing tells the {rule.target} that "
                    "goes with it; set that as well"
                )
    name = before.get('exp_name')
    if isinstance(name, str) and 'exp_name' not in complete:
        renamed = rename(name, before, complete)
        if renamed != name:
            complete['exp_name'] = renamed
    return complete


def check(values: Mapping[str, Any], entry: str, policy: str, given: Collection[str] = ()) -> None:
    """Refuse the values of a complete config with which no training of an entry can run, in either system. Of copies,
    the path is told that the user has given."""
    # Of two copies it is not known which is right, and so they come last.
    for rule in sorted((rule for rule in RULES if rule.needed), key=lambda rule: rule.compute is _same):
        target, right = values.get(rule.target), _right(rule, values)
        if rule.target in values and right is not None and right != target:
            named = source_of(rule.target, given, values)
            said = ' and '.join(f'{source}={values[source]!r}' for source in rule.sources)
            must = 'they must be the same' if rule.compute is _same else f'it must be {right!r}'
            raise ConfigError(f'{named}={target!r} contradicts {said}: {must}')
    for target, source in (*LEAST, *lightzero.least_environments(policy), (COLLECTED[entry], 'env.collector_env_num')):
        amount, least = values.get(target), values.get(source)
        if isinstance(amount, (int, float)) and isinstance(least, (int, float)) and amount < least:
            right = 'the same' if target == SEGMENTS else 'at least that'
            raise ConfigError(f'{target}={amount!r} contradicts {source}={least!r}: it must be {right}')
    shape = values.get('policy.model.observation_shape')
    for path in ('policy.model.model_type', WM + 'obs_type'):
        kind = values.get(path)
        if shape is not None and kind in (IMAGES if isinstance(shape, int) else VECTORS):
            raise ConfigError(f'{path}={kind!r} contradicts policy.model.observation_shape={shape!r}: a vector has a '
                              'number, an image a list of three')
    continuous = 'policy.model.continuous_action_space'
    if policy == 'unizero' and values.get(continuous):
        raise ConfigError(f"{continuous}=True contradicts create_config.policy.type='unizero': it must be "
                          "'sampled_unizero'")
    width = values[WM + 'embed_dim']
    for part in lightzero.DIVIDE_EMBEDDING:
        parts = values.get(WM + part, 1)
        if width % parts:
            raise ConfigError(f'{WM}{part}={parts!r} contradicts {WM}embed_dim={width!r}: it must divide that')
    length, tokens = values.get(WM + 'context_length', 0), values[WM + 'max_tokens']
    if not values.get(WM + 'rotary_emb') and length > tokens:
        raise ConfigError(f'{WM}context_length={length} contradicts {WM}max_tokens={tokens}, by {WM}max_blocks: with '
                          'learned positions it must not exceed that')
    segment, steps, of_target = (values[f'policy.{key}'] for key in SEGMENT)
    if values.get('policy.ignore_done') and not values['policy.use_priority'] and segment < steps + of_target and (
            values['policy.sample_type'] == 'transition'):
        raise ConfigError(f'policy.game_segment_length={segment!r} contradicts policy.num_unroll_steps={steps!r} and '
                          f'policy.td_steps={of_target!r} with policy.ignore_done=True: it must be at least their sum, '
                          f'{steps + of_target}')
    size, batch = values['policy.replay_buffer_size'], values['policy.batch_size']
    if size <= batch:
        raise ConfigError(f'policy.replay_buffer_size={size!r} contradicts policy.batch_size={batch!r}: it must be '
                          'larger than that')


def source_of(path: str, given: Collection[str], values: Mapping[str, Any]) -> str:
    """The key that was given, of which a path is a copy; or the path itself."""
    if path in given:
        return path
    return next((source for rule in RULES if rule.target == path and rule.compute is _same for source in rule.sources
                 if source in given and values[source] == values[path]), path)


def rename(name: str, before: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    """An experiment's name, as ``.../Pong_uz_ns50_bs64_seed0``, with the values in it that changed."""
    for path, token in NAME_TOKENS:
        if path in changed and path in before:
            name = replace_token(name, token, before[path], changed[path])
    old, new = before.get('env.env_id'), changed.get('env.env_id')
    if isinstance(old, str) and isinstance(new, str):
        short = [re.sub(r'(NoFrameskip)?-v\d+$', '', env_id) for env_id in (old, new)]
        name = name.replace(short[0], short[1]) if short[0] else name
    return name


def replace_token(name: str, token: str, old: Any, new: Any) -> str:
    """Replace ``seed0`` by ``seed3``, and never the ``seed0`` of ``seed01``."""
    pattern = rf'(?<![A-Za-z]){re.escape(token)}{re.escape(str(old))}(?!\d|\.\d)'
    return re.sub(pattern, lambda _: f'{token}{new}', name)


def _right(rule: Rule, values: Mapping[str, Any]) -> Any:
    """What a rule's target must be; None where a source has no value, or where that is unknown."""
    sources = [values.get(source) for source in rule.sources]
    try:
        return None if None in sources else rule.compute(*sources)
    except TypeError:  # of a value that is no number
        return None

"""
LightZero's configs keep several copies of one number, and numbers that follow from others. Where the user changes one,
those that follow from it are changed too, if they did before and the user did not set them as well. Numbers with which
no training can run are refused.
"""
import re
from typing import Any, Callable, Collection, Dict, Iterator, Mapping, NamedTuple, Tuple

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
    """``target`` has the value that ``compute`` makes of ``sources``; where it is ``needed``, no training runs with
    another."""
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

# In every training that runs, the first is at least as large as the second.
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
    A change with all that follows from it. ``before`` has the value of every known path before the change, ``changed``
    what the user set.
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
    """Refuse a complete config with which no training of an entry can run, in either system. ``values`` are by path. Of
    copies, the error names the one in ``given``, the paths that the user has set."""
    for wrong, other, right in _contradictions(values, entry, policy, given):
        raise ConfigError(f'{wrong} contradicts {other}: {right}')


def _contradictions(values: Mapping[str, Any], entry: str, policy: str, given: Collection[str]
                    ) -> Iterator[Tuple[str, str, str]]:
    """What is wrong, what it contradicts, and what would be right."""

    def said(*paths: str) -> str:
        return ' and '.join(f'{path}={values[path]!r}' for path in paths)

    # Of two copies it is not known which is right, and so they come last.
    for rule in sorted((rule for rule in RULES if rule.needed), key=lambda rule: rule.compute is _same):
        right = _right(rule, values)
        if rule.target in values and right is not None and right != values[rule.target]:
            must = 'they must be the same' if rule.compute is _same else f'it must be {right!r}'
            yield said(given_key_of(rule.target, given, values)), said(*rule.sources), must
    for target, source in (*LEAST, *lightzero.least_environments(policy), (COLLECTED[entry], 'env.collector_env_num')):
        amount, least = values.get(target), values.get(source)
        if isinstance(amount, (int, float)) and isinstance(least, (int, float)) and amount < least:
            yield said(target), said(source), f'it must be {"the same" if target == SEGMENTS else "at least that"}'
    shape = 'policy.model.observation_shape'
    wrong = IMAGES if isinstance(values.get(shape), int) else VECTORS
    for path in ('policy.model.model_type', WM + 'obs_type'):
        if values.get(shape) is not None and values.get(path) in wrong:
            yield said(path), said(shape), 'a vector has a number, an image a list of three'
    continuous = 'policy.model.continuous_action_space'
    if policy == 'unizero' and values.get(continuous):
        yield said(continuous), "create_config.policy.type='unizero'", "it must be 'sampled_unizero'"
    width = WM + 'embed_dim'
    for part in (WM + name for name in lightzero.DIVIDE_EMBEDDING):
        if part in values and values[width] % values[part]:
            yield said(part), said(width), 'it must divide that'
    length, tokens = WM + 'context_length', WM + 'max_tokens'
    if not values.get(WM + 'rotary_emb') and values.get(length, 0) > values[tokens]:
        yield said(length), f'{said(tokens)}, by {WM}max_blocks', 'with learned positions it must not exceed that'
    segment, *within = (f'policy.{key}' for key in ('game_segment_length', 'num_unroll_steps', 'td_steps'))
    least = sum(values[path] for path in within)
    if values.get('policy.ignore_done') and not values['policy.use_priority'] and values[segment] < least and (
            values['policy.sample_type'] == 'transition'):
        # Where ends are ignored, segments are taken to go on, and what is sampled of one must lie within it.
        yield said(segment), f'{said(*within)} with policy.ignore_done=True', f'it must be at least their sum, {least}'
    size, batch = 'policy.replay_buffer_size', 'policy.batch_size'
    if values[size] <= values[batch]:
        yield said(size), said(batch), 'it must be larger than that'


def given_key_of(path: str, given: Collection[str], values: Mapping[str, Any]) -> str:
    """The path in ``given`` that this one is a copy of, or this one itself."""
    if path in given:
        return path
    return next((source for rule in RULES if rule.target == path and rule.compute is _same for source in rule.sources
                 if source in given and values[source] == values[path]), path)


def rename(name: str, before: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    """An experiment's name, as ``.../Pong_uz_ns50_bs64_seed0``, with the new values in place of those before."""
    for path, token in NAME_TOKENS:
        if path in changed and path in before:
            name = replace_token(name, token, before[path], changed[path])
    old, new = before.get('env.env_id'), changed.get('env.env_id')
    if isinstance(old, str) and isinstance(new, str):
        short = [re.sub(r'(NoFrameskip)?-v\d+$', '', env_id) for env_id in (old, new)]
        name = name.replace(short[0], short[1]) if short[0] else name
    return name


def replace_token(name: str, token: str, old: Any, new: Any) -> str:
    """Replace ``seed0`` by ``seed3``, but not within ``seed01``."""
    pattern = rf'(?<![A-Za-z]){re.escape(token)}{re.escape(str(old))}(?!\d|\.\d)'
    return re.sub(pattern, lambda _: f'{token}{new}', name)


def _right(rule: Rule, values: Mapping[str, Any]) -> Any:
    """What a rule's target must be; None where a source has no value, or where that is unknown."""
    sources = [values.get(source) for source in rule.sources]
    try:
        return None if None in sources else rule.compute(*sources)
    except TypeError:  # of a value that is no number
        return None

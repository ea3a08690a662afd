"""
LightZero's configs keep several copies of one number, and numbers that are computed from others. Where the user sets
one key, those that held a number computed from it are updated, unless the user sets them too.
"""
import re
from typing import Any, Callable, Dict, Mapping, NamedTuple, Tuple

from ..config import PREFIX, ConfigError
from ..host.building import atari_actions
from ..host.lightzero import lightzero

WM = PREFIX + '.'

# Paths that hold the same value in most configs; any of them may be the one that is set.
COPIES: Tuple[Tuple[str, ...], ...] = (
    ('policy.model.action_space_size', WM + 'action_space_size'),
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


def _same(value: Any) -> Any:
    return value


class Rule(NamedTuple):
    """``target`` has the value that ``compute`` makes of ``sources``; where it is ``needed``, trainings fail with any
    other."""
    target: str
    sources: Tuple[str, ...]
    compute: Callable[..., Any] = _same
    needed: bool = False

    def right(self, values: Mapping[str, Any]) -> Any:
        """The value that the target must have; None if a source has no value, or if it is unknown."""
        sources = [values.get(source) for source in self.sources]
        try:
            return None if None in sources else self.compute(*sources)
        except TypeError:  # of a value that is no number
            return None


RULES = [
    *(Rule(target, (source, )) for group in COPIES for target in group for source in group if source != target),
    # Fewer episodes or segments than environments stop the collectors by an assertion.
    Rule('policy.n_episode', ('env.collector_env_num', )),
    Rule('policy.num_segments', ('env.collector_env_num', )),
    Rule('env.n_evaluator_episode', ('env.evaluator_env_num', )),
    Rule(WM + 'env_num', ('env.collector_env_num', 'env.evaluator_env_num'), max),
    Rule(WM + 'max_tokens', (WM + 'max_blocks', ), lambda blocks: 2 * blocks, needed=True),
    Rule(WM + 'support_size', (lightzero.SUPPORT, ), lightzero.support_size, needed=True),
    Rule(WM + 'num_unroll_steps', ('policy.num_unroll_steps', )),
    Rule(WM + 'max_blocks', ('policy.num_unroll_steps', )),
    Rule(WM + 'context_length_for_recurrent', (WM + 'context_length', )),
    Rule('policy.device', (WM + 'device', )),
    Rule('policy.cuda', (WM + 'device', ), lambda device: str(device).startswith('cuda')),
    Rule('policy.model.action_space_size', ('env.env_id', ), atari_actions, needed=True),
]

# What each entry collects at once: all its processes together.
COLLECTED = {'train_unizero': 'policy.n_episode', 'train_unizero_segment': 'policy.num_segments'}

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
    A change together with the keys that are derived from it. ``before`` has the value of every known path before the
    change, ``changed`` what the user set.
    """
    complete = dict(changed)
    settled = False
    while not settled:
        settled = True
        for rule in RULES:
            if rule.target in complete or not any(source in complete for source in rule.sources):
                continue
            held, now = rule.right(before), {**before, **complete}
            if held is None or held != before.get(rule.target) or None in (now[source] for source in rule.sources):
                continue
            complete[rule.target] = rule.right(now)
            settled = False
            if complete[rule.target] is None:
                raise ConfigError(
                    f'{rule.sources[0]} = {complete[rule.sources[0]]!r}: {rule.target} cannot be derived from this '
                    'value; set that as well'
                )
    name = before.get('exp_name')
    if isinstance(name, str) and 'exp_name' not in complete:
        renamed = rename(name, before, complete)
        if renamed != name:
            complete['exp_name'] = renamed
    return complete


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

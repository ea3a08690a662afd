"""What is of LightZero's main branch alone."""
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from lzero.model.unizero_world_models.transformer import precompute_freqs_cis
from torch import nn

NAME = 'main branch'
SIGN = 'a block of its transformer has a feed_forward'
SERVED = 'UniZero, Sampled UniZero and UniZero with PPO; its own new manager with the old searches'

POLICIES = ('unizero', 'sampled_unizero', 'unizero_ppo')
"""Policies that are served."""

RECURRENT_SLOTS = 'shared_pool_size_recur'
"""Attribute of a world model that says how many contexts its recurrent pool has."""

KEEPS_REANALYSES = True
"""Whether contexts grow along the paths of a reanalysis of no more rows than environments."""

INDEX_FOR_DEPTH = False
"""Whether the sampled search has a node's index in the search path for its depth."""

COMPUTES_TARGETS = False
"""Whether the engine computes what a replay buffer asks of the target model."""

HAS_MANAGER = True
"""Whether LightZero has a new manager of its own."""

DIVIDE_EMBEDDING = ('num_heads', )
"""Sizes of a world model that must divide its embedding."""

UNROLLS_WITHIN_BLOCKS = False
"""Whether a world model must have as many blocks as a training batch has steps."""

POLICY_FIELDS = ('learn', 'collect')  # the first sets what collecting pads observations with
"""What a policy must be built for to collect."""

_CHANGES_CONTEXTS = (
    ('exact_kv_window_reset', False, 'a full window would begin anew at its newest observation'),
    ('rebuild_kv_window_from_tokens', False, 'a full window would be computed anew from its tokens'),
    ('use_policy_logits_clip', False, 'policy logits would be clipped after the head'),
    ('task_embed_option', None, 'tokens would carry a task'),
    ('moe_in_transformer', False, 'MLPs would be mixtures of experts'),
    ('multiplication_moe_in_transformer', False, 'MLPs would be mixtures of experts'),
)


def mlp_of(block: Any) -> nn.Module:
    return block.feed_forward


def angles_of(config: Any) -> int:
    """Rotary angles that there are before they repeat: they do not."""
    return 2 ** 62


def longer_table(transformer: Any, first: int, last: int) -> Optional[torch.Tensor]:
    """A table of rotary angles that has a first and a last one, where the transformer's has not."""
    table = transformer.freqs_cis
    if first < 0:
        raise ValueError(
            f"a rotary angle of {first}, and this LightZero has none below 0: environments must return a 'timestep', "
            'which is 0 at the first step of an episode alone'
        )
    if last < len(table):
        return None
    end = max(last + 1, 2 * len(table))
    return precompute_freqs_cis(transformer.rotary_head_dim, end, transformer.rope_theta).to(table.device)


def unserved_of(world_model: Any) -> Iterator[str]:
    """Options of a world model that change what a context is, and that the new cache does not know."""
    for name, harmless, meaning in _CHANGES_CONTEXTS:
        value = world_model.config.get(name, harmless)
        if value != harmless and value != 'none':
            yield f'{name}={value!r}: {meaning}'


def unserved_policy(cfg: Any) -> Optional[str]:
    """Why a policy cannot have the new cache."""
    if cfg['model']['world_model_cfg'].get('obs_type') == 'text':
        return "policy.model.world_model_cfg.obs_type='text': its searches must return latent states to be decoded"
    if (cfg['model']['world_model_cfg'].get('kv_cache_cfg') or {}).get('validation') == 'legacy':
        return "policy.model.world_model_cfg.kv_cache_cfg.validation='legacy': this LightZero has 'exact' alone"
    for name in ('value_support_range', 'reward_support_range'):
        low, high, step = cfg['model'][name]
        if (low, step) != (1 - high, 1):
            return f'policy.model.{name}={cfg["model"][name]}: it must be (-n, n + 1, 1)'
    if cfg.get('contextual_reanalysis') and (cfg['reanalyze_ratio'] or cfg.get('buffer_reanalyze_freq')):
        return 'policy.contextual_reanalysis=True: roots of reanalyses would have contexts'
    return None


def unserved_models() -> Iterator[Tuple[type, str, str]]:
    """Models that have LightZero's own caching: the class, its registered name, and why the new cache has none."""
    from lzero.model.sampled_unizero_model_multitask import SampledUniZeroMTModel
    from lzero.model.unizero_model_multitask import UniZeroMTModel
    tasks = 'its contexts and heads belong to tasks, and the new cache does not know task_id'
    yield UniZeroMTModel, 'UniZeroMTModel', tasks
    yield SampledUniZeroMTModel, 'SampledUniZeroMTModel', tasks


def simulations_of(cfg: Any) -> int:
    """Simulations of a policy's longest search."""
    return max(cfg.get(key, 0) for key in ('num_simulations', 'collect_num_simulations', 'eval_num_simulations'))


def least_environments(policy: str) -> Tuple[Tuple[str, str], ...]:
    """Numbers of environments of which the first is at least the second in every training of a policy. It picks rows by
    environment, but for Sampled UniZero."""
    kinds = () if policy == 'sampled_unizero' else ('collector', 'evaluator')
    return tuple((f'policy.{kind}_env_num', f'env.{kind}_env_num') for kind in kinds)


# ---- a step of a policy ----------------------------------------------------------------------------------------------


def environments_of(ready: Any) -> List[int]:
    """The environment of each row, from what a worker passes as ready."""
    return [int(env_id) for env_id in (sorted(ready) if isinstance(ready, set) else ready)]


def hand_rows(policy: Any, mode: str, env_ids: Sequence[int], observations: torch.Tensor, actions: List[Any]) -> None:
    """Give a policy the last observations and actions of the rows of its next batch. Those of a batch that is as large
    as all environments it picks by environment, others it takes as they are."""
    if hasattr(policy, 'last_batch_obs'):  # Sampled UniZero's are rows of a batch
        policy.last_batch_obs, policy.last_batch_action = observations, actions
        return
    everybody = policy.collector_env_num if mode == 'collect' else policy.evaluator_env_num
    if len(env_ids) == everybody:
        order = np.argsort(env_ids).tolist()
        observations, actions = observations[order], [actions[row] for row in order]
    setattr(policy, f'last_batch_obs_{mode}', observations)
    setattr(policy, f'last_batch_action_{mode}', actions)


def traverse_options(cfg: Any) -> Tuple[Any, ...]:
    """What UniZero's tree takes last."""
    return (cfg.deterministic,)


def draws_ties(cfg: Any) -> bool:
    """Whether a search draws among equal scores; or takes the first."""
    return not cfg.get('deterministic', False)

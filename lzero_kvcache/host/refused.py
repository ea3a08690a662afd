"""Refusals of the new system: options that it does not know, and user code that it would not call."""
import logging
from typing import Any, Iterator, Optional, Tuple

from torch import nn

from ..config import FLAG, PREFIX, ConfigError, missing
from .lightzero import lightzero

logger = logging.getLogger(__name__)

MEND = f'set {PREFIX}.{FLAG}=False for the old system'
KNOWN = ('lzero', 'lzero_kvcache', 'torch')

FORWARD = ('forward', '_add_position_embeddings', '_process_obs_act_combined', '_process_obs_act_combined_cont',
           '_transformer_pass')
"""Methods of LightZero's world model that the engine replaces."""

CACHING = ('reset_for_initial_inference', 'wm_forward_for_initial_infererence', 'retrieve_or_generate_kvcache',
           'update_cache_context', 'trim_and_pad_kv_cache')
"""Methods that the manager replaces."""


def check_served(world_model: Any) -> None:
    """Refuse a world model with several observation tokens a step, or with a user's own caching, attention, blocks,
    ``forward`` or hooks. Inference over pages would not call them: it reads the model's weights, and calls only the
    tokenizer and the modules of heads, norms, gates and MLPs."""
    tokens = world_model.config.tokens_per_block
    if tokens != 2:
        raise ConfigError(
            f'{PREFIX}.tokens_per_block={tokens}: the new cache serves 2, one observation token per step; {MEND}'
        )
    _check_options(world_model.config)
    for what in _passed_over(world_model):
        raise ConfigError(f"{what}, and the new cache's inference, which reads the weights, would pass over it; {MEND}")


def _check_options(world_model_cfg: Any) -> None:
    for option in lightzero.unserved_of(world_model_cfg):
        raise ConfigError(f'{PREFIX}.{option}, which the new cache does not know; {MEND}')


def tell_uncalled(manager: Any) -> None:
    """Warn of methods of a user's manager that no search calls."""
    by_hand = ('get_init_cache', 'set_init_cache', 'get_recur_cache', 'set_recur_cache', 'hierarchical_get',
               'get_wm_cache', 'set_wm_cache')
    own = [name for name in by_hand if is_own(manager, name)]
    if own:
        logger.warning(f'{type(manager).__name__} has a {" and a ".join(own)} of its own, which searches do not call: '
                       'they call find_init, store_init, find_recur and store_recur')


def is_own(owner: Any, name: str) -> bool:
    """Whether a method is a user's: set on the object, defined by a class that is neither LightZero's nor the
    plugin's, or put into one of theirs; False if there is none."""
    defining = next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)
    if name in vars(owner) or defining is None:
        return name in vars(owner)
    return not _is_known(defining.__module__) or not _is_written_by_known(vars(defining)[name])


def has_own_inference(model: Any, kind: str) -> bool:
    """Whether a model has a user's 'initial' or 'recurrent' inference, which must be called."""
    model = getattr(model, '_orig_mod', model)  # torch.compile wraps models
    return is_own(model, f'{kind}_inference') or is_own(model.world_model, f'forward_{kind}_inference')


def heads_of(world_model: Any) -> Tuple[Any, Any, Any, Any]:
    """The heads that predict rewards, observations, policies and values."""
    return world_model.head_rewards, world_model.head_observations, world_model.head_policy, world_model.head_value


def _passed_over(world_model: Any) -> Iterator[str]:
    transformer, heads = world_model.transformer, heads_of(world_model)
    attentions = [block.attn for block in transformer.blocks]
    for name in FORWARD + CACHING:
        if is_own(world_model, name):
            yield f'{type(world_model).__name__}.{name} is not LightZero\'s own'
    for module in (world_model, transformer, *transformer.blocks, *attentions, *heads):
        if is_own(module, 'forward'):
            yield f'{type(module).__name__}.forward is not LightZero\'s own'
    for attention in attentions:
        for name in ('query', 'key', 'value'):
            projection = getattr(attention, name)
            if type(projection) is not nn.Linear:
                yield f'{type(attention).__name__}.{name} is a {type(projection).__name__} and no Linear'
    for part in (transformer, *heads):
        for module in part.modules():
            has = added_to(module)
            if has is not None:
                yield f'a {type(module).__name__} of the {type(part).__name__} has {has}'


def added_to(module: nn.Module) -> Optional[str]:
    """The code that a call of a module runs beside its class's forward, or in its place."""
    if module._forward_hooks or module._forward_pre_hooks:  # spectral_norm's, say
        return 'a forward hook'
    return 'a forward of its own' if 'forward' in vars(module) else None


def has_own_encoding(tokenizer: Any) -> bool:
    """Whether encoding observations runs anything of a user's, which compiled functions and graphs would pass over."""
    return is_own(tokenizer, 'encode_to_obs_embeddings') or any(map(added_to, tokenizer.modules()))


def _is_written_by_known(function: Any) -> bool:
    """Whether a function, and every function that it wraps, is of a known package."""
    while function is not None:
        if not _is_known(getattr(function, '__globals__', {}).get('__name__', '')):
            return False
        function = getattr(function, '__wrapped__', None)
    return True


def _is_known(module: str) -> bool:
    return module.split('.')[0] in KNOWN


def check_actions(policy_cfg: Any) -> None:
    """Refuse a model and a world model of other numbers of actions: LightZero's C++ trees read past the end of the
    logits."""
    model = policy_cfg['model']
    size, of_world_model = (held.get('action_space_size') for held in (model, model['world_model_cfg']))
    if None not in (size, of_world_model) and size != of_world_model:
        raise ConfigError(f'policy.model.action_space_size={size!r} contradicts {PREFIX}.action_space_size='
                          f'{of_world_model!r}: they must be the same')


def check_policy(policy_cfg: Any, system: str) -> None:
    """Refuse a policy that LightZero cannot run or whose world model it does not build, and one that the new cache does
    not serve, or would serve in part."""
    in_c, random = policy_cfg['mcts_ctree'], policy_cfg['random_collect_episode_num']
    if not in_c:
        raise ConfigError(
            f'policy.mcts_ctree={in_c!r} cannot work: LightZero has no Python search for UniZero; set True'
        )
    if not isinstance(random, (int, float)) or random > 0:
        raise ConfigError(
            f'policy.random_collect_episode_num={random!r} cannot work: LightZero has no random policy for '
            'UniZero; set it to 0'
        )
    ratio = policy_cfg.get('reanalyze_ratio')
    if policy_cfg.get('sampled_algo') and ratio:
        raise ConfigError(
            f'policy.reanalyze_ratio={ratio!r} cannot work: LightZero fails where it puts reanalysed policies of '
            'Sampled UniZero into a batch; set it to 0'
        )
    world_model_cfg = policy_cfg['model']['world_model_cfg']
    reason = lightzero.unbuilt_of(world_model_cfg)
    if reason is not None:
        raise ConfigError(f'{PREFIX}.{reason}')
    if system != 'new':
        return
    reason = lightzero.unserved_policy(policy_cfg)
    if reason is not None:
        raise ConfigError(f'{reason}; {MEND}')
    _check_options(world_model_cfg)


def check_draws(policy_cfg: Any) -> None:
    """Refuse more drawn actions than there are: LightZero's sampled tree reads past the end of its logits."""
    model = policy_cfg['model']
    for key in ('num_of_sampled_actions', 'action_space_size'):
        if key not in model:
            raise missing(f'policy.model.{key}')
    drawn, actions = model['num_of_sampled_actions'], model['action_space_size']
    if not model['continuous_action_space'] and drawn > actions:
        raise ConfigError(
            f'policy.model.num_of_sampled_actions={drawn} must be at most policy.model.action_space_size={actions}: '
            'actions are drawn without repeats'
        )

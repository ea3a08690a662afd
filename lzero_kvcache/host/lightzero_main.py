"""LightZero's main branch."""
import copy
from collections import defaultdict
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from lzero.mcts import UniZeroGameBuffer
from lzero.model.unizero_world_models.transformer import Block, TransformerConfig, precompute_freqs_cis
from lzero.policy import DiscreteSupport, inverse_scalar_transform
from lzero.policy.unizero import UniZeroPolicy

from ..validation.trace import Trace
from .adapter import Adapter
from .kept_rows import Kept, KeptRows

CLEARS_EVERY = 2000
"""Steps after which its own caches are cleared, if a policy does not say it."""

_CHANGES_CONTEXTS = (
    ('exact_kv_window_reset', False, 'a full window would begin anew at its newest observation'),
    ('rebuild_kv_window_from_tokens', False, 'a full window would be computed anew from its tokens'),
    ('use_policy_logits_clip', False, 'policy logits would be clipped after the head'),
    ('task_embed_option', None, 'tokens would carry a task'),
    ('moe_in_transformer', False, 'MLPs would be mixtures of experts'),
    ('multiplication_moe_in_transformer', False, 'MLPs would be mixtures of experts'),
)


class KeptWithUniZerosResets(KeptRows):
    """Rows of the last batch, as Sampled UniZero keeps them. It inherits UniZero's reset methods, which put back single
    environments, and not these rows."""

    def reset(self, reset: Any, world_model: Any, *args: Any, **kwargs: Any) -> None:
        self.policy.pad_token_id = reset.__self__.pad_token_id
        observations = reset.__name__.replace('_reset', 'last_batch_obs')  # 'last_batch_obs_collect', or of 'eval'
        if observations not in vars(self.policy):
            super().reset(reset, world_model)  # of all environments, which makes what can be put back
        super().reset(reset, world_model, *args, **kwargs)


class KeptByEnvironment(KeptWithUniZerosResets):
    """The last observation and action of each environment, of collection and evaluation apart, as UniZero keeps them.
    Its roots are in the pools of their environments."""

    def has_begun(self, mode: str) -> bool:
        return f'last_batch_obs_{mode}' in vars(self.policy)

    def before(self, trace: Trace, env_num: int) -> Kept:
        observations, actions = f'last_batch_obs_{trace.mode}', f'last_batch_action_{trace.mode}'
        kept = vars(self.policy)
        if observations not in kept:
            assert trace.obs is not None
            kept[observations] = torch.zeros_like(trace.obs[:1]).repeat(env_num, *[1] * (trace.obs.dim() - 1))
            kept[actions] = [-1] * env_num
        last, taken = UniZeroPolicy._select_last_infer_inputs(
            self.policy, kept[observations], kept[actions], trace.env_ids, len(kept[actions]))
        return Kept(last, taken, trace.places, trace.env_ids)

    def after(self, trace: Trace, actions: Sequence[Any]) -> None:
        names = f'last_batch_obs_{trace.mode}', f'last_batch_action_{trace.mode}'
        UniZeroPolicy._update_last_infer_inputs(
            self.policy, *names, trace.obs, list(actions), trace.env_ids, len(getattr(self.policy, names[1])))


class PolicyWithRows:
    """UniZero finds the last step of each row by its environment, and copies it there for the next; in new mode it is
    handed the rows in their order, by :meth:`MainBranch.hand_rows`."""
    _options: Any

    def _select_last_infer_inputs(self, observations: torch.Tensor, actions: List[Any], *where: Any) -> Any:
        if self._options.system == 'new':
            return observations, actions
        return super()._select_last_infer_inputs(observations, actions, *where)  # type: ignore[misc]

    def _update_last_infer_inputs(self, *step: Any) -> None:
        if self._options.system != 'new':
            super()._update_last_infer_inputs(*step)  # type: ignore[misc]


class MainBranch(Adapter):
    """LightZero's main branch: what differs from the release."""

    NAME = 'main branch'
    SIGN = 'a block of its transformer has a feed_forward'
    SERVED = "UniZero, Sampled UniZero, UniZero with PPO, of one task; its own manager by kv_cache_cfg.type='lightzero'"
    BESIDE_VERSION = ' (main branch)'
    MLP = 'feed_forward'
    POLICIES = ('unizero', 'sampled_unizero', 'unizero_ppo')
    RECURRENT_SLOTS = 'shared_pool_size_recur'
    ANGLES_GROW = True
    KEEPS_REANALYSES = True
    INDEX_FOR_DEPTH = False
    HAS_MANAGER = True
    DIVIDE_EMBEDDING = ('num_heads', )
    UNROLLS_WITHIN_BLOCKS = False
    UPDATES_AT_LEAST_ONCE = True
    ADDS_UP_STEPS = False
    POLICY_BASE = PolicyWithRows
    POLICY_FIELDS = ('learn', 'collect')  # the first sets what collecting pads observations with
    SUPPORT = 'policy.model.value_support_range'
    SCALES = ()
    NEVER_CAUSES = ('stale_slot', 'padding')

    def longer_table(self, transformer: Any, first: int, last: int) -> Optional[torch.Tensor]:
        table = transformer.freqs_cis
        if first < 0:
            raise ValueError(
                f"a rotary angle of {first}, and this LightZero has none below 0: environments must return a "
                "'timestep', which is 0 at the first step of an episode alone"
            )
        if last < len(table):
            return None
        end = max(last + 1, 2 * len(table))
        return precompute_freqs_cis(transformer.rotary_head_dim, end, transformer.rope_theta).to(table.device)

    def values_of(self, logits: torch.Tensor, cfg: Any) -> torch.Tensor:
        return inverse_scalar_transform(logits, DiscreteSupport(*cfg.model.value_support_range))

    def searching_at_once(self, buffer: Any, mcts: Any) -> Any:
        """A copy, since LightZero's own gives as many roots at a time as there are environments."""
        if type(buffer)._search_reanalyzed_roots_in_chunks is not UniZeroGameBuffer._search_reanalyzed_roots_in_chunks:
            return None

        def search(model: Any, latent_state_roots: Any, legal_actions: Any, noises: Any, reward_pool: Any,
                   policy_logits_pool: Any, to_play: Any, root_timesteps: Any, root_token_contexts: Any = None) -> Any:
            roots = mcts.roots(len(legal_actions), legal_actions)
            roots.prepare(buffer._cfg.root_noise_weight, noises, reward_pool, policy_logits_pool, to_play)
            mcts(buffer._cfg).search(roots, model, latent_state_roots, to_play, root_timesteps)
            return roots.get_distributions()

        searching = copy.copy(buffer)
        searching._search_reanalyzed_roots_in_chunks = search
        return searching

    def unserved_of(self, config: Any) -> Iterator[str]:
        for name, harmless, meaning in _CHANGES_CONTEXTS:
            value = config.get(name, harmless)
            if value != harmless and value != 'none':
                yield f'{name}={value!r}: {meaning}'
        changed = config.get('lora_target_modules')
        if config.get('lora_r', 0) > 0 and config.get('curriculum_stage_num', 1) > 1 and 'attn' in (changed or ()):
            yield f'lora_target_modules={changed!r}: projections of attention would have low-rank changes'

    def unbuilt_of(self, config: Any) -> Optional[str]:
        if config.get('gru_gating'):
            sizes = dict(tokens_per_block=2, max_blocks=1, num_layers=1, num_heads=1, embed_dim=8)
            drops = dict(embed_pdrop=0., resid_pdrop=0., attn_pdrop=0.)
            try:  # somebody may have mended it
                Block(TransformerConfig(attention='causal', gru_gating=True, **sizes, **drops))
            except TypeError as error:
                return f"gru_gating=True cannot work: LightZero's gated block fails with {error}; set it to False"
        if config.get('rebuild_kv_window_from_tokens') and config.get('rotary_emb'):
            return ('rebuild_kv_window_from_tokens=True contradicts rotary_emb=True: LightZero rebuilds windows of '
                    'learned positions alone; set one of them to False')
        return None

    def unserved_policy(self, cfg: Any) -> Optional[str]:
        if cfg['model']['world_model_cfg'].get('obs_type') == 'text':
            return "policy.model.world_model_cfg.obs_type='text': its searches must return latent states to be decoded"
        for name in ('value_support_range', 'reward_support_range'):
            low, high, step = cfg['model'][name]
            if (low, step) != (1 - high, 1):
                return f'policy.model.{name}={cfg["model"][name]}: it must be (-n, n + 1, 1)'
        interval = cfg.get('kv_cache_clear_interval', CLEARS_EVERY)
        if interval != CLEARS_EVERY and interval > 0:
            return (f'policy.kv_cache_clear_interval={interval}: the new cache clears nothing after so many steps; '
                    'leave it out, or set it to 0')
        if cfg.get('contextual_reanalysis') and (cfg['reanalyze_ratio'] or cfg.get('buffer_reanalyze_freq')):
            return 'policy.contextual_reanalysis=True: roots of reanalyses would have contexts'
        return None

    def unserved_models(self) -> Iterator[Tuple[type, str, str]]:
        from lzero.model.sampled_unizero_model_multitask import SampledUniZeroMTModel
        from lzero.model.unizero_model_multitask import UniZeroMTModel
        tasks = 'its contexts and heads belong to tasks, and the new cache does not know task_id'
        yield UniZeroMTModel, 'UniZeroMTModel', tasks
        yield SampledUniZeroMTModel, 'SampledUniZeroMTModel', tasks

    def simulations_of(self, cfg: Any) -> int:
        given = [cfg.get(key) for key in ('num_simulations', 'collect_num_simulations', 'eval_num_simulations')]
        return max((number for number in given if isinstance(number, int)), default=0)

    def support_size(self, support: Any) -> Any:
        return len(range(*map(int, support)))

    def least_environments(self, policy: str) -> Tuple[Tuple[str, str], ...]:
        """A policy picks rows by environment, but for Sampled UniZero."""
        kinds = () if policy == 'sampled_unizero' else ('collector', 'evaluator')
        return tuple((f'policy.{kind}_env_num', f'env.{kind}_env_num') for kind in kinds)

    def world_model_of(self, model: Any, module: Any) -> type:
        return getattr(model, 'world_model_cls', module.WorldModel)

    def with_world_model(self, model: Any, kind: type) -> Dict[str, type]:
        """Some models name the class by an attribute."""
        if hasattr(model, 'world_model_cls'):
            model.world_model_cls = kind
            return {}
        return {'WorldModel': kind}

    def grow_recurrent_pool(self, world_model: Any) -> None:
        """The world model notes the key of each slot: here that is nobody's."""
        super().grow_recurrent_pool(world_model)
        world_model.pool_idx_to_key_map_recur_infer = defaultdict(lambda: None)
        world_model.pool_idx_to_key_map_init_envs = [defaultdict(lambda: None)]

    def environments_of(self, ready: Any) -> List[int]:
        return [int(env_id) for env_id in (sorted(ready) if isinstance(ready, set) else ready)]

    def hand_rows(self, policy: Any, mode: str, env_ids: Sequence[int], observations: torch.Tensor,
                  actions: List[Any]) -> None:
        if hasattr(policy, 'last_batch_obs'):  # Sampled UniZero
            return super().hand_rows(policy, mode, env_ids, observations, actions)
        setattr(policy, f'last_batch_obs_{mode}', observations)
        setattr(policy, f'last_batch_action_{mode}', actions)

    def kept_rows(self, policy: Any) -> KeptRows:
        return KeptWithUniZerosResets() if hasattr(policy, 'last_batch_obs') else KeptByEnvironment()

    def traverse_options(self, cfg: Any) -> Tuple[Any, ...]:
        return (cfg.deterministic,)

    def draws_ties(self, cfg: Any) -> bool:
        return not cfg.get('deterministic', False)

"""LightZero's world model over pages: the methods that LightZero calls, and when contexts are dropped."""
import logging
import zlib
from functools import partial
from typing import Any, ContextManager, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from lzero.model.unizero_world_models.world_model import WorldModel as LightZeroWorldModel

from ..cache.base import PagedCacheManager
from ..config import KV_CACHE_REGISTRY, OPTIONS, PREFIX, CacheConfig, ConfigError, handed_down
from ..engine.backends import picked
from ..engine.compiling import why_not_compiled
from ..engine.encoder_graph import EncoderGraph
from ..engine.sequence import observe
from ..engine.slab import Slab
from ..engine.store import PageStore
from ..engine.transfer import send
from ..engine.weights import Weights
from ..search.inference import Inference
from ..search.open_steps import OpenStep
from ..search.roots import actions_of
from ..search.timesteps import observed_at, timesteps_of
from ..validation import Validator
from .exact_reference import ExactReference
from .legacy_reference import LegacyReference
from .lightzero import VERSION, lightzero
from .network import read_network, what_is_missing
from .refused import check_served
from .weights import ModelWeights

logger = logging.getLogger(__name__)


class NewWorldModel(LightZeroWorldModel):
    """
    Overview:
        LightZero's world model whose contexts live in pages. Training is LightZero's own; root, recurrent and
        reanalysis inference run on the engine, for any batch at once. A subclass may have a loss, modules of heads and
        a recurrent inference of its own; the constructor refuses what the engine would pass over. Shapes: ``B`` rows,
        ``L`` steps of a sequence, ``E`` embedding, ``A`` numbers of a continuous action.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``.
        - tokenizer (:obj:`Any`): LightZero's tokenizer.
    Raises:
        - ConfigError: An option is wrong, or the new cache cannot serve this model.
    """
    use_new_cache_manager = True
    lightzero_version = VERSION

    def __init__(self, config: Any, tokenizer: Any) -> None:
        options = CacheConfig.of(config)
        logger.info('✓ Using NEW KVCacheManager for cache management')
        reference = LegacyReference if options.validation == 'legacy' else ExactReference
        self.validator = None if options.validation == 'off' else Validator(options, partial(reference, self))
        super().__init__(config, tokenizer)
        for name in ('shared_pool_recur_infer', 'shared_pool_init_infer', 'shared_pool_wm'):
            del self.__dict__[name]
        check_served(self)
        self.weights_source = ModelWeights(self)
        geometry = self.weights_source.geometry
        slab = Slab(geometry.layers, geometry.heads, geometry.head_dim, getattr(torch, options.dtype))
        self._store = PageStore(
            slab, f'lower kv_cache_cfg.init_pool_size={options.init_pool_size} or set kv_cache_cfg.max_memory_mb'
        )
        self.kv_cache_manager = _manager_of(config, options, self.env_num)
        self.kv_cache_manager.use_store(self._store)
        self.inference = Inference(
            self.weights_source, self.tokenizer.encode_to_obs_embeddings, self.kv_cache_manager, self._store, options,
            self.validator, partial(read_network, self)
        )
        self.encoder_graph = EncoderGraph(self.weights_source, self.tokenizer.encode_to_obs_embeddings)
        self._store.counted += [self.encoder_graph.graphs, self.weights_source.joined]
        self.timings = self.inference.timings
        self._options = options
        self._weights_place: Optional[Tuple[torch.device, Tuple[int, ...]]] = None
        self._told_weights_changed = False
        self._loaded = 0  # a checksum of the weights that were loaded last
        self._angles_grow = bool(config.rotary_emb) and lightzero.ANGLES_GROW
        # Why there are no searches in arrays, by kind of search and of device, and the weights' addresses then.
        self._why_not_in_arrays: Dict[Tuple[str, str], Tuple[Optional[str], Tuple[int, ...]]] = {}

    # ---- what LightZero's constructor, policy and loss reach for ---------------------------------------------------

    def _initialize_cache_structures(self) -> None:
        """Code around a world model asks LightZero's own caches for these: they stay empty."""
        self.past_kv_cache_recurrent_infer: Dict[Any, Any] = {}
        self.past_kv_cache_init_infer_envs: List[Dict[Any, Any]] = [{} for _ in range(self.env_num)]
        self.keys_values_wm_list: List[Any] = []
        self.keys_values_wm_size_list: List[Any] = []

    def _initialize_transformer_keys_values(self) -> None:
        """The working batch is gathered anew for each step."""

    def precompute_pos_emb_diff_kv(self) -> None:
        """
        Overview:
            Nothing to precompute: positions come from the weights as they are at each step. The reference of
            validation makes its tables.
        """
        if self.validator is not None:
            self.validator.reference.precompute()

    @property
    def hyperparameters(self) -> Dict[str, Any]:
        """The options that distinguish this cache from others."""
        options = self._options
        return dict(
            cache_system=options.type, eviction=options.eviction, init_pool_size=options.init_pool_size,
            recurrent_pool_size=options.recurrent_pool_size, env_num=options.env_num, dtype=options.dtype,
            context_length=self.context_length, backend=picked(options.backend, self.weights_source.device()),
        )

    def clear_caches(self) -> None:
        """
        Overview:
            Forget every context, and print which system was cleared; ``reanalyze_phase`` prints nothing.
        """
        self.forget()
        if not self.reanalyze_phase:
            print('Cleared WorldModel KV caches (NEW system).')

    def forget(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        """
        Overview:
            Forget the contexts of one environment, of a mode, or everything.
        Arguments:
            - mode (:obj:`Optional[str]`): 'collect' or 'eval'; None for both.
            - env_id (:obj:`Optional[int]`): The environment; None for all.
        Raises:
            - ValueError: There is no such mode.
        """
        if mode is None and env_id is None:
            self.kv_cache_manager.clear_all()
        else:
            self.kv_cache_manager.clear_init_caches(mode, env_id)
        self.inference.open.forget(mode, env_id)
        if self.validator is not None:
            self.validator.reference.forget(mode, env_id)

    def weights_changed(self, reason: str) -> None:
        """
        Overview:
            Drop the contexts that were made under older weights; the first time, log what changed them.
        Arguments:
            - reason (:obj:`str`): What changed them.
        """
        if not self._told_weights_changed:
            self._told_weights_changed = True
            logger.info(f'Weights changed ({reason}): contexts made under older ones are dropped, now and from now on')
        self.forget()

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.weights_changed('checkpoint loaded')
        norm = state_dict.get(prefix + 'transformer.ln_f.weight')
        self._loaded = 0 if norm is None else zlib.crc32(norm.detach().float().cpu().numpy())

    def seed_of(self, purpose: str) -> int:
        """
        Overview:
            The seed of what searches in arrays draw. It is another for each purpose, and another with the weights of a
            checkpoint, so that a resumed training does not repeat what it drew at its beginning.
        Arguments:
            - purpose (:obj:`str`): 'collect', 'eval' or 'reanalysis'.
        Returns:
            - seed (:obj:`int`): From 0 to ``2 ** 32 - 1``.
        """
        return zlib.crc32(repr((torch.initial_seed(), purpose, self._loaded)).encode())

    def _notice_moved_weights(self, addresses: Tuple[int, ...]) -> None:
        """Drop contexts if weights have moved. Addresses tell it: ``p.data = ...`` calls no hook, and version counters
        stand still under fused optimizers."""
        place = self.weights_source.device(), addresses
        before, self._weights_place = self._weights_place, place
        if before is not None and before != place and before[0] == place[0]:  # another device holds the same values
            self.weights_changed('their storage moved')

    def reserve_angles(self, start_pos: Any, depth: int, going: Any = 0) -> None:
        """
        Overview:
            Have rotary angles for roots and for the nodes below them. Does nothing without rotary positions, or where
            LightZero's angles repeat.
        Arguments:
            - start_pos (:obj:`Any`): Timesteps of the roots, ``[B]`` or one for all.
            - depth (:obj:`int`): Depth of the deepest node.
            - going (:obj:`Any`): Whether an action led to each root, ``[B]``, or one for all.
        Raises:
            - ValueError: A timestep needs an angle below 0, and LightZero has none.
        """
        if not self._angles_grow:
            return
        first = int(np.min(2 * np.asarray(start_pos, dtype=np.int64) - going))
        last = 2 * (int(np.max(start_pos)) + depth) + 3
        table = lightzero.longer_table(self.transformer, first, last)
        if table is not None:
            self._notice_moved_weights(self.weights_source.addresses())
            self.transformer.freqs_cis = table
            moved = self.weights_source.addresses()
            self._weights_place = self.weights_source.device(), moved  # no weight has moved: contexts stay
            for step in self.inference.open.steps:
                step.addresses = moved

    def why_not_in_arrays(self) -> Optional[str]:
        """
        Overview:
            Say why a search cannot be in arrays on the model's device, as the model is now.
        Returns:
            - reason (:obj:`Optional[str]`): None where it can.
        """
        device = self.weights_source.device()
        if device.type == 'cuda':
            return self.inference.engine.kernels.why_not(device)
        if device.type != 'cpu':
            return f'the model is on {device}'
        return why_not_compiled() or what_is_missing(self, self._store.slab.dtype)

    def searches_in_arrays(self, doing: str, addresses: Optional[Tuple[int, ...]] = None) -> bool:
        """
        Overview:
            Whether to search in arrays, or else in LightZero's tree: if ``kv_cache_cfg.search`` allows it, the model's
            device supports it, and the model is in evaluation mode. The log says where searches are, once for each
            kind of device, and again when weights at other addresses change that.
        Arguments:
            - doing (:obj:`str`): The log's word for what the search does: 'Searching', 'Reanalyzing'.
            - addresses (:obj:`Optional[Tuple[int, ...]]`): Of the weights; None to look them up.
        Returns:
            - in_arrays (:obj:`bool`): Whether to search in arrays.
        Raises:
            - ConfigError: A GPU cannot do what ``kv_cache_cfg.search='device'`` or ``matmul`` asks for.
        """
        if self._options.search == 'tree':
            return False
        kind, addresses = (doing, self.weights_source.device().type), addresses or self.weights_source.addresses()
        known = self._why_not_in_arrays.get(kind)
        if known is None or known[1] != addresses:
            reason = self.why_not_in_arrays()
            if known is None or known[0] != reason:
                self._tell_search(doing, reason)
            self._why_not_in_arrays[kind] = known = reason, addresses
        return not self.training and known[0] is None

    def _tell_search(self, doing: str, reason: Optional[str]) -> None:
        """Log where trees are, and why. Refuse options that a GPU cannot serve: LightZero's tree would take many times
        as long."""
        options, device = self._options, self.weights_source.device()
        told = f"{doing} in LightZero's tree, node by node"
        asked = ["kv_cache_cfg.search='device'"] * (options.search == 'device')
        asked += [f'kv_cache_cfg.matmul={options.matmul!r}'] * (options.matmul != 'float32')
        why, call = 'can be compiled for the CPU', 'one compiled call'
        if device.type == 'cuda':
            why, call = f'is on {device}, where triton runs', 'a graph that is replayed for each simulation'
        if reason is None:
            logger.info(f'{doing} in arrays, since the model {why}: a search is {call}')
        elif asked and device.type == 'cuda':
            raise ConfigError(
                f"{PREFIX}.{asked[0]} is not served here: {reason}; search='auto' with matmul='float32' searches in "
                "LightZero's tree"
            )
        elif asked:
            logger.warning(f'{told}, not as {asked[0]} asks: {reason}')
        else:
            logger.info(f'{told}: {reason}')

    # ---- inference -------------------------------------------------------------------------------------------------

    def open_step(self, mode: str, env_ids: Iterable[int], in_arrays: bool = False) -> ContextManager[OpenStep]:
        """
        Overview:
            Say whose rows the root inference inside has, and the search that follows it. Outside, row ``i`` is
            environment ``i`` of collection.
        Arguments:
            - mode (:obj:`str`): 'collect' or 'eval'.
            - env_ids (:obj:`Iterable[int]`): The environment of each row ``[B]``; no environment twice.
            - in_arrays (:obj:`bool`): Whether the search will be in arrays, where that can be; then a CPU runs the \
                root inference compiled too.
        Returns:
            - context (:obj:`ContextManager[OpenStep]`): To enter by ``with``; it gives the step.
        Raises:
            - ConfigError: As by :meth:`searches_in_arrays`.
            - ValueError: An environment has two rows.
        """
        addresses = self.weights_source.addresses()
        self._notice_moved_weights(addresses)
        in_arrays = in_arrays and self.searches_in_arrays('Searching', addresses)
        return self.inference.open.begin(mode, [int(env_id) for env_id in env_ids], addresses, in_arrays)

    @torch.no_grad()
    def forward_initial_inference(self, obs_act_dict: Dict[str, Any], start_pos: Any = 0) -> Tuple[Any, ...]:
        """
        Overview:
            The root inference of a search, or of a training batch's sequences; LightZero's own code answers sequences
            in training mode, or without a timestep of each step.
        Arguments:
            - obs_act_dict (:obj:`Dict[str, Any]`): ``current_obs [B, ...]``, and ``obs [B, ...]`` and ``action [B]`` \
                or ``[B, A]`` of the last step; an action of -1 starts an episode in its row. Of sequences \
                ``current_obs`` is None, ``obs [B (L + 1), ...]``, and ``action [B, L]`` or ``[B, L, A]``.
            - start_pos (:obj:`Any`): Timesteps of ``current_obs``, ``[B]`` or one for all; of sequences ``[B, L]``.
        Returns:
            - outputs (:obj:`Tuple[Any, ...]`): Output sequence ``[B, 1, E]``, latent state ``[B, 1, E]``, and the \
                logits of reward (empty), policy and value ``[B, 1, ...]``. Of sequences, latent state, policy \
                and value have ``B (L + 1)`` rows.
        Raises:
            - ValueError: The rows are not those of the open step, or more than environments (the message names the \
                key to raise); or as by :meth:`reserve_angles`.
            - RuntimeError: A step that was opened before the innermost one still awaits its roots.
            - FloatingPointError: A prediction has nan or inf, and ``kv_cache_cfg.on_nan`` is 'raise'.
            - OutOfPages: No memory is left for the contexts; the message names the key to change.
        """
        if obs_act_dict['current_obs'] is None:
            if self.training or np.ndim(start_pos) < 2:
                return super().forward_initial_inference(obs_act_dict, start_pos)
            return self._forward_sequences(obs_act_dict['obs'], obs_act_dict['action'], start_pos)
        actions, current_obs = obs_act_dict['action'], obs_act_dict['current_obs']
        if self._angles_grow:
            _, going = actions_of(self.weights_source.geometry, actions, len(current_obs))
            self.reserve_angles(timesteps_of(start_pos, len(going)), self._options.num_simulations, going)
        output = self.inference.roots.infer(obs_act_dict['obs'], actions, current_obs, start_pos)
        no_reward = output.logits_value.new_zeros(len(output.logits_value), 0, self.support_size)
        return output.output_sequence, output.latent_state, no_reward, output.logits_policy, output.logits_value

    def _forward_sequences(self, obs: torch.Tensor, actions: np.ndarray, timesteps: np.ndarray) -> Tuple[Any, ...]:
        """Sequences of observations ``[B (L + 1), ...]`` and actions ``[B, L]``; the last one's policy and value are
        those of the one before, as in LightZero."""
        latents = self.tokenizer.encode_to_obs_embeddings(obs)
        rows, steps = actions.shape[:2]
        weights, outputs = self.observed(latents.view(rows, steps + 1, -1)[:, :-1], actions, timesteps)
        policy, value = [
            torch.cat([logits, logits[:, -1:]], dim=1).flatten(0, 1)
            for logits in (weights.policy(outputs), weights.value(outputs))
        ]
        return outputs, latents, value.new_zeros(len(value), 0, self.support_size), policy, value

    def observed(self, latents: torch.Tensor, actions: np.ndarray,
                 timesteps: np.ndarray) -> Tuple[Weights, torch.Tensor]:
        """
        Overview:
            Run the transformer over whole sequences, each without a context.
        Arguments:
            - latents (:obj:`torch.Tensor`): Latent states of observations ``[B, L, E]``.
            - actions (:obj:`np.ndarray`): Actions ``[B, L]`` or ``[B, L, A]``; the last of each is not looked at.
            - timesteps (:obj:`np.ndarray`): Timesteps ``[B, L]``; only the first of each is looked at.
        Returns:
            - weights (:obj:`Weights`): The model's weights as they are now.
            - outputs (:obj:`torch.Tensor`): What heads predict from ``[B, L, E]``.
        Raises:
            - ValueError: As by :meth:`reserve_angles`.
        """
        self.reserve_angles(timesteps[:, 0], latents.shape[1])
        source = self.weights_source
        weights, geometry = source.read(False), source.geometry
        positions = observed_at(np.asarray(timesteps)[:, 0].astype(np.int64)) % max(1, geometry.rotary_positions)
        first, taken = send(source.device(), positions, actions[:, :-1])
        return weights, observe(geometry, weights, latents, taken, first if geometry.rotary else None)

    @torch.no_grad()
    def forward_recurrent_inference(self, state_action_history: Sequence[Any], simulation_index: int = 0,
                                    search_depth: Sequence[int] = (), start_pos: Any = 0) -> Tuple[Any, ...]:
        """
        Overview:
            One simulation: the node of each row, an action, and the node that follows.
        Arguments:
            - state_action_history (:obj:`Sequence[Any]`): Its last item is the latent states ``[B, 1, E]`` (numpy) \
                and the actions ``[B]`` or ``[B, A]`` (torch).
            - simulation_index (:obj:`int`): Not used; LightZero's signature.
            - search_depth (:obj:`Sequence[int]`): Depth of each row's node ``[B]``, for rotary positions; empty for 0.
            - start_pos (:obj:`Any`): Timesteps of the roots, ``[B]`` or one for all; in a reanalysis also as the \
                replay buffer has them, a row for each sequence.
        Returns:
            - outputs (:obj:`Tuple[Any, ...]`): Output sequence ``[B, 1, E]``, next latent state ``[B, 1, E]``, and \
                the logits of reward, policy and value ``[B, 1, ...]``.
        Raises:
            - ValueError: The rows are not those of the open step, or more than environments; or as by \
                :meth:`reserve_angles`.
            - FloatingPointError: A prediction has nan or inf, and ``kv_cache_cfg.on_nan`` is 'raise'. A reanalysis \
                whose rows have no contexts does not look.
            - OutOfPages: No memory is left for the contexts; the message names the key to change.
        """
        latent, action = state_action_history[-1]
        latent = np.ascontiguousarray(torch.as_tensor(latent).cpu().numpy(), dtype=np.float32)
        latent = latent.reshape(latent.shape[0], -1)
        self.reserve_angles(start_pos, max(search_depth, default=0))
        if self.reanalyze_phase and not (lightzero.KEEPS_REANALYSES and len(latent) <= self.env_num):
            output = self.inference.node_alone(latent, action, search_depth, start_pos)
        else:
            output = self.inference.node(latent, action, search_depth, start_pos, self.reanalyze_phase)
        return (output.output_sequence, output.latent_state, output.logits_rewards, output.logits_policy,
                output.logits_value)


def _manager_of(config: Any, options: CacheConfig, env_num: int) -> PagedCacheManager:
    """The manager that the options pick; a class registered under its name that is no manager is refused."""
    named, kind = f'{PREFIX}.{OPTIONS}.type={options.type!r}', KV_CACHE_REGISTRY[options.type]
    manager = None
    if callable(kind) and not (isinstance(kind, type) and not issubclass(kind, PagedCacheManager)):
        manager = kind(handed_down(config, options), env_num, options.enable_stats)
    if not isinstance(manager, PagedCacheManager):
        raise ConfigError(f'{named} is registered as {kind!r}, which makes no PagedCacheManager: derive it from that')
    pages, right = getattr(manager, 'context_pages', None), options.context_length // 2 - 1
    if pages != right:
        raise ConfigError(f'{named}: {type(manager).__name__}.context_pages={pages!r} must be {right}, which is '
                          f'context_length={options.context_length} / 2 - 1')
    return manager

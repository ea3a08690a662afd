"""LightZero's world model over pages. Joins the manager and the engine; knows LightZero."""
import logging
import time
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from lzero.model.unizero_world_models.world_model import WorldModel as LightZeroWorldModel

from .backend import Result, make_backend, picked
from .base_manager import PagedCacheManager
from .config import CacheConfig
from .engine import Engine, StepOutput
from .guard import NanGuard
from .host import hash_rows, reanalysis_timesteps_of, send, steps_after, timesteps_of, to_host
from .manager import COLLECT
from .nodes import NodeTable
from .pages import Rows, extend
from .registry import KV_CACHE_REGISTRY
from .stats import Timing
from .validation import Validator
from .weights import Weights

logger = logging.getLogger(__name__)


class Serving(NamedTuple):
    """
    Overview:
        Whose rows a root inference and its search have, and the model for as long as they take.
    """
    mode: str  # 'collect' or 'eval'
    env_ids: List[int]  # [B]
    weights: Weights


class NewWorldModel(LightZeroWorldModel):
    """
    Overview:
        LightZero's world model whose contexts live in pages. Training is LightZero's own; root, recurrent and
        reanalysis inference run on the engine, for any batch at once.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``.
        - tokenizer (:obj:`Any`): LightZero's tokenizer.
    Raises:
        - ConfigError: An option is wrong.
        - ValueError: The new cache cannot serve this model.
    """
    use_new_cache_manager = True

    def __init__(self, config: Any, tokenizer: Any) -> None:
        options = CacheConfig.read(config, KV_CACHE_REGISTRY)
        logger.info('✓ Using NEW KVCacheManager for cache management')
        self.validator = Validator(options) if options.validation != 'off' else None
        super().__init__(config, tokenizer)
        if self.validator is not None:
            self.validator.attach(self)
        for name in ('shared_pool_recur_infer', 'shared_pool_init_infer', 'shared_pool_wm'):
            del self.__dict__[name]
        self.cache_engine = Engine(self)
        self.kv_cache_manager: PagedCacheManager = KV_CACHE_REGISTRY[options.type](
            config, self.env_num, options.enable_stats
        )
        self.kv_cache_manager.storage.shift = self._shift
        self.kv_cache_manager.storage.blank = self._blank
        self._options = options
        self._backend = make_backend(options.backend, self.cache_engine)
        self._serving: Optional[Serving] = None
        self._roots: Optional[Tuple[Rows, np.ndarray]] = None
        self.timings = {'search': Timing(), 'step': Timing()}
        self._last_keys: Dict[Tuple[str, int], Any] = {}
        self._weights_place: Optional[Tuple[torch.device, Tuple[int, ...]]] = None
        self._told_weights_changed = False
        self._guard = NanGuard(options.on_nan, self.kv_cache_manager.count_skipped, options.dtype)

    # ---- what LightZero's constructor, policy and loss reach for ---------------------------------------------------

    def _initialize_cache_structures(self) -> None:
        """The pools are the manager's."""

    def _initialize_transformer_keys_values(self) -> None:
        """The working batch is gathered anew for each step."""

    def precompute_pos_emb_diff_kv(self) -> None:
        """
        Overview:
            Nothing to precompute: positions come from the weights as they are at each step.
        """
        if self.validator is not None:
            self.validator.precompute(self)

    @property
    def past_kv_cache_init_infer_envs(self) -> List['CacheView']:
        """A view for each environment's root contexts."""
        return [CacheView(self.kv_cache_manager.clear_init_caches, env_id=i) for i in range(self.env_num)]

    @property
    def past_kv_cache_recurrent_infer(self) -> 'CacheView':
        """A view on the running search's contexts."""
        return CacheView(self.kv_cache_manager.clear_recur_cache)

    @property
    def graph_memory_mb(self) -> float:
        """MiB that captured graphs hold beside the pages."""
        return self._backend.memory_mb

    @property
    def hyperparameters(self) -> Dict[str, Any]:
        """What tells this cache from others."""
        options = self._options
        return dict(
            cache_system='new', cache_manager=options.type, eviction=options.eviction,
            init_pool_size=options.init_pool_size, recurrent_pool_size=options.recurrent_pool_size,
            env_num=options.env_num, dtype=options.dtype, context_length=self.context_length,
            backend=picked(options.backend, self.cache_engine.device),
        )

    @property
    def keys_values_wm_list(self) -> 'CacheView':
        """A view on the working batch, which no step leaves behind."""
        return CacheView(lambda: None)

    def clear_caches(self) -> None:
        """
        Overview:
            Forget every context, and say which system was cleared.
        """
        self.forget()
        print('Cleared WorldModel KV caches (NEW system).')

    def forget(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        """
        Overview:
            Forget the contexts of one environment, of a mode, or everything.
        Arguments:
            - mode (:obj:`Optional[str]`): 'collect' or 'eval'; None for both.
            - env_id (:obj:`Optional[int]`): The environment; None for all.
        """
        if mode is None and env_id is None:
            self.kv_cache_manager.clear_all()
        else:
            self.kv_cache_manager.clear_init_caches(mode, env_id)
        for key in [key for key in self._last_keys if mode in (None, key[0]) and env_id in (None, key[1])]:
            del self._last_keys[key]
        if self.validator is not None:
            self.validator.forget(mode, env_id)

    def weights_changed(self, reason: str) -> None:
        """
        Overview:
            Drop the contexts that were made under older weights; the first time, say so.
        Arguments:
            - reason (:obj:`str`): What changed them.
        """
        if not self._told_weights_changed:
            self._told_weights_changed = True
            logger.info(f'Weights changed ({reason}): contexts made under older ones are dropped, now and from now on')
        self.forget()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.weights_changed('checkpoint loaded')

    def _notice_moved_weights(self) -> None:
        """``p.data = ...`` calls nobody, and version counters stand still under fused optimizers: look at addresses."""
        place = self.cache_engine.device, self.cache_engine.addresses()
        before, self._weights_place = self._weights_place, place
        if before is not None and before != place and before[0] == place[0]:  # another device holds the same values
            self.weights_changed('their storage moved')

    def _shift(self) -> Optional[torch.Tensor]:
        with torch.no_grad():
            return self.cache_engine.weights().shift

    def _blank(self) -> Any:
        return self.transformer.generate_empty_keys_values(n=1, max_tokens=self.context_length)

    # ---- inference -------------------------------------------------------------------------------------------------

    @contextmanager
    def serving(self, mode: str, env_ids: Iterable[int]) -> Iterator[None]:
        """
        Overview:
            Say whose rows the root inference inside has, and the search that follows it. Outside, row ``i`` is
            environment ``i`` of collection.
        Arguments:
            - mode (:obj:`str`): 'collect' or 'eval'.
            - env_ids (:obj:`Iterable[int]`): The environment of each row; no environment twice.
        """
        env_ids = [int(env_id) for env_id in env_ids]
        if len(set(env_ids)) < len(env_ids):
            raise ValueError(f'an environment has two rows: {env_ids}')
        self._notice_moved_weights()
        with torch.no_grad():
            self._serving = Serving(mode, env_ids, self.cache_engine.weights())
        self._new_keys: Dict[Tuple[str, int], Any] = {}
        if self.validator is not None:
            self.validator.open(mode, env_ids)
        try:
            yield
            self._last_keys.update(self._new_keys)  # a search that failed is no step of its environments
        finally:
            self._serving = self._roots = None
            self.kv_cache_manager.release()
            if self.validator is not None:
                self.validator.close()

    @torch.no_grad()
    def forward_initial_inference(self, obs_act_dict: Dict[str, Any], start_pos: Any = 0) -> Tuple[Any, ...]:
        """
        Overview:
            The root inference of a search, or the targets of a training batch (then ``current_obs`` is None, and it
            is LightZero's own).
        Arguments:
            - obs_act_dict (:obj:`Dict[str, Any]`): ``obs`` and ``action`` of the last step, ``current_obs``; an \
                action of -1 starts an episode in its row.
            - start_pos (:obj:`Any`): Timesteps of the current observations ``[B]``, or one for all.
        Returns:
            - outputs (:obj:`Tuple`): Output sequence ``[B, 1, E]``, latent state ``[B, 1, E]``, and the logits of \
                reward (empty), policy and value ``[B, 1, ...]``.
        Raises:
            - ValueError: More rows than environments; the message names the key to raise.
        """
        if obs_act_dict['current_obs'] is None:
            return super().forward_initial_inference(obs_act_dict, start_pos)
        self.kv_cache_manager.clear_recur_cache()
        output = self._root_step(obs_act_dict['obs'], obs_act_dict['action'], obs_act_dict['current_obs'], start_pos)
        no_reward = output.logits_value.new_zeros(len(output.logits_value), 0, self.support_size)
        return output.output_sequence, output.latent_state, no_reward, output.logits_policy, output.logits_value

    @torch.no_grad()
    def forward_recurrent_inference(self, state_action_history: Sequence[Any], simulation_index: int = 0,
                                    search_depth: Sequence[int] = (), start_pos: Any = 0) -> Tuple[Any, ...]:
        """
        Overview:
            One simulation: the node of each row, an action, and the node that follows.
        Arguments:
            - state_action_history (:obj:`Sequence`): Its last item is the latent states ``[B, 1, E]`` (numpy) and \
                the actions ``[B]``, or ``[B, A]`` for continuous ones.
            - simulation_index (:obj:`int`): Unused; LightZero's signature.
            - search_depth (:obj:`Sequence[int]`): Depth of each row's node, for rotary positions.
            - start_pos (:obj:`Any`): Timesteps of the roots.
        Returns:
            - outputs (:obj:`Tuple`): Output sequence, next latent state ``[B, 1, E]``, and the logits of reward, \
                policy and value ``[B, 1, ...]``.
        """
        latent, action = state_action_history[-1]
        latent = np.ascontiguousarray(torch.as_tensor(latent).cpu().numpy(), dtype=np.float32)
        latent = latent.reshape(latent.shape[0], -1)
        if self.reanalyze_phase:
            output = self._reanalysis_step(latent, action, search_depth, start_pos)
        else:
            start = time.perf_counter()
            output = self._node_step(latent, action, search_depth, start_pos)
            self.timings['step'].record(time.perf_counter() - start)
        return (output.output_sequence, output.latent_state, output.logits_rewards, output.logits_policy,
                output.logits_value)

    def _root_step(self, last_obs: torch.Tensor, last_actions: Sequence[Any], current_obs: torch.Tensor,
                   start_pos: Any) -> StepOutput:
        rows = current_obs.shape[0]
        mode, env_ids = self._rows_of(rows)
        timesteps = timesteps_of(start_pos, rows)
        latent = self.tokenizer.encode_to_obs_embeddings(current_obs).reshape(rows, -1)
        going = np.array([row < len(last_actions) and not self._is_first(last_actions[row]) for row in range(rows)])
        last_keys, sound, last_latents = self._last_roots(mode, env_ids, last_obs, going)
        manager, engine, weights = self.kv_cache_manager, self.cache_engine, self._weights()
        try:
            pages = manager.allocate(rows)
            tables, counts = np.zeros((rows, manager.width), np.int64), np.zeros(rows, np.int64)
            continued = np.flatnonzero(going)
            if len(continued):
                tables[continued], counts[continued] = manager.find_init(
                    mode, [env_ids[row] for row in continued], [last_keys[row] for row in continued]
                )
            missing = np.flatnonzero(going & (counts == 0))
            manager.count_queries('init', len(continued), len(continued) - len(missing))
            lost = missing[sound[missing]]  # from a root that was skipped an environment starts afresh
            anew = self._anew((tables, counts), lost, 2 * timesteps[lost])
            slab = manager.storage.ready(engine.device)
            if len(continued):
                actions = [last_actions[row] if going[row] else self._no_action() for row in range(rows)]
                numbers, begun = send(engine.device, engine.pack(
                    (tables, counts), pages, (2 * timesteps - 1, 2 * timesteps), np.asarray(actions)
                ), anew)
                if len(lost):
                    engine.begin(weights, slab, begun[0], last_latents()[begun[2]], begun[1])
                page_ids, page_counts, positions, action = engine.unpack(numbers)
                output = engine.step(weights, slab, page_ids, page_counts, action, positions, latent)
            else:
                [numbers] = send(engine.device, np.stack([pages, self._angle(2 * timesteps)]))
                output = engine.first(weights, slab, numbers[0], latent, numbers[1])
            on_host = to_host(torch.cat([latent, _soundness(output)], dim=1))
            kept = self._guard.finite(on_host[:, :-1], 'A latent state', mode, env_ids, timesteps)
            kept = kept[self._guard.finite(
                on_host[kept, -1:], 'A value or policy', mode, [env_ids[row] for row in kept], timesteps[kept]
            )]
            keys, roots = hash_rows(on_host[:, :-1]), extend((tables, counts), pages)
            manager.store_init(
                mode, [env_ids[row] for row in kept], [keys[row] for row in kept], (roots[0][kept], roots[1][kept])
            )
        except BaseException:
            manager.release()
            raise
        if self._serving is None:
            manager.release()
        else:  # the search that follows needs the roots' pages, whether a pool has kept them or not, and releases them
            self._roots = roots, timesteps
            self._new_keys = {(mode, env_id): None for env_id in env_ids}
            self._new_keys.update({(mode, env_ids[row]): keys[row] for row in kept})
        if self.validator is not None:
            self.validator.root(last_obs, last_actions, current_obs, timesteps, missing, output)
        return output if len(kept) == rows else output.map(_zero_for_nan)

    def _last_roots(self, mode: str, env_ids: List[int], last_obs: torch.Tensor,
                    going: np.ndarray) -> Tuple[Dict[int, Any], np.ndarray, Callable[[], torch.Tensor]]:
        """Keys of the last roots of the rows that go on, whether their latents are finite ``[B]``, and those latents.

        An environment that the policy follows has the key of its last root remembered, and its last observation is
        encoded only if that context is gone. For any other that is done here, and costs a copy to the host.
        """
        def encode() -> torch.Tensor:
            # All rows at once, as they were encoded when they were current: another batch size would change last bits.
            return self.tokenizer.encode_to_obs_embeddings(last_obs).reshape(len(last_obs), -1)

        followed = self._last_keys if self._serving is not None else {}
        last_keys = {row: followed.get((mode, env_ids[row])) for row in np.flatnonzero(going).tolist()}
        if None not in last_keys.values():
            return last_keys, going, encode
        last = encode()
        on_host = to_host(last)
        hashed = hash_rows(on_host)
        last_keys = {row: hashed[row] if key is None else key for row, key in last_keys.items()}
        return last_keys, np.isfinite(on_host).all(axis=1), lambda: last

    def _node_step(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int],
                   start_pos: Any) -> StepOutput:
        rows = len(latent)
        mode, env_ids = self._rows_of(rows)
        timesteps = timesteps_of(start_pos, rows)
        depths = steps_after(timesteps, search_depth)
        manager, weights = self.kv_cache_manager, self._weights()
        try:
            pages = manager.allocate(rows)
            tables, counts = manager.find_recur(mode, env_ids, hash_rows(latent))
            lost = np.flatnonzero(counts == 0)
            manager.count_queries('recur', rows, rows - len(lost))
            if len(lost):
                numbers, anew = send(
                    self.cache_engine.device, self._anew((tables, counts), lost, 2 * timesteps[lost]), latent[lost]
                )
                slab = manager.storage.ready(self.cache_engine.device)
                self.cache_engine.begin(weights, slab, numbers[0], anew, numbers[1])
            output = self._step(weights, (tables, counts), pages, action, (2 * depths + 1, 2 * depths + 2)).output
            if self._backend.reuses_output:
                output = output.map(torch.clone)
            on_host = to_host(torch.cat([output.latent_state.reshape(rows, -1), _soundness(output)], dim=1))
            kept = self._guard.finite(on_host[:, -1:], 'A reward, value or policy', mode, env_ids, timesteps)
            keys, nodes = hash_rows(on_host[:, :-1]), extend((tables, counts), pages)
            if len(kept) < rows:
                env_ids, keys = [env_ids[row] for row in kept], [keys[row] for row in kept]
                nodes = nodes[0][kept], nodes[1][kept]
            manager.store_recur(env_ids, keys, nodes)
        finally:
            manager.release()
        if self.validator is not None:
            self.validator.keyed_node(latent, action, search_depth, output)
        return output

    @contextmanager
    def search_by_node(self, simulations: int) -> Iterator[Callable[..., np.ndarray]]:
        """
        Overview:
            Search from the roots that were just served, by a function that expands one node of each row.
        Arguments:
            - simulations (:obj:`int`): How many nodes each row will get.
        Returns:
            - expand (:obj:`Callable`): To be called with the number of the simulation, for each row the node's index \
                in the search path and its row ``[B]``, the actions ``[B]`` or ``[B, A]``, and what LightZero's tree \
                passes as depths ``[B]``. It returns reward, value and policy logits ``[B, 2 + P]`` on the host; 0 \
                for what is skipped.
        Raises:
            - RuntimeError: No root inference was served.
        """
        if self._roots is None:
            raise RuntimeError('a search by node follows a root inference inside `serving`')
        rows, timesteps = self._roots
        start = time.perf_counter()
        try:
            yield partial(self._expand, self.kv_cache_manager.open_search(rows, simulations), timesteps)
        finally:
            self.kv_cache_manager.release()
        self.timings['search'].record(time.perf_counter() - start)

    @torch.no_grad()
    def _expand(self, nodes: NodeTable, timesteps: np.ndarray, simulation: int, path: np.ndarray, columns: np.ndarray,
                actions: np.ndarray, depths: Sequence[int]) -> np.ndarray:
        """One simulation of a search by node: one transfer there, one back."""
        start = time.perf_counter()
        rows, pages = nodes.expand(simulation, path, columns), nodes.pages[simulation]
        step = steps_after(timesteps, depths)
        result = self._step(self._weights(), rows, pages, actions, (2 * step + 1, 2 * step + 2))
        self.kv_cache_manager.count_queries('recur', len(pages), len(pages), by_node=True)
        assert result.search is not None  # the actions came from the host
        predicted = to_host(result.search)
        if self.validator is not None:
            self.validator.node(path, actions, depths, result.output)
        mode, env_ids = self._rows_of(len(pages))
        kept = self._guard.finite(predicted, 'A reward, value or policy', mode, env_ids, timesteps)
        self.timings['step'].record(time.perf_counter() - start)
        return predicted if len(kept) == len(predicted) else np.nan_to_num(predicted, posinf=0.0, neginf=0.0)

    def _reanalysis_step(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int],
                         start_pos: Any) -> StepOutput:
        """Every row stands alone here: LightZero looks nothing up during reanalysis."""
        engine, device = self.cache_engine, self.cache_engine.device
        positions = None
        if self.config.rotary_emb:
            timesteps = reanalysis_timesteps_of(start_pos, len(latent))
            # Both other tokens have the action's angle, as in LightZero's reanalysis.
            after = self._angle(2 * steps_after(timesteps, search_depth) + 3)
            positions, state = send(device, np.stack([self._angle(2 * timesteps), after, after]), latent)
        else:
            [state] = send(device, latent)
        return engine.step_alone(engine.weights(), state, torch.as_tensor(action).to(device), positions)

    def _anew(self, rows: Rows, lost: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Give rows whose contexts are lost a page each, and say what it takes to begin them there, all in one forward:
        the pages, their observations' angles and the rows, ``[3, L]``."""
        tables, counts = rows
        if not len(lost):
            return np.zeros((3, 0), dtype=np.int64)
        self.kv_cache_manager.hold(tables)
        pages = self.kv_cache_manager.allocate(len(lost))
        tables[lost, 0], counts[lost] = pages, 1
        return np.stack([pages, self._angle(positions), lost])

    def _step(self, weights: Weights, rows: Rows, pages: np.ndarray, action: Any,
              angles: Tuple[np.ndarray, np.ndarray]) -> Result:
        """A recurrent step; everything that comes from the host travels in one transfer."""
        slab = self.kv_cache_manager.storage.ready(self.cache_engine.device)
        given = torch.is_tensor(action)
        numbers = self.cache_engine.pack(rows, pages, angles, None if given else action)
        return self._backend.step(weights, slab, numbers, action.to(self.cache_engine.device) if given else None)

    def _angle(self, position: np.ndarray) -> np.ndarray:
        return position % self.config.max_seq_len if self.config.rotary_emb else position

    def _is_first(self, action: Any) -> bool:
        return not isinstance(action, np.ndarray) if self.continuous_action_space else int(action) == -1

    def _no_action(self) -> Any:
        return np.zeros(self.action_space_size, np.float32) if self.continuous_action_space else 0

    def _weights(self) -> Weights:
        """As they are now; nobody changes them inside a search that the policy serves."""
        return self.cache_engine.weights() if self._serving is None else self._serving.weights

    def _rows_of(self, rows: int) -> Tuple[str, List[int]]:
        if self._serving is None:
            return COLLECT, list(range(rows))
        mode, env_ids, _ = self._serving
        if len(env_ids) != rows:
            raise ValueError(f'{rows} rows for {len(env_ids)} environments {env_ids}')
        return mode, env_ids


class CacheView:
    """
    Overview:
        What is left of a LightZero cache that others reach for: something to clear.
    """

    def __init__(self, clear: Callable[..., None], **kwargs: Any) -> None:
        self._clear, self._kwargs = clear, kwargs

    def clear(self) -> None:
        """
        Overview:
            Forget what the view stands for.
        """
        self._clear(**self._kwargs)


def _soundness(output: StepOutput) -> torch.Tensor:
    """A number ``[B, 1]`` that is finite where reward, value and policy are: what is not tells of keys and values that
    are not."""
    parts = output.logits_rewards, output.logits_value, output.logits_policy
    return torch.cat([part for part in parts if part is not None], dim=-1).sum(-1)


def _zero_for_nan(part: torch.Tensor) -> torch.Tensor:
    """A search cannot do with nan or inf."""
    return part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

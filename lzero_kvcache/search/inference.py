"""Root, recurrent and reanalysis inference over pages. Joins the manager and the engine; of LightZero it knows a
tokenizer, no more."""
import time
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..cache.base import PagedCacheManager
from ..cache.manager import COLLECT
from ..cache.nodes import NodeTable
from ..cache.pages import Rows, extend
from ..cache.stats import Timing
from ..config import CacheConfig
from ..engine.launch import Result, make_backend
from ..engine.step import Engine, StepOutput
from ..engine.transfer import hash_rows, reanalysis_timesteps_of, send, steps_after, timesteps_of, to_host
from ..engine.weights import Weights
from .guard import NanGuard

FORGOTTEN = object()
"""Key of a last root whose context is known to be gone: nothing is stored under it."""


class Serving(NamedTuple):
    """
    Overview:
        Whose rows a root inference and its search have, and the model for as long as they take.
    """
    mode: str  # 'collect' or 'eval'
    env_ids: List[int]  # [B]
    weights: Weights
    trace: Any  # what validation notes of the search, or None


class Inference:
    """
    Overview:
        Everything between a batch's latent states and predictions: looks contexts up, begins those that are lost,
        steps, and stores what the step leaves.
    Arguments:
        - world_model (:obj:`Any`): Whose tokenizer encodes observations.
        - engine (:obj:`Engine`): Its transformer over pages.
        - manager (:obj:`PagedCacheManager`): Its contexts.
        - options (:obj:`CacheConfig`): ``backend``, ``on_nan`` and ``dtype`` of ``kv_cache_cfg``.
        - validator (:obj:`Any`): Opens a trace of each search; or None.
    """

    def __init__(self, world_model: Any, engine: Engine, manager: PagedCacheManager, options: CacheConfig,
                 validator: Any) -> None:
        self._wm, self._engine, self._manager, self._validator = world_model, engine, manager, validator
        self.backend = make_backend(options.backend, engine)
        self.timings = {'search': Timing(), 'step': Timing()}
        self._guard = NanGuard(options.on_nan, manager.count_skipped, options.dtype)
        self._serving: Optional[Serving] = None
        self._roots: Optional[Tuple[Rows, np.ndarray]] = None  # of the search that is served, and their timesteps
        self._last_keys: Dict[Tuple[str, int], Any] = {}  # None: the last root was skipped
        self._new_keys: Dict[Tuple[str, int], Any] = {}

    @contextmanager
    def serving(self, mode: str, env_ids: List[int]) -> Iterator[Any]:
        """
        Overview:
            As :meth:`NewWorldModel.serving`.
        """
        if len(set(env_ids)) < len(env_ids):
            raise ValueError(f'an environment has two rows: {env_ids}')
        trace = None if self._validator is None else self._validator.open(mode, env_ids)
        with torch.no_grad():
            self._serving = Serving(mode, env_ids, self._engine.weights(), trace)
        self._new_keys = {}
        try:
            yield trace
            self._last_keys.update(self._new_keys)  # a search that failed is no step of its environments
        finally:
            self._serving = self._roots = None
            self._manager.release()

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        """
        Overview:
            Forget the last roots of one environment, of a mode, or of all.
        """
        for key in [key for key in self._last_keys if mode in (None, key[0]) and env_id in (None, key[1])]:
            if self._last_keys[key] is None:
                del self._last_keys[key]
            else:
                self._last_keys[key] = FORGOTTEN

    # ---- roots -----------------------------------------------------------------------------------------------------

    def root(self, last_obs: torch.Tensor, last_actions: Sequence[Any], current_obs: torch.Tensor,
             start_pos: Any) -> StepOutput:
        """
        Overview:
            The roots of a search, each in its environment's context. One copy to the device, one back.
        Arguments:
            - last_obs (:obj:`torch.Tensor`), current_obs (:obj:`torch.Tensor`): Observations ``[B, ...]``.
            - last_actions (:obj:`Sequence[Any]`): What led from one to the other; -1 where an episode starts.
            - start_pos (:obj:`Any`): Timesteps of the current observations ``[B]``, or one for all.
        Returns:
            - output (:obj:`StepOutput`): The predictions, without rewards; 0 for what is skipped.
        """
        rows = current_obs.shape[0]
        mode, env_ids = self._rows_of(rows)
        timesteps = timesteps_of(start_pos, rows)
        latent = self._encode(current_obs)
        going = np.array([row < len(last_actions) and not self._is_first(last_actions[row]) for row in range(rows)])
        last_keys, sound, last_latents = self._last_roots(mode, env_ids, last_obs, going)
        manager = self._manager
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
            if len(continued):
                actions = np.asarray([last_actions[row] if going[row] else self._no_action() for row in range(rows)])
                output = self._continue((tables, counts), pages, timesteps, actions, latent, anew, last_latents)
            else:
                [numbers] = send(self._engine.device, np.stack([pages, self._angle(2 * timesteps)]))
                output = self._engine.first(self._weights(), self._slab(), numbers[0], latent, numbers[1])
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
        if self._trace is not None:
            self._trace.note_root(last_obs, last_actions, current_obs, timesteps, missing, output)
        return output if len(kept) == rows else output.map(_zero_for_nan)

    def _last_roots(self, mode: str, env_ids: List[int], last_obs: torch.Tensor,
                    going: np.ndarray) -> Tuple[Dict[int, Any], np.ndarray, Callable[[], torch.Tensor]]:
        """Keys of the last roots of the rows that go on, whether their latents are finite ``[B]``, and those latents.

        An environment that the policy follows has the key of its last root remembered, and its last observation is
        encoded only if that context is gone. For any other, and after a root that was skipped, that is done here, and
        costs a copy to the host.
        """
        followed = self._last_keys if self._serving is not None else {}
        last_keys = {row: followed.get((mode, env_ids[row])) for row in np.flatnonzero(going).tolist()}
        # All rows at once, as they were encoded when they were current: another batch size would change last bits.
        if None not in last_keys.values():
            return last_keys, going, partial(self._encode, last_obs)
        last = self._encode(last_obs)
        on_host = to_host(last)
        hashed = hash_rows(on_host)
        last_keys = {row: hashed[row] if key is None else key for row, key in last_keys.items()}
        return last_keys, np.isfinite(on_host).all(axis=1), lambda: last

    def _continue(self, rows: Rows, pages: np.ndarray, timesteps: np.ndarray, actions: np.ndarray,
                  latent: torch.Tensor, anew: np.ndarray, last_latents: Callable[[], torch.Tensor]) -> StepOutput:
        """An action and an observation that is given, for contexts of which some are begun anew before."""
        engine, weights, slab = self._engine, self._weights(), self._slab()
        numbers, begun = send(
            engine.device, engine.pack(rows, pages, (2 * timesteps - 1, 2 * timesteps), actions), anew
        )
        if anew.shape[1]:
            engine.begin(weights, slab, begun[0], last_latents()[begun[2]], begun[1])
        page_ids, page_counts, positions, action = engine.unpack(numbers)
        return engine.step(weights, slab, page_ids, page_counts, action, positions, latent)

    # ---- nodes -----------------------------------------------------------------------------------------------------

    def node(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int], start_pos: Any) -> StepOutput:
        """
        Overview:
            One simulation whose contexts are found by key. One copy to the device, one back; one more there where
            contexts are lost.
        Arguments:
            - latent (:obj:`np.ndarray`): Latent states of the nodes to expand ``[B, E]``.
            - action (:obj:`torch.Tensor`): ``[B]``, or ``[B, A]`` for continuous ones.
            - search_depth (:obj:`Sequence[int]`), start_pos (:obj:`Any`): Where the nodes are, for rotary positions.
        Returns:
            - output (:obj:`StepOutput`): The predictions; 0 for what is skipped.
        """
        rows = len(latent)
        mode, env_ids = self._rows_of(rows)
        timesteps = timesteps_of(start_pos, rows)
        depths = steps_after(timesteps, search_depth)
        manager, engine = self._manager, self._engine
        start = time.perf_counter()
        try:
            pages = manager.allocate(rows)
            tables, counts = manager.find_recur(mode, env_ids, hash_rows(latent))
            lost = np.flatnonzero(counts == 0)
            manager.count_queries('recur', rows, rows - len(lost))
            if len(lost):
                anew = self._anew((tables, counts), lost, 2 * timesteps[lost])
                begun, states = send(engine.device, anew, latent[lost])
                engine.begin(self._weights(), self._slab(), begun[0], states, begun[1])
            output = self._step((tables, counts), pages, action, depths).output
            if self.backend.reuses_output:
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
        if self._trace is not None:
            self._trace.note_keyed_node(latent, action, search_depth, output)
        self.timings['step'].record(time.perf_counter() - start)
        return output if len(kept) == rows else output.map(_zero_for_nan)

    @contextmanager
    def search_by_node(self, simulations: int) -> Iterator[Callable[..., np.ndarray]]:
        """
        Overview:
            As :meth:`NewWorldModel.search_by_node`.
        """
        if self._roots is None:
            raise RuntimeError('a search by node follows a root inference inside `serving`')
        rows, timesteps = self._roots
        start = time.perf_counter()
        try:
            yield partial(self.expand, self._manager.open_search(rows, simulations), timesteps, self._trace)
        finally:
            self._manager.release()
        self.timings['search'].record(time.perf_counter() - start)

    @torch.no_grad()
    def expand(self, nodes: NodeTable, timesteps: np.ndarray, trace: Any, simulation: int, path: np.ndarray,
               columns: np.ndarray, actions: np.ndarray, depths: Sequence[int]) -> np.ndarray:
        """
        Overview:
            One simulation of a search by node. One copy to the device, one back.
        Arguments:
            - nodes (:obj:`NodeTable`), timesteps (:obj:`np.ndarray`), trace (:obj:`Any`): Of the search that \
                :meth:`search_by_node` opened.
            - simulation (:obj:`int`): Its number.
            - path (:obj:`np.ndarray`), columns (:obj:`np.ndarray`): Index in the search path and row of each node.
            - actions (:obj:`np.ndarray`): ``[B]`` or ``[B, A]``.
            - depths (:obj:`Sequence[int]`): What LightZero's tree passes as depths ``[B]``.
        Returns:
            - predicted (:obj:`np.ndarray`): Reward, value and policy logits ``[B, 2 + P]``; 0 for what is skipped.
        """
        start = time.perf_counter()
        rows, pages = nodes.expand(simulation, path, columns), nodes.pages[simulation]
        result = self._step(rows, pages, actions, steps_after(timesteps, depths))
        self._manager.count_queries('recur', len(pages), len(pages), by_node=True)
        assert result.search is not None  # the actions came from the host
        predicted = to_host(result.search)
        if trace is not None:
            trace.note_node(path, actions, depths, result.output)
        mode, env_ids = self._rows_of(len(pages))
        kept = self._guard.finite(predicted, 'A reward, value or policy', mode, env_ids, timesteps)
        self.timings['step'].record(time.perf_counter() - start)
        return predicted if len(kept) == len(predicted) else np.nan_to_num(predicted, posinf=0.0, neginf=0.0)

    # ---- reanalysis ------------------------------------------------------------------------------------------------

    def reanalysis(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int],
                   start_pos: Any) -> StepOutput:
        """
        Overview:
            One simulation of a reanalysis; as :meth:`node`, but every row stands alone: LightZero looks nothing up.
        """
        engine = self._engine
        positions = None
        if engine.rotary:
            timesteps = reanalysis_timesteps_of(start_pos, len(latent))
            # Both other tokens have the action's angle, as in LightZero's reanalysis.
            after = self._angle(2 * steps_after(timesteps, search_depth) + 3)
            positions, state = send(engine.device, np.stack([self._angle(2 * timesteps), after, after]), latent)
        else:
            [state] = send(engine.device, latent)
        return engine.step_alone(engine.weights(), state, torch.as_tensor(action).to(engine.device), positions)

    # ---- what they share -------------------------------------------------------------------------------------------

    def _anew(self, rows: Rows, lost: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Give rows whose contexts are lost a page each, and say what it takes to begin them there, all in one forward:
        the pages, their observations' angles and the rows, ``[3, L]``."""
        tables, counts = rows
        if not len(lost):
            return np.zeros((3, 0), dtype=np.int64)
        self._manager.hold(tables)
        pages = self._manager.allocate(len(lost))
        tables[lost, 0], counts[lost] = pages, 1
        return np.stack([pages, self._angle(positions), lost])

    def _step(self, rows: Rows, pages: np.ndarray, action: Any, timesteps: np.ndarray) -> Result:
        """A recurrent step from nodes at ``timesteps``; everything that comes from the host travels in one copy."""
        given = torch.is_tensor(action)
        numbers = self._engine.pack(rows, pages, (2 * timesteps + 1, 2 * timesteps + 2), None if given else action)
        on_device = action.to(self._engine.device) if given else None
        return self.backend.step(self._weights(), self._slab(), numbers, on_device)

    def _encode(self, obs: torch.Tensor) -> torch.Tensor:
        return self._wm.tokenizer.encode_to_obs_embeddings(obs).reshape(len(obs), -1)

    def _slab(self) -> Any:
        return self._manager.storage.ready(self._engine.device)

    def _weights(self) -> Weights:
        """As they are now; nobody changes them inside a search that the policy serves."""
        return self._engine.weights() if self._serving is None else self._serving.weights

    @property
    def _trace(self) -> Any:
        return None if self._serving is None else self._serving.trace

    def _angle(self, position: np.ndarray) -> np.ndarray:
        return position % self._engine.max_seq_len if self._engine.rotary else position

    def _is_first(self, action: Any) -> bool:
        return not isinstance(action, np.ndarray) if self._wm.continuous_action_space else int(action) == -1

    def _no_action(self) -> Any:
        return np.zeros(self._wm.action_space_size, np.float32) if self._wm.continuous_action_space else 0

    def _rows_of(self, rows: int) -> Tuple[str, List[int]]:
        if self._serving is None:
            return COLLECT, list(range(rows))
        mode, env_ids = self._serving.mode, self._serving.env_ids
        if len(env_ids) != rows:
            raise ValueError(f'{rows} rows for {len(env_ids)} environments {env_ids}')
        return mode, env_ids


def _soundness(output: StepOutput) -> torch.Tensor:
    """A number ``[B, 1]`` that is finite where reward, value and policy are: what is not tells of keys and values that
    are not."""
    parts = output.logits_rewards, output.logits_value, output.logits_policy
    return torch.cat([part for part in parts if part is not None], dim=-1).sum(-1)


def _zero_for_nan(part: torch.Tensor) -> torch.Tensor:
    """A search cannot do with nan or inf."""
    return part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

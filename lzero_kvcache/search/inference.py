"""Root, recurrent and reanalysis inference over pages. Of the host it knows weights and an encoder of observations.

``B`` rows, ``E`` embedding, ``A`` numbers of a continuous action, ``P`` policy logits. A latent state is ``[B, E]``.
"""
import threading
import time
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Deque, Hashable, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch

from ..cache.base import CURRENT, PagedCacheManager
from ..cache.manager import COLLECT
from ..cache.nodes import NodeTable
from ..cache.pages import SCRATCH_PAGE, Lease, Rows, extend
from ..cache.stats import Timing
from ..config import CacheConfig
from ..engine.launch import Result, make_backend
from ..engine.packing import pack, unpack
from ..engine.slab import MIB
from ..engine.step import Engine, StepOutput
from ..engine.store import PageStore
from ..engine.transfer import send, to_cpu
from ..engine.weights import Source, Weights
from .guard import NanGuard
from .rows import hash_rows, reanalysis_timesteps_of, steps_after, timesteps_of
from .whole import Problem, WholeSearch


class Served:
    """A step of some environments: their root inference, and the search that follows it. It owns its roots' pages."""

    def __init__(self, mode: str, env_ids: List[int], addresses: Tuple[int, ...], lease: Lease, trace: Any) -> None:
        self.mode, self.env_ids = mode, env_ids
        self.addresses = addresses  # of the weights
        self.lease = lease
        self.trace = trace  # what its validation notes; or None
        self.weights: Any = None  # as the root inference read them: nobody changes them inside a search
        self.roots: Optional[Rows] = None
        self.before: Optional[Rows] = None  # the environments' roots before this step
        self.superseded: Set[int] = set()  # environments whose root is no longer of this step
        self.kept = np.zeros(0, np.int64)  # rows whose root was stored
        self.timesteps = np.zeros(0, np.int64)  # [B]
        self.latents: Optional[torch.Tensor] = None  # [B, E], of the roots
        self.keys: Optional[Tuple[List[int], List[Hashable]]] = None  # environments and keys, if searched by key
        self.searches = 0  # how many by node are running


class _Open(threading.local):
    """The steps that are being served, the innermost last. Each thread has its own, and so has each copy of a model."""

    def __init__(self) -> None:
        self.steps: List[Served] = []

    def __reduce__(self) -> Any:
        return type(self), ()


class Inference:
    """Everything between a batch's latent states and its predictions: looks contexts up, begins anew those that are
    lost, steps, and stores the contexts that the step made."""

    def __init__(self, source: Source, encode: Callable[[torch.Tensor], torch.Tensor], manager: PagedCacheManager,
                 store: PageStore, options: CacheConfig, validator: Any,
                 read_network: Callable[[], Any]) -> None:
        self.engine = Engine(source.geometry)
        self.backend = make_backend(options.backend, self.engine, source, SCRATCH_PAGE)
        self.timings = {'search': Timing(), 'step': Timing()}
        self._source, self._encode, self._manager, self._store = source, encode, manager, store
        self._validator = validator
        self._guard = NanGuard(options.on_nan, manager.count_skipped, options.dtype)
        self._open = _Open()
        self._whole = WholeSearch(read_network, source, manager, store, self._guard, self.timings)
        self._abandoned: Deque[Served] = deque()  # steps that were entered and never left
        store.beside += [self.backend, _WindowMemory(self.engine)]

    @contextmanager
    def serving(self, mode: str, env_ids: List[int], addresses: Tuple[int, ...]) -> Iterator[Served]:
        """A context in which the root inference, and the search that follows it, are those of some environments."""
        if len(set(env_ids)) < len(env_ids):
            raise ValueError(f'an environment has two rows: {env_ids}')
        self._end_abandoned()
        trace = None if self._validator is None else self._validator.open(mode, env_ids)
        served = Served(mode, env_ids, addresses, self._manager.lease(), trace)
        steps = self._open.steps
        steps.append(served)
        try:
            yield served
            self._forget_keys(served)
        except GeneratorExit:
            self._abandoned.append(served)  # this may be garbage, which is collected in the middle of anything
            raise
        except BaseException:
            self._end_failed(served)
            raise
        else:
            served.lease.release()
            for other in [*steps, *self._abandoned]:
                if other is not served and other.mode == mode:
                    other.superseded.update(env_ids)
        finally:
            steps.remove(served)

    def _end_abandoned(self) -> None:
        while self._abandoned:
            self._end_failed(self._abandoned.popleft())

    def _end_failed(self, served: Served) -> None:
        with served.lease:
            self._undo(served)
            self._forget_keys(served)

    def _forget_keys(self, served: Served) -> None:
        if served.keys is not None:
            self._manager.forget_init(served.mode, *served.keys)

    def _undo(self, served: Served) -> None:
        """Put back the roots that the environments had before a step that failed."""
        if served.before is None:
            return
        undone = [row for row, env_id in enumerate(served.env_ids) if env_id not in served.superseded]
        for row in undone:
            self._manager.clear_init_caches(served.mode, served.env_ids[row])
        there = [row for row in undone if served.before[1][row]]
        if there:
            rows = served.before[0][there], served.before[1][there]
            self._manager.store_init(served.mode, [served.env_ids[row] for row in there], [CURRENT] * len(there), rows)

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        """The roots of an environment, of a mode, or all were cleared: let no open search by key find them, and no step
        that fails put them back."""
        for step in [*self._open.steps, *self._abandoned]:
            if mode in (None, step.mode):
                left = [row for row in step.kept if env_id not in (None, step.env_ids[row])]
                step.kept = np.array(left, dtype=np.int64)
                step.superseded.update(step.env_ids if env_id is None else [env_id])

    def _innermost(self, is_fitting: Callable[[Served], bool]) -> Optional[Served]:
        """The innermost open step, if it fits: LightZero's code does not pass along which step it is in."""
        steps = self._open.steps
        return steps[-1] if steps and is_fitting(steps[-1]) else None

    # ---- roots -----------------------------------------------------------------------------------------------------

    def root(self, last_obs: torch.Tensor, last_actions: Sequence[Any], current_obs: torch.Tensor,
             start_pos: Any) -> StepOutput:
        """The roots of a search, each in its environment's context; one copy to the device, one back.

        ``last_actions [B]`` led from ``last_obs`` to ``current_obs [B, ...]``; -1 where an episode starts. The
        predictions have no rewards, and are 0 for what is skipped. A served step has one root inference, which finds
        its contexts by environment. Any other is of environments 0 to ``B - 1`` of collection, and finds them by key.
        """
        self._end_abandoned()
        rows = len(current_obs)
        served = self._innermost(lambda step: step.roots is None)
        if len(self._open.steps) <= (served is not None):
            self._manager.clear_recur_cache()  # unless a search around this one needs its nodes
        if served is not None:
            _check_rows(served, rows)
            return self._root(served, False, last_obs, last_actions, current_obs, timesteps_of(start_pos, rows))
        with self._manager.lease() as lease:
            by_hand = Served(COLLECT, list(range(rows)), (), lease, None)
            return self._root(by_hand, True, last_obs, last_actions, current_obs, timesteps_of(start_pos, rows))

    def _root(self, step: Served, by_key: bool, last_obs: torch.Tensor, last_actions: Sequence[Any],
              current_obs: torch.Tensor, timesteps: np.ndarray) -> StepOutput:
        manager, mode, env_ids = self._manager, step.mode, step.env_ids
        step.weights = self._source.read(False)
        rows, latent = len(current_obs), self._latents(current_obs)
        going = np.array([row < len(last_actions) and not self._is_first(last_actions[row]) for row in range(rows)])
        contexts, last, missing = self._last_contexts(step, by_key, last_obs, going)
        manager.count_queries('init', int(going.sum()), int(going.sum()) - len(missing))
        before = contexts[0].copy(), contexts[1].copy()
        pages = step.lease.allocate(rows)
        if going.any():
            lost = missing
            if self._guard.skips and last is not None and len(missing):  # what was skipped is no context to begin from
                lost = missing[to_cpu(torch.isfinite(last).all(1))[missing]]
            anew = self._begin_anew(step.lease, contexts, lost, 2 * timesteps[lost])
            actions = np.asarray([last_actions[row] if going[row] else self._no_action() for row in range(rows)])
            output = self._continue(step.weights, contexts, pages, timesteps, actions, latent, anew, last)
        else:
            [numbers] = send(self._source.device(), np.stack([pages, self._angle(2 * timesteps)]))
            output = self.engine.first(step.weights, self._slab(), numbers[0], latent, numbers[1])
        # Keys need whole latent states; otherwise a sum is enough to see whether they are finite.
        states = latent if by_key else latent.sum(1, keepdim=True)
        on_cpu = to_cpu(torch.cat([states, _checksum(output)], dim=1))
        kept = self._finite_roots(on_cpu, step, timesteps)
        roots = extend(contexts, pages)
        kept_ids, kept_roots = [env_ids[row] for row in kept], (roots[0][kept], roots[1][kept])
        if by_key:
            keys = hash_rows(on_cpu[:, :-1])
            manager.store_init(mode, kept_ids, [keys[row] for row in kept], kept_roots)
        else:
            step.roots, step.before, step.kept = roots, before, kept
            step.timesteps, step.latents = timesteps, latent
            for env_id in set(env_ids).difference(kept_ids):  # an environment whose root was skipped begins afresh
                manager.clear_init_caches(mode, env_id)
            if kept_ids:
                manager.store_init(mode, kept_ids, [CURRENT] * len(kept_ids), kept_roots)
        if step.trace is not None:
            step.trace.note_root(last_obs, last_actions, current_obs, timesteps, missing, output)
        return output if len(kept) == rows else output.map(_zero_for_nan)

    def _last_contexts(self, step: Served, by_key: bool, last_obs: torch.Tensor,
                       going: np.ndarray) -> Tuple[Rows, Optional[torch.Tensor], np.ndarray]:
        """The contexts of the last roots, the last latent states where they are needed, and the rows whose context is
        missing. By environment, last observations are encoded only if a context is missing."""
        manager, rows = self._manager, len(going)
        tables, counts = np.zeros((rows, manager.width), np.int64), np.zeros(rows, np.int64)
        # All rows at once, as they were encoded when they were current: another batch size would change last bits.
        last = self._latents(last_obs) if by_key and going.any() else None
        continued = np.flatnonzero(going)
        if len(continued):
            keys: List[Hashable] = [CURRENT] * len(continued)
            if last is not None:
                hashed = hash_rows(to_cpu(last))
                keys = [hashed[row] for row in continued]
            env_ids = [step.env_ids[row] for row in continued]
            tables[continued], counts[continued] = manager.find_init(step.mode, env_ids, keys)
            step.lease.hold(tables)
        missing = np.flatnonzero(going & (counts == 0))
        if len(missing) and last is None:
            last = self._latents(last_obs)
        return (tables, counts), last, missing

    def _continue(self, weights: Weights, rows: Rows, pages: np.ndarray, timesteps: np.ndarray, actions: np.ndarray,
                  latent: torch.Tensor, anew: np.ndarray, last: Optional[torch.Tensor]) -> StepOutput:
        """An action and an observation that is given, for contexts of which some are begun anew before."""
        engine, slab = self.engine, self._slab()
        angles = 2 * timesteps - 1, 2 * timesteps
        packed = pack(engine.geometry, rows, pages, angles, actions, int(rows[1].max()))
        numbers, begun = send(self._source.device(), packed, anew)
        if anew.shape[1]:
            assert last is not None
            engine.begin(weights, slab, begun[0], last[begun[2]], begun[1])
        page_ids, page_counts, positions, action = unpack(engine.geometry, numbers)
        return engine.step(weights, slab, page_ids, page_counts, action, positions, latent)

    def _finite_roots(self, on_cpu: np.ndarray, step: Served, timesteps: np.ndarray) -> np.ndarray:
        """Rows ``[K]`` whose latent state, value and policy are finite."""
        kept = self._guard.finite(on_cpu[:, :-1], 'A latent state', step.mode, step.env_ids, timesteps)
        return kept[self._guard.finite(
            on_cpu[kept, -1:], 'A value or policy', step.mode, [step.env_ids[row] for row in kept], timesteps[kept]
        )]

    # ---- nodes by key ----------------------------------------------------------------------------------------------

    def node(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int], start_pos: Any) -> StepOutput:
        """One simulation whose contexts are found by key; one copy to the device, one back, one more there where
        contexts are lost. The predictions are 0 for what is skipped."""
        start = time.perf_counter()
        rows, timesteps = len(latent), timesteps_of(start_pos, len(latent))
        served = self._innermost(lambda step: not step.searches)  # a search by node asks for nothing by key
        mode, env_ids, weights = COLLECT, list(range(rows)), None
        if served is not None:
            _check_rows(served, rows)
            mode, env_ids, weights = served.mode, served.env_ids, served.weights
            self._give_roots_keys(served)
        with self._manager.lease() as lease:
            output, kept = self._node(
                lease, weights or self._source.read(False), mode, env_ids, latent, action, timesteps,
                steps_after(timesteps, search_depth)
            )
        if served is not None and served.trace is not None:
            served.trace.note_keyed_node(latent, action, search_depth, output)
        self.timings['step'].record(time.perf_counter() - start)
        return output if len(kept) == rows else output.map(_zero_for_nan)

    def _node(self, lease: Lease, weights: Weights, mode: str, env_ids: List[int], latent: np.ndarray,
              action: torch.Tensor, timesteps: np.ndarray, depths: np.ndarray) -> Tuple[StepOutput, np.ndarray]:
        manager, rows, device = self._manager, len(latent), self._source.device()
        pages = lease.allocate(rows)
        contexts = manager.find_recur(mode, env_ids, hash_rows(latent))
        lost = np.flatnonzero(contexts[1] == 0)
        manager.count_queries('recur', rows, rows - len(lost))
        lease.hold(contexts[0])
        if len(lost):
            anew = self._begin_anew(lease, contexts, lost, 2 * timesteps[lost])
            begun, states = send(device, anew, latent[lost])
            self.engine.begin(weights, self._slab(), begun[0], states, begun[1])
        output = self._step(weights, contexts, pages, depths, None, action.to(device), int(contexts[1].max())).output
        if self.backend.reuses_output:
            output = output.map(torch.clone)
        on_cpu = to_cpu(torch.cat([output.latent_state.reshape(rows, -1), _checksum(output)], dim=1))
        kept = self._guard.finite(on_cpu[:, -1:], 'A reward, value or policy', mode, env_ids, timesteps)
        keys, nodes = hash_rows(on_cpu[:, :-1]), extend(contexts, pages)
        manager.store_recur(
            [env_ids[row] for row in kept], [keys[row] for row in kept], (nodes[0][kept], nodes[1][kept])
        )
        return output, kept

    def _give_roots_keys(self, served: Served) -> None:
        """Store the roots under keys too, so that a search by key finds them as it finds nodes."""
        if served.roots is None or served.keys is not None:
            return
        assert served.latents is not None
        kept, hashed = served.kept, hash_rows(to_cpu(served.latents))
        served.keys = [served.env_ids[row] for row in kept], [hashed[row] for row in kept]
        self._manager.store_init(served.mode, *served.keys, (served.roots[0][kept], served.roots[1][kept]))

    # ---- nodes by their place in the search ------------------------------------------------------------------------

    @contextmanager
    def search_by_node(self, simulations: int) -> Iterator[Callable[..., np.ndarray]]:
        """A context for a search from the roots that were just served; gives :meth:`expand` for it."""
        served = self._innermost(lambda step: step.roots is not None)
        if served is None or served.roots is None:
            raise RuntimeError('a search by node follows a root inference inside `serving`')
        start = time.perf_counter()
        served.searches += 1
        try:
            with self._manager.lease() as lease:
                lease.hold(served.roots[0])
                nodes = NodeTable(served.roots, lease.allocate(simulations * len(served.env_ids)))
                self._manager.count_nodes(nodes.pages.size)
                yield partial(self.expand, served, nodes)
        finally:
            served.searches -= 1
        self.timings['search'].record(time.perf_counter() - start)

    @torch.no_grad()
    def expand(self, served: Served, nodes: NodeTable, simulation: int, path: np.ndarray, columns: np.ndarray,
               actions: np.ndarray, depths: Sequence[int]) -> np.ndarray:
        """One simulation of a search by node; one copy to the device, one back.

        ``path [B]`` and ``columns [B]`` are the index in the search path and the row of each node, ``depths [B]`` what
        LightZero's tree passes as such. Returns reward, value and policy logits ``[B, 2 + P]``; 0 for what is skipped.
        """
        start = time.perf_counter()
        contexts, pages = nodes.expand(simulation, path, columns), nodes.pages[simulation]
        result = self._step(
            served.weights, contexts, pages, steps_after(served.timesteps, depths), actions, None,
            nodes.longest(simulation)
        )
        self._manager.count_queries('recur', len(pages), len(pages), by_node=True)
        assert result.search is not None  # the actions came from the CPU
        predicted = to_cpu(result.search)
        if served.trace is not None:
            served.trace.note_node(path, actions, depths, result.output)
        what = 'A reward, value or policy'
        kept = self._guard.finite(predicted, what, served.mode, served.env_ids, served.timesteps)
        self.timings['step'].record(time.perf_counter() - start)
        return predicted if len(kept) == len(predicted) else np.nan_to_num(predicted, posinf=0.0, neginf=0.0)

    # ---- whole searches --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search_whole(self, problem: Problem) -> Any:
        """Search from the roots that were just served, in one compiled call; returns the trees."""
        served = self._innermost(lambda step: step.roots is not None)
        if served is None:
            raise RuntimeError('a search follows a root inference inside `serving`')
        return self._whole.run(served, problem)

    # ---- reanalysis ------------------------------------------------------------------------------------------------

    def reanalysis(self, latent: np.ndarray, action: torch.Tensor, search_depth: Sequence[int],
                   start_pos: Any) -> StepOutput:
        """One simulation of a reanalysis: as :meth:`node`, but rows have no contexts, and none is stored."""
        device, positions = self._source.device(), None
        if self.engine.geometry.rotary:
            timesteps = reanalysis_timesteps_of(start_pos, len(latent))
            # Both other tokens have the action's angle, as in LightZero's reanalysis.
            after = self._angle(2 * steps_after(timesteps, search_depth) + 3)
            positions, state = send(device, np.stack([self._angle(2 * timesteps), after, after]), latent)
        else:
            [state] = send(device, latent)
        return self.engine.step_alone(self._source.read(False), state, torch.as_tensor(action).to(device), positions)

    # ---- what they share -------------------------------------------------------------------------------------------

    def _begin_anew(self, lease: Lease, rows: Rows, lost: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Give rows whose contexts are lost a page each. Returns what it takes to begin them there in one forward: the
        pages, their observations' angles and the rows, ``[3, K]``."""
        tables, counts = rows
        if not len(lost):
            return np.zeros((3, 0), dtype=np.int64)
        pages = lease.allocate(len(lost))
        tables[lost, 0], counts[lost] = pages, 1
        return np.stack([pages, self._angle(positions), lost])

    def _step(self, weights: Weights, rows: Rows, pages: np.ndarray, timesteps: np.ndarray,
              actions: Optional[np.ndarray], on_device: Optional[torch.Tensor], longest: int) -> Result:
        """A recurrent step from nodes at ``timesteps``; everything that comes from the CPU travels in one copy."""
        angles = 2 * timesteps + 1, 2 * timesteps + 2
        numbers = pack(self.engine.geometry, rows, pages, angles, actions, longest)
        return self.backend.step(weights, self._slab(), numbers, on_device)

    def _latents(self, obs: torch.Tensor) -> torch.Tensor:
        return self._encode(obs).reshape(len(obs), -1)

    def _slab(self) -> Any:
        return self._store.ready(self._manager.page_capacity, self._source.device())

    def _angle(self, position: np.ndarray) -> np.ndarray:
        geometry = self.engine.geometry
        return position % geometry.rotary_positions if geometry.rotary else position

    def _is_first(self, action: Any) -> bool:
        return not isinstance(action, np.ndarray) if self.engine.geometry.continuous else int(action) == -1

    def _no_action(self) -> Any:
        geometry = self.engine.geometry
        return np.zeros(geometry.action_size, np.float32) if geometry.continuous else 0


class _WindowMemory:
    """What an engine keeps for gathered windows, as the store counts it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def memory_mb(self) -> float:
        return self._engine.window.bytes / MIB


def _check_rows(served: Served, rows: int) -> None:
    if len(served.env_ids) != rows:
        raise ValueError(f'{rows} rows for {len(served.env_ids)} environments {served.env_ids}')


def _checksum(output: StepOutput) -> torch.Tensor:
    """A sum ``[B, 1]`` that is finite where reward, value and policy are. If these are finite, so are the keys and
    values that they were computed with."""
    parts = output.logits_rewards, output.logits_value, output.logits_policy
    return torch.cat([part for part in parts if part is not None], dim=-1).sum(-1)


def _zero_for_nan(part: torch.Tensor) -> torch.Tensor:
    """LightZero's trees cannot handle nan or inf."""
    return part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

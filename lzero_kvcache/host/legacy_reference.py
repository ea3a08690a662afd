"""What LightZero's own caching answers: a shadow for the whole batch, and notes of why an answer may be wrong."""
import contextlib
import io
import logging
import types
from functools import cached_property
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from ..validation.trace import Node, Trace, answer_of
from ..validation.validator import NO_CAUSE, Causes, Reply
from .shadow import Shadow, ShadowReference, position_tables

logger = logging.getLogger(__name__)

STALE_SLOT, MISS, PADDING = 'stale_slot', 'miss', 'padding'
EQUAL_LATENTS, POSITIONS, ROWS = 'equal_latents', 'positions', 'rows'
CAUSES = (STALE_SLOT, MISS, PADDING, EQUAL_LATENTS, POSITIONS, ROWS)


class _Context:
    """What LightZero stored under a key, and why it may be wrong."""

    def __init__(self, key: str) -> None:
        self.key, self.causes = key, NO_CAUSE


class _NotedSlots(dict):
    """LightZero's dict from keys to slots, with a note of what is in each slot and of what an inference asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._contexts: Dict[int, _Context] = {}  # by slot
        self.begin_inference()

    def get(self, key: str, default: Any = None) -> Any:
        slot = super().get(key)
        self.asked.append((key, None if slot is None else self._contexts[slot]))
        return slot

    def __setitem__(self, key: str, slot: int) -> None:
        self._contexts[slot] = context = _Context(key)
        self.stored.append(context)
        super().__setitem__(key, slot)

    def begin_inference(self) -> None:
        """The next inference starts; slots stay."""
        self.asked: List[Tuple[str, Optional[_Context]]] = []
        self.stored: List[_Context] = []


class LegacyReference(ShadowReference):
    """What LightZero's own caching does with the same batches: its pools, its clearing, and its ``last_batch_*``, which
    collection and evaluation share.

    Why an answer may be wrong is seen from whose context LightZero found, which sizes it padded, and which rows it took
    for an environment. A context hands its causes on to all that is computed from it.
    """

    causes = CAUSES

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model)
        self._tables: Dict[str, Any] = {}
        # The attributes of LightZero's policy that its reset methods use; they run on this.
        self._policy = types.SimpleNamespace(last_batch_obs=None, last_batch_action=[])
        self._rows: List[Any] = []  # whose steps ``last_batch_*`` are, (mode, environment), or None after a reset
        self._current: Dict[Tuple[str, int], Optional[_Context]] = {}  # of each environment inside an episode
        self._nodes: List[Tuple[np.ndarray, List[_Context]]] = []  # latent states and contexts of the search, by node
        self._told = False

    @cached_property
    def _shadow(self) -> Shadow:
        shadow = Shadow(self._wm, self._wm.env_num)
        shadow.past_kv_cache_init_infer_envs = [_NotedSlots() for _ in range(shadow.env_num)]
        shadow.past_kv_cache_recurrent_infer = _NotedSlots()
        return shadow

    @property
    def _noted(self) -> List[_NotedSlots]:
        """Of each row's roots, and of the nodes."""
        return [*self._shadow.past_kv_cache_init_infer_envs, self._shadow.past_kv_cache_recurrent_infer]

    def precompute(self) -> None:
        """Make LightZero's tables of positions when it makes them; it does so first inside its constructor."""
        self._tables = position_tables(self._wm)

    def reset(self, reset: Any, *args: Any, **kwargs: Any) -> None:
        """LightZero's own method, bound to its policy, which resets its rows, and clears caches now and then."""
        policy = self._policy
        policy._cfg = reset.__self__._cfg
        policy._collect_model = policy._eval_model = types.SimpleNamespace(world_model=self._shadow)
        before = policy.last_batch_obs
        with contextlib.redirect_stdout(io.StringIO()):
            reset.__func__(policy, *args, **kwargs)
        if policy.last_batch_obs is not before:
            self._rows = [None] * len(policy.last_batch_action)

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        """Forget all contexts. Those of one environment or mode LightZero cannot tell from others."""
        if mode is None and env_id is None:
            for slots in self._noted:
                slots.clear()
            self._current = dict.fromkeys(self._current)

    def root(self, trace: Trace) -> Reply:
        shadow, policy, (*noted, _) = self._shadow, self._policy, self._noted
        self._prepare(trace)
        try:
            outputs = shadow.forward_initial_inference(
                {'obs': policy.last_batch_obs, 'action': policy.last_batch_action, 'current_obs': trace.obs},
                trace.timesteps
            )
        except Exception as error:  # whatever it is, it does not reach the training
            self._current.update({place: _Context('') for place in trace.places})  # there should be contexts now
            return self._failed(trace, error)
        causes = self._of_roots(trace)
        contexts = [slots.stored[-1] for slots, _ in zip(noted, trace.places)]
        for context, of_row in zip(contexts, causes):
            context.causes = of_row | self._of_sliding(shadow.keys_values_wm.size)  # one size for all rows
        self._current.update(zip(trace.places, contexts))
        self._nodes = [(shadow.latent_state.cpu().numpy(), contexts)]
        return Reply(answer_of((None, outputs[1], None, *outputs[3:])), causes)

    def expand(self, trace: Trace, node: Node) -> Reply:
        shadow, (*roots, nodes) = self._shadow, self._noted
        parents = [self._nodes[index] for index in node.path]
        history = [(np.asarray([latents[row] for row, (latents, _) in enumerate(parents)]), self._actions(node))]
        self._begin_inference()
        try:
            outputs = shadow.forward_recurrent_inference(history, 0, list(node.depths), trace.timesteps)
        except Exception as error:
            return self._failed(trace, error)
        causes, asked = [], iter(nodes.asked)
        for row, (_, contexts) in enumerate(parents):
            key, found = roots[row].asked[-1]
            if found is None:
                key, found = next(asked)
            causes.append(_of_lookup(key, found, contexts[row]) | self._of_padding(row, is_root=False))
        for context, of_row, size in zip(nodes.stored, causes, shadow.keys_values_wm_size_list):
            context.causes = of_row | self._of_sliding(size + 2)
        self._nodes.append((outputs[1].cpu().numpy(), nodes.stored))
        return Reply(answer_of(outputs), causes)

    def finish(self, trace: Trace, actions: Sequence[Any]) -> None:
        self._policy.last_batch_obs, self._policy.last_batch_action = trace.obs, list(actions)
        self._rows = list(trace.places)

    def _prepare(self, trace: Trace) -> None:
        self._shadow.prepare(self._tables)
        self._stale_tables = not _same(position_tables(self._wm), self._tables)
        self._begin_inference()
        for row in trace.lost:
            place = trace.places[row]
            self._noted[row].clear()
            self.lost += self._current.get(place) is not None
            self._current[place] = None
        if self._policy.last_batch_obs is None:
            self._policy.last_batch_obs = torch.zeros_like(trace.obs)  # type: ignore[arg-type]
            self._policy.last_batch_action = [-1] * len(trace.env_ids)
            self._rows = [None] * len(trace.env_ids)

    def _begin_inference(self) -> None:
        for slots in self._noted:
            slots.begin_inference()

    def _failed(self, trace: Trace, error: Exception) -> Reply:
        causes = [NO_CAUSE] * len(trace.env_ids)
        missed = isinstance(error, TypeError) and 'NoneType' in str(error)
        if missed:  # the last row that was looked for
            causes[sum(bool(slots.asked) for slots in self._noted[:-1]) - 1] = frozenset([MISS])
        if not self._told:
            self._told = True
            logger.warning(
                f"LightZero's own caching fails in {trace.mode}: {type(error).__name__}: {error}"
                + (' (a context that it does not find)' if missed else '') + '; further failures are only counted'
            )
        return Reply(None, causes)

    def _of_roots(self, trace: Trace) -> List[Causes]:
        all_first = not self._noted[0].asked  # LightZero takes the batch for first steps
        causes = []
        for row, place in enumerate(trace.places):
            if trace.is_first(row):
                causes.append(NO_CAUSE if all_first else frozenset([ROWS]))
            elif all_first or self._rows[row] != place:
                causes.append(frozenset([ROWS]))
            else:
                key, found = self._noted[row].asked[0]
                expected = self._current.get(place)
                # What LightZero does not find, it cleared at somebody's 200th step.
                of_lookup = frozenset([ROWS]) if found is None and expected else _of_lookup(key, found, expected)
                causes.append(of_lookup | self._of_padding(row, is_root=True))
        return causes

    def _of_padding(self, row: int, is_root: bool) -> Causes:
        """A row that is shorter than the longest attends to zeros; as a root it also has the longest's position."""
        sizes = self._shadow.keys_values_wm_size_list
        if sizes[row] == max(sizes):
            return NO_CAUSE
        learned = not self._shadow.config.rotary_emb
        return frozenset([PADDING, POSITIONS] if is_root and learned else [PADDING])

    def _of_sliding(self, size: int) -> Causes:
        """A context that is full loses its oldest tokens, and the others move by the tables."""
        slides = size >= self._shadow.context_length - 1
        return frozenset([POSITIONS]) if slides and self._stale_tables else NO_CAUSE


def _of_lookup(key: str, found: Optional[_Context], expected: Optional[_Context]) -> Causes:
    if found is None or found is expected:
        return NO_CAUSE if found is None else found.causes
    return found.causes | {STALE_SLOT if found.key != key else EQUAL_LATENTS}


def _same(tables: Dict[str, Any], others: Dict[str, Any]) -> bool:
    """Whether windows move by the same differences."""
    return all(
        torch.equal(layer[place], other[place].to(layer[place].device))
        for name in tables for layer, other in zip(tables[name], others[name]) for place in layer
    )

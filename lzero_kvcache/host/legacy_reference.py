"""The legacy reference: the answers of LightZero's own caching, by a shadow for the whole batch, and why they may be
wrong."""
import logging
from functools import cached_property
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from ..validation.trace import Node, Trace, answer_of
from ..validation.validator import NO_CAUSE, Causes, Reply
from .kept_rows import Kept
from .lightzero import lightzero
from .shadow import Shadow, ShadowReference, position_tables

logger = logging.getLogger(__name__)

STALE_SLOT, MISS, PADDING = 'stale_slot', 'miss', 'padding'
EQUAL_LATENTS, POSITIONS, ROWS, LAST_OBS = 'equal_latents', 'positions', 'rows', 'last_obs'
CAUSES = (STALE_SLOT, MISS, PADDING, EQUAL_LATENTS, POSITIONS, ROWS, LAST_OBS)


class _Context:
    """A context that LightZero stored under a key: its number of tokens, and why it may be wrong."""

    def __init__(self, key: str) -> None:
        self.key, self.size, self.causes = key, 1, NO_CAUSE


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
    """What LightZero's own caching does with the same batches: its pools, its clearing, and its last observations and
    actions.

    Why an answer may be wrong is seen from whose context LightZero found, which sizes it padded, and which rows it took
    for an environment. A context hands its causes on to all that is computed from it.
    """

    causes = tuple(cause for cause in CAUSES if cause not in lightzero.NEVER_CAUSES)

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model)
        self._tables: Dict[str, Any] = {}
        self._policy: Any = None  # what LightZero's policy keeps between steps
        self._kept: Kept
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
        """Of each pool of roots, and of the nodes."""
        return [*self._shadow.past_kv_cache_init_infer_envs, self._shadow.past_kv_cache_recurrent_infer]

    @property
    def _roots(self) -> List[_NotedSlots]:
        """Of each row's pool of roots."""
        return [self._noted[pool] for pool in self._kept.pools]

    def precompute(self) -> None:
        """Make LightZero's tables of positions when it makes them; it does so first inside its constructor."""
        self._tables = position_tables(self._wm)

    def reset(self, reset: Any, *args: Any, **kwargs: Any) -> None:
        """LightZero's own method, bound to its policy, which resets what it keeps, and clears caches now and then."""
        self._policy = self._policy or lightzero.kept_rows(reset.__self__)
        self._policy.reset(reset, self._shadow, *args, **kwargs)

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        """Forget all contexts. Those of one environment or mode LightZero cannot tell from others."""
        if mode is None and env_id is None:
            for slots in self._noted:
                slots.clear()
            self._current = dict.fromkeys(self._current)

    def root(self, trace: Trace) -> Reply:
        shadow = self._shadow
        self._prepare(trace)
        kept = self._kept
        try:
            outputs = shadow.forward_initial_inference(
                {'obs': kept.observations, 'action': kept.actions, 'current_obs': trace.obs,
                 'ready_env_id': kept.pools}, trace.timesteps
            )
        except Exception as error:  # whatever it is, it does not reach the training
            self._current.update({place: _Context('') for place in trace.places})  # there should be contexts now
            return self._failed(trace, error)
        found = [slots.asked[0][1] if slots.asked else None for slots in self._roots]
        sizes = [1 if context is None else context.size for context in found]
        longest = max(sizes)
        causes = self._of_roots(trace, [size < longest for size in sizes])
        contexts = [slots.stored[-1] for slots in self._roots]
        for context, slots, size, of_row in zip(contexts, self._roots, sizes, causes):
            before = longest if PADDING in self.causes else size  # zeros that were padded are kept
            self._keep(context, of_row, before + 2 if slots.asked else 1)
        self._current.update(zip(trace.places, contexts))
        self._nodes = [(shadow.latent_state.cpu().numpy(), contexts)]
        return Reply(answer_of((None, outputs[1], None, *outputs[3:])), causes)

    def expand(self, trace: Trace, node: Node) -> Reply:
        shadow, roots, nodes = self._shadow, self._roots, self._noted[-1]
        parents = [self._nodes[index] for index in node.path]
        history = [(np.asarray([latents[row] for row, (latents, _) in enumerate(parents)]), self._actions(node))]
        self._begin_inference()
        try:
            outputs = shadow.forward_recurrent_inference(history, 0, list(node.depths), trace.timesteps)
        except Exception as error:
            return self._failed(trace, error)
        found, asked = [], iter(nodes.asked)
        for row in range(len(parents)):
            key, context = roots[row].asked[-1]
            found.append((key, context) if context is not None else next(asked))
        sizes = [1 if context is None else context.size for _, context in found]
        longest = max(sizes)
        causes = [
            (_of_lookup(key, context, contexts[row]) if context is not None else frozenset([MISS]))
            | self._of_padding(size < longest, is_root=False)
            for row, ((_, contexts), (key, context), size) in enumerate(zip(parents, found, sizes))
        ]
        for context, of_row, size in zip(nodes.stored, causes, sizes):
            self._keep(context, of_row, size + 2)
        self._nodes.append((outputs[1].cpu().numpy(), nodes.stored))
        return Reply(answer_of(outputs), causes)

    def finish(self, trace: Trace, actions: Sequence[Any]) -> None:
        self._policy.after(trace, actions)

    def _prepare(self, trace: Trace) -> None:
        self._shadow.prepare(self._tables)
        self._stale_tables = not _same(position_tables(self._wm), self._tables)
        self._begin_inference()
        reset = trace.first_reset
        if self._policy is None:
            self._policy = lightzero.kept_rows(None if reset is None else reset.__self__)  # type: ignore[attr-defined]
        if reset is not None and not self._policy.has_begun(trace.mode):
            self.reset(reset)
        self._kept = self._policy.before(trace, self._shadow.env_num)
        for row in trace.lost:
            place = trace.places[row]
            self._roots[row].clear()
            self.lost += self._current.get(place) is not None
            self._current[place] = None

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

    def _of_roots(self, trace: Trace, are_shorter: Sequence[bool]) -> List[Causes]:
        causes, kept = [], self._kept
        for row, place in enumerate(trace.places):
            asked = self._roots[row].asked
            if trace.is_first(row):
                causes.append(frozenset([ROWS]) if asked else NO_CAUSE)
            elif not asked or kept.owners[row] != place:  # LightZero takes it for a first step, or for another's
                causes.append(frozenset([ROWS]))
            else:
                (key, found), expected = asked[0], self._current.get(place)
                of_lookup = _of_lookup(key, found, expected)
                assert trace.last_obs is not None
                seen = trace.last_obs[row]
                if LAST_OBS in self.causes and not torch.equal(kept.observations[row].to(seen), seen):
                    of_lookup |= {LAST_OBS}
                elif found is None and expected:  # it was cleared, or its key has other last bits
                    of_lookup |= {ROWS}
                causes.append(of_lookup | self._of_padding(are_shorter[row], is_root=True))
        return causes

    def _of_padding(self, is_shorter: bool, is_root: bool) -> Causes:
        """A row that is shorter than the longest attends to zeros; as a root it also has the longest's position."""
        if PADDING not in self.causes or not is_shorter:
            return NO_CAUSE
        learned = not self._shadow.config.rotary_emb
        return frozenset([PADDING, POSITIONS] if is_root and learned else [PADDING])

    def _keep(self, context: _Context, causes: Causes, size: int) -> None:
        """Note a context of so many tokens. One that is full loses its oldest, and the others move by the tables."""
        slides = size >= self._shadow.context_length - 1
        context.size = self._shadow.context_length - 3 if slides else size
        context.causes = causes | ({POSITIONS} if slides and self._stale_tables else NO_CAUSE)


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

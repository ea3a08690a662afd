"""What LightZero's own caching does with the same batches: its rows, its pools, its clearing. Compares nothing.

Why an answer may differ from the right one is told by what is seen: whose context LightZero found, what sizes it
padded, which rows it took for an environment. A context hands its causes on to all that is computed from it.
"""
import contextlib
import io
import logging
import types
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Tuple

import numpy as np
import torch

from .exact import Reply
from .shadow import Shadow, position_tables
from .trace import Search, answer_of

logger = logging.getLogger(__name__)

STALE_SLOT, MISS, PADDING = 'stale_slot', 'miss', 'padding'
EQUAL_LATENTS, POSITIONS, ROWS = 'equal_latents', 'positions', 'rows'
CAUSES = (STALE_SLOT, MISS, PADDING, EQUAL_LATENTS, POSITIONS, ROWS)

Causes = FrozenSet[str]
NONE: Causes = frozenset()


class _Context:
    """What LightZero stored under a key, and why it may be wrong."""

    def __init__(self, key: str) -> None:
        self.key, self.causes = key, NONE


class _Book(dict):
    """LightZero's dict from keys to slots, with a note of what is in each slot and of what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self._slots: Dict[int, _Context] = {}
        self.asked: List[Tuple[str, Optional[_Context]]] = []
        self.stored: List[_Context] = []

    def get(self, key: str, default: Any = None) -> Any:
        slot = super().get(key)
        self.asked.append((key, None if slot is None else self._slots[slot]))
        return slot

    def __setitem__(self, key: str, slot: int) -> None:
        self._slots[slot] = context = _Context(key)
        self.stored.append(context)
        super().__setitem__(key, slot)

    def turn_page(self) -> None:
        """Forget what was asked and stored so far; slots stay."""
        self.asked, self.stored = [], []


class _Failed(Exception):
    """LightZero's own code raised an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _ask(inference: Callable[..., Any], *args: Any) -> Any:
    try:
        return inference(*args)
    except Exception as error:  # whatever it is, it does not reach the training
        raise _Failed(error) from error


class LegacyShadow:
    """
    Overview:
        Follows whole batches with LightZero's code, its pools and its ``last_batch_*``, which collection and evaluation
        share.
    Arguments:
        - attributes (:obj:`Dict[str, Any]`): Those of the world model, as LightZero's constructor left them.
    """

    def __init__(self, attributes: Dict[str, Any]) -> None:
        self._shadow = Shadow(attributes, attributes['env_num'])
        self._roots = [_Book() for _ in range(self._shadow.env_num)]
        self._nodes = _Book()
        self._shadow.past_kv_cache_init_infer_envs = list(self._roots)
        self._shadow.past_kv_cache_recurrent_infer = self._nodes
        self._tables: Dict[str, Any] = {}
        self._stale_tables: Optional[bool] = None
        # What LightZero's policy has of its own; its methods run on this.
        self._policy = types.SimpleNamespace(last_batch_obs=None, last_batch_action=[])
        self._rows: List[Any] = []  # whose steps ``last_batch_*`` are, (mode, environment), or None after a reset
        self._current: Dict[Tuple[str, int], Optional[_Context]] = {}  # of each environment inside an episode
        self.lost = 0
        self._told = False

    def set_tables(self, tables: Dict[str, Any]) -> None:
        """
        Overview:
            Take the tables of positions that LightZero makes when it does.
        """
        self._tables = tables
        self._stale_tables = None

    def reset(self, reset: Any, *args: Any, **kwargs: Any) -> None:
        """
        Overview:
            LightZero's policy resets its rows, and clears caches now and then.
        Arguments:
            - reset (:obj:`Any`): LightZero's own method, bound to its policy.
        """
        policy, shadow = self._policy, self._shadow
        policy._cfg = reset.__self__._cfg
        policy._collect_model = policy._eval_model = types.SimpleNamespace(world_model=shadow)
        before = policy.last_batch_obs
        with contextlib.redirect_stdout(io.StringIO()):
            reset.__func__(policy, *args, **kwargs)
        if policy.last_batch_obs is not before:
            self._rows = [None] * len(policy.last_batch_action)

    def forget(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        """
        Overview:
            Forget all contexts. Of those of one environment LightZero knows nothing.
        """
        if mode is None and env_id is None:
            for book in [*self._roots, self._nodes]:
                book.clear()
            self._current = dict.fromkeys(self._current)
        self._stale_tables = None

    def follow(self, world_model: Any, search: Search) -> List[Reply]:
        """
        Overview:
            Go through a search.
        Arguments:
            - world_model (:obj:`Any`): The one that searched.
            - search (:obj:`Search`): What it did.
        Returns:
            - replies (:obj:`List[Reply]`): To the root inference, and to each simulation that was noted. Where
                LightZero's code fails there is no answer, and no further reply.
        """
        assert search.obs is not None
        self._shadow.prepare(self._tables)
        if self._stale_tables is None:
            self._stale_tables = not _same(position_tables(world_model), self._tables)
        for row in search.lost:
            self._roots[row].clear()
            self.lost += self._current.get(search.places()[row]) is not None
            self._current[search.places()[row]] = None
        if self._policy.last_batch_obs is None:
            self._policy.last_batch_obs = torch.zeros_like(search.obs)
            self._policy.last_batch_action = [-1] * len(search.env_ids)
            self._rows = [None] * len(search.env_ids)
        replies: List[Reply] = []
        try:
            self._replay(search, replies)
        except _Failed as failed:
            if not replies:  # there should be root contexts now
                self._current.update({place: _Context('') for place in search.places()})
            replies.append(self._failed(search, failed.error))
        self._policy.last_batch_obs, self._policy.last_batch_action = search.obs, list(search.actions)
        self._rows = list(search.places())
        for reset in search.resets:
            reset()
        return replies

    def _failed(self, search: Search, error: Exception) -> Reply:
        rows = len(search.env_ids)
        causes = [NONE] * rows
        missed = isinstance(error, TypeError) and 'NoneType' in str(error)
        if missed:  # the last row that was looked for
            causes[sum(bool(book.asked) for book in self._roots) - 1] = frozenset([MISS])
        if not self._told:
            self._told = True
            logger.warning(
                f"LightZero's own caching fails in {search.mode}: {type(error).__name__}: {error}"
                + (' (a context that it does not find)' if missed else '') + '; further failures are only counted'
            )
        return Reply(None, causes)

    def _replay(self, search: Search, replies: List[Reply]) -> None:
        rows = range(len(search.env_ids))
        replies.append(self._root(search))
        contexts: List[List[Optional[_Context]]] = [[self._roots[row].stored[-1] for row in rows]]
        self._current.update(zip(search.places(), contexts[0]))
        latents = [self._shadow.latent_state.cpu().numpy()]
        for node in search.nodes:
            self._turn_page()
            parents = [(int(index), row) for row, index in enumerate(node.path)]
            latent = np.asarray([latents[index][row] for index, row in parents])
            actions = torch.as_tensor(node.actions).to(self._shadow.device)
            if not self._shadow.continuous_action_space:
                actions = actions.long()
            outputs = _ask(
                self._shadow.forward_recurrent_inference, [(latent, actions)], 0, list(node.depths), search.timesteps
            )
            sizes = self._shadow.keys_values_wm_size_list
            asked = iter(self._nodes.asked)
            causes = []
            for row, (index, _) in enumerate(parents):
                key, found = self._roots[row].asked[-1]
                if found is None:
                    key, found = next(asked)
                causes.append(_of_lookup(key, found, contexts[index][row]) | self._of_padding(sizes, row, False))
            replies.append(Reply(answer_of(outputs), causes))
            contexts.append(list(self._nodes.stored))
            for row, context in enumerate(self._nodes.stored):
                context.causes = causes[row] | self._of_sliding(sizes[row] + 2)
            latents.append(outputs[1].cpu().numpy())

    def _root(self, search: Search) -> Reply:
        self._turn_page()
        shadow, policy = self._shadow, self._policy
        outputs = _ask(
            shadow.forward_initial_inference,
            {'obs': policy.last_batch_obs, 'action': policy.last_batch_action, 'current_obs': search.obs},
            search.timesteps
        )
        all_first = not self._roots[0].asked
        causes = []
        for row, place in enumerate(search.places()):
            if search.is_first(row):
                causes.append(NONE if all_first else frozenset([ROWS]))
            elif all_first or self._rows[row] != place:
                causes.append(frozenset([ROWS]))
            else:
                key, found = self._roots[row].asked[0]
                expected = self._current.get(place)
                # What LightZero does not find, it cleared at somebody's 200th step.
                of_lookup = frozenset([ROWS]) if found is None and expected else _of_lookup(key, found, expected)
                causes.append(of_lookup | self._of_padding(shadow.keys_values_wm_size_list, row, True))
        size = shadow.keys_values_wm.size  # of all rows
        for row, of_row in enumerate(causes):
            self._roots[row].stored[-1].causes = of_row | self._of_sliding(size)
        return Reply(answer_of((None, outputs[1], None, *outputs[3:])), causes)

    def _turn_page(self) -> None:
        for book in [*self._roots, self._nodes]:
            book.turn_page()

    def _of_padding(self, sizes: List[int], row: int, is_root: bool) -> Causes:
        """A row that is shorter than the longest attends to zeros; as a root it also has the longest's position."""
        if sizes[row] == max(sizes):
            return NONE
        learned = not self._shadow.config.rotary_emb
        return frozenset([PADDING, POSITIONS] if is_root and learned else [PADDING])

    def _of_sliding(self, size: int) -> Causes:
        """A context that is full loses its oldest tokens, and the others move by the tables."""
        slides = size >= self._shadow.context_length - 1
        return frozenset([POSITIONS]) if slides and self._stale_tables else NONE


def _of_lookup(key: str, found: Optional[_Context], expected: Optional[_Context]) -> Causes:
    if found is None or found is expected:
        return NONE if found is None else found.causes
    return found.causes | {STALE_SLOT if found.key != key else EQUAL_LATENTS}


def _same(tables: Dict[str, Any], others: Dict[str, Any]) -> bool:
    """Whether windows move by the same differences."""
    return all(
        torch.equal(layer[place], other[place].to(layer[place].device))
        for name in tables for layer, other in zip(tables[name], others[name]) for place in layer
    )

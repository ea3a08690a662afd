"""LightZero's own world model, with caches of its own, as the reference that validation replays searches on.

A shadow has the very modules of the world model that searches: its weights and its mode, and no parameters of its own.
``B`` is the number of rows of a search.
"""
import contextlib
import copy
import io
import logging
import types
from collections import defaultdict
from functools import cached_property
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from lzero.model.unizero_world_models.kv_caching import KeysValues
from lzero.model.unizero_world_models.world_model import WorldModel

from ..config import FLAG
from ..validation.trace import Answer, Node, Trace, answer_of
from ..validation.validator import Causes, Reference, Reply
from .lightzero import lightzero
from .weights import to_scalar

logger = logging.getLogger(__name__)

STALE_SLOT, MISS, PADDING = 'stale_slot', 'miss', 'padding'
EQUAL_LATENTS, POSITIONS, ROWS = 'equal_latents', 'positions', 'rows'
CAUSES = (STALE_SLOT, MISS, PADDING, EQUAL_LATENTS, POSITIONS, ROWS)
NONE: Causes = frozenset()


def make_reference(world_model: Any, validation: str) -> Reference:
    """The reference of a world model, which may still be under construction."""
    return (LegacyReference if validation == 'legacy' else ExactReference)(world_model)


class Shadow(WorldModel):
    """LightZero's world model, made without its constructor: shared modules, empty caches."""

    device: torch.device
    latent_state: torch.Tensor

    def __init__(self, world_model: Any, env_num: int) -> None:
        self.__dict__.update(vars(world_model))
        self.config = copy.copy(world_model.config)
        self.config[FLAG] = False  # or LightZero's main branch would make its own manager
        self.env_num = env_num
        self.latent_state = torch.empty(0)  # LightZero deletes it at each step
        self._initialize_statistics()
        slots = self.num_simulations * env_num
        setattr(self, lightzero.RECURRENT_SLOTS, slots)
        self._initialize_cache_structures()
        self._initialize_transformer_keys_values()
        # As the end of LightZero's constructor has it.
        self.shared_pool_recur_infer: List[Any] = [None] * slots
        self.shared_pool_init_infer = [[None] * self.shared_pool_size_init for _ in range(env_num)]
        self.shared_pool_index_init_envs = [0] * env_num
        self.shared_pool_size_wm = env_num
        self.shared_pool_wm = [None] * env_num
        self.shared_pool_index = self.shared_pool_index_wm = 0

    def prepare(self, tables: Dict[str, Any]) -> None:
        """Follow the modules to the device where they are now, and take tables of positions."""
        device = self.transformer.ln_f.weight.device
        self.__dict__.update({
            name: [{place: difference.to(device) for place, difference in layer.items()} for layer in table]
            for name, table in tables.items()
        })
        if device != self.device:
            self.device = device
            pools = self.shared_pool_recur_infer, self.shared_pool_wm, *self.shared_pool_init_infer
            for layer in [layer for pool in pools for entry in pool if entry is not None for layer in entry]:
                for cache in (layer._k_cache, layer._v_cache):
                    cache._cache = cache._cache.to(device)
            self._initialize_transformer_keys_values()


def position_tables(world_model: Any) -> Dict[str, Any]:
    """LightZero's tables of learned positions, made from the weights as they are now; none with rotary positions."""
    if world_model.config.rotary_emb:
        return {}
    view = Shadow.__new__(Shadow)
    view.__dict__.update(vars(world_model))
    view.device = world_model.pos_emb.weight.device
    with torch.no_grad():
        view.precompute_pos_emb_diff_kv()
    return {name: vars(view)[name] for name in ('pos_emb_diff_k', 'pos_emb_diff_v')}


class _Base(Reference):
    """What both references share. Shadows are made at the first use: until then the world model is not complete."""

    def __init__(self, world_model: Any) -> None:
        self._wm = world_model

    def is_ready(self) -> bool:
        return not self._wm.training

    def scalar(self, logits: torch.Tensor) -> torch.Tensor:
        return to_scalar(logits).view(-1, 1)

    def _actions(self, node: Node) -> torch.Tensor:
        actions = torch.as_tensor(node.actions).to(self._wm.transformer.ln_f.weight.device)
        return actions if self._wm.continuous_action_space else actions.long()


# ---- exact ----------------------------------------------------------------------------------------------------------


class _ByNode:
    """In place of LightZero's dict from keys to slots: finds the slot that is meant, whatever the key is."""

    def __init__(self) -> None:
        self.slot: Optional[int] = None
        self.stored: Optional[int] = None

    def get(self, key: str) -> Optional[int]:
        return self.slot

    def __setitem__(self, key: str, slot: int) -> None:
        self.stored = slot

    def __contains__(self, key: str) -> bool:
        return False  # what an older key has is kept


class _Alone(Shadow):
    """One environment. Its root context is the newest of two slots, so that no slot is overwritten while needed."""

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model, 1)
        lightzero.never_full(self)
        self.last_root: Optional[int] = None  # slot of the context that the next root continues
        self.roots, self.nodes = _ByNode(), _ByNode()
        self.past_kv_cache_init_infer_envs = [self.roots]
        self.past_kv_cache_recurrent_infer = self.nodes

    def custom_copy_kv_cache_to_shared_recur(self, src_kv: KeysValues) -> int:
        self.shared_pool_recur_infer.append(None)  # a slot for each node
        return super().custom_copy_kv_cache_to_shared_recur(src_kv)

    def root(self, before: torch.Tensor, action: Any, latent: torch.Tensor, timestep: np.ndarray) -> Answer:
        self.forget_nodes()
        self.roots.slot = self.last_root
        if self.last_root is None and not torch.isfinite(before).all():
            action = -1  # from a state that was skipped an environment starts afresh
        output = self.wm_forward_for_initial_infererence(before, [action], latent, [timestep])
        self.last_root = self.roots.stored
        return answer_of((None, latent, None, output.logits_policy, output.logits_value))

    def expand(self, node: int, action: torch.Tensor, depth: int, timestep: np.ndarray) -> Answer:
        self.roots.slot, self.nodes.slot = (self.last_root, None) if node == 0 else (None, node - 1)
        unused = np.zeros((1, 1, self.embed_dim), np.float32)  # its key, and what LightZero would rebuild a miss from
        return answer_of(self.forward_recurrent_inference([(unused, action)], 0, [depth], [timestep]))

    def forget_nodes(self) -> None:
        self.shared_pool_recur_infer = []
        self.shared_pool_index = 0


class ExactReference(_Base):
    """What is right: every environment alone, so that nobody's length, latent state or end touches another. Contexts
    are found by node, no slot is overwritten while needed, and tables of positions are those of the weights."""

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model)
        self._alone: Dict[Tuple[str, int], _Alone] = defaultdict(lambda: _Alone(world_model))

    def root(self, trace: Trace) -> Reply:
        tables = position_tables(self._wm)
        rows = [self._alone[place] for place in trace.places]
        for row in trace.lost:
            self.lost += rows[row].last_root is not None
            rows[row].last_root = None
        before = latents = self._wm.tokenizer.encode_to_obs_embeddings(trace.obs)
        if any(alone.last_root is None and not trace.is_first(row) for row, alone in enumerate(rows)):
            before = self._wm.tokenizer.encode_to_obs_embeddings(trace.last_obs)
        answers = []
        for row, alone in enumerate(rows):
            alone.prepare(tables)
            answers.append(alone.root(
                before[row:row + 1], trace.last_actions[row], latents[row:row + 1], trace.timesteps[row]
            ))
        return _together(answers)

    def expand(self, trace: Trace, node: Node) -> Reply:
        actions = self._actions(node)
        return _together([
            alone.expand(int(node.path[row]), actions[row:row + 1], node.depths[row], trace.timesteps[row])
            for row, alone in enumerate(self._alone[place] for place in trace.places)
        ])

    def finish(self, trace: Trace, actions: Sequence[Any]) -> None:
        for place in trace.places:
            self._alone[place].forget_nodes()

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        for place, alone in self._alone.items():
            if mode in (None, place[0]) and env_id in (None, place[1]):
                alone.last_root = None

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """LightZero's policy resets rows; here are none."""

    def precompute(self) -> None:
        """Tables are made anew for each search."""


def _together(answers: List[Answer]) -> Reply:
    return Reply({name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}, [NONE] * len(answers))


# ---- legacy ---------------------------------------------------------------------------------------------------------


class _Context:
    """What LightZero stored under a key, and why it may be wrong."""

    def __init__(self, key: str) -> None:
        self.key, self.causes = key, NONE


class _Book(dict):
    """LightZero's dict from keys to slots, with a note of what is in each slot and of what an inference asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._slots: Dict[int, _Context] = {}
        self.turn_page()

    def get(self, key: str, default: Any = None) -> Any:
        slot = super().get(key)
        self.asked.append((key, None if slot is None else self._slots[slot]))
        return slot

    def __setitem__(self, key: str, slot: int) -> None:
        self._slots[slot] = context = _Context(key)
        self.stored.append(context)
        super().__setitem__(key, slot)

    def turn_page(self) -> None:
        """The next inference starts; slots stay."""
        self.asked: List[Tuple[str, Optional[_Context]]] = []
        self.stored: List[_Context] = []


class LegacyReference(_Base):
    """What LightZero's own caching does with the same batches: its pools, its clearing, and its ``last_batch_*``, which
    collection and evaluation share.

    Why an answer may be wrong is seen from whose context LightZero found, which sizes it padded, and which rows it took
    for an environment. A context hands its causes on to all that is computed from it.
    """

    causes = CAUSES

    def __init__(self, world_model: Any) -> None:
        super().__init__(world_model)
        self._tables: Dict[str, Any] = {}
        # What LightZero's policy has of its own; its methods run on this.
        self._policy = types.SimpleNamespace(last_batch_obs=None, last_batch_action=[])
        self._rows: List[Any] = []  # whose steps ``last_batch_*`` are, (mode, environment), or None after a reset
        self._current: Dict[Tuple[str, int], Optional[_Context]] = {}  # of each environment inside an episode
        self._nodes: List[Tuple[np.ndarray, List[_Context]]] = []  # latent states and contexts of the search, by node
        self._told = False

    @cached_property
    def _shadow(self) -> Shadow:
        shadow = Shadow(self._wm, self._wm.env_num)
        shadow.past_kv_cache_init_infer_envs = [_Book() for _ in range(shadow.env_num)]
        shadow.past_kv_cache_recurrent_infer = _Book()
        return shadow

    @property
    def _books(self) -> List[_Book]:
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
            for book in self._books:
                book.clear()
            self._current = dict.fromkeys(self._current)

    def root(self, trace: Trace) -> Reply:
        shadow, policy, (*books, _) = self._shadow, self._policy, self._books
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
        contexts = [book.stored[-1] for book, _ in zip(books, trace.places)]
        for context, of_row in zip(contexts, causes):
            context.causes = of_row | self._of_sliding(shadow.keys_values_wm.size)  # one size for all rows
        self._current.update(zip(trace.places, contexts))
        self._nodes = [(shadow.latent_state.cpu().numpy(), contexts)]
        return Reply(answer_of((None, outputs[1], None, *outputs[3:])), causes)

    def expand(self, trace: Trace, node: Node) -> Reply:
        shadow, (*roots, nodes) = self._shadow, self._books
        parents = [self._nodes[index] for index in node.path]
        history = [(np.asarray([latents[row] for row, (latents, _) in enumerate(parents)]), self._actions(node))]
        self._turn_page()
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
        self._turn_page()
        for row in trace.lost:
            place = trace.places[row]
            self._books[row].clear()
            self.lost += self._current.get(place) is not None
            self._current[place] = None
        if self._policy.last_batch_obs is None:
            self._policy.last_batch_obs = torch.zeros_like(trace.obs)  # type: ignore[arg-type]
            self._policy.last_batch_action = [-1] * len(trace.env_ids)
            self._rows = [None] * len(trace.env_ids)

    def _turn_page(self) -> None:
        for book in self._books:
            book.turn_page()

    def _failed(self, trace: Trace, error: Exception) -> Reply:
        causes = [NONE] * len(trace.env_ids)
        missed = isinstance(error, TypeError) and 'NoneType' in str(error)
        if missed:  # the last row that was looked for
            causes[sum(bool(book.asked) for book in self._books[:-1]) - 1] = frozenset([MISS])
        if not self._told:
            self._told = True
            logger.warning(
                f"LightZero's own caching fails in {trace.mode}: {type(error).__name__}: {error}"
                + (' (a context that it does not find)' if missed else '') + '; further failures are only counted'
            )
        return Reply(None, causes)

    def _of_roots(self, trace: Trace) -> List[Causes]:
        all_first = not self._books[0].asked  # LightZero takes the batch for first steps
        causes = []
        for row, place in enumerate(trace.places):
            if trace.is_first(row):
                causes.append(NONE if all_first else frozenset([ROWS]))
            elif all_first or self._rows[row] != place:
                causes.append(frozenset([ROWS]))
            else:
                key, found = self._books[row].asked[0]
                expected = self._current.get(place)
                # What LightZero does not find, it cleared at somebody's 200th step.
                of_lookup = frozenset([ROWS]) if found is None and expected else _of_lookup(key, found, expected)
                causes.append(of_lookup | self._of_padding(row, is_root=True))
        return causes

    def _of_padding(self, row: int, is_root: bool) -> Causes:
        """A row that is shorter than the longest attends to zeros; as a root it also has the longest's position."""
        sizes = self._shadow.keys_values_wm_size_list
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

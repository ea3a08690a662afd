"""
What is right: LightZero's own world model asked about one environment at a time, and the machinery to ask it.

Here live random search traces, the players that put a trace to a model, and the comparison of answers.
No test lives here, and nothing here knows how a cache under test is built.

A model is asked only through ``initial_inference`` and ``recurrent_inference``, with the arguments that LightZero's
policies and tree searches pass. ``B`` is the number of environments (rows), ``E`` the width of a latent state, ``A``
the size of the action space, ``T`` a number of tokens.
"""
import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from small_models import ON_MAIN, VOCABULARY, Case, adapter

#: Largest relative error that still counts as the same answer, in float32.
TOLERANCE = 1e-4

#: What a model answers, by name: 'latent' [B, 1, E], 'policy', 'value', and (not for roots) 'reward' [B, ...].
Answer = Dict[str, torch.Tensor]


# ---- traces ----------------------------------------------------------------------------------------------------------


class Root(NamedTuple):
    """
    One root inference. An environment whose action is None starts a new episode in this step.

    Shapes: last_obs, obs [B, ...]; actions B of None, int or array [A]; timesteps B of int.
    """
    last_obs: np.ndarray
    actions: Sequence[Any]
    obs: np.ndarray
    timesteps: Sequence[int]


class Expand(NamedTuple):
    """
    One simulation: every environment expands one known node of its own tree. Nodes are numbered in the order in which
    they were made since the last root inference, the root being 0. Depths are what the tree search would pass.

    Shapes: parents, actions (int, or array [A]), depths: B each.
    """
    parents: Sequence[int]
    actions: Sequence[Any]
    depths: Sequence[int]


class ClearEnv(NamedTuple):
    """Throw away one environment's root contexts."""
    env: int


class ClearSearch(NamedTuple):
    """Throw away the contexts of all nodes below the roots."""


class Reanalysis(NamedTuple):
    """
    A search below every time step of N unrolled samples, as the replay buffer makes it with the target model: root
    inference without predecessors, then simulations. It concerns no environment. Rows are samples times (U + 1) steps.

    Shapes: obs [N * (U + 1), ...]; actions [N, U] or [N, U, A]; timesteps [N, U].
    """
    obs: np.ndarray
    actions: np.ndarray
    timesteps: np.ndarray
    simulations: Sequence[Expand]


Event = Union[Root, Expand, ClearEnv, ClearSearch, Reanalysis]


class Trace(NamedTuple):
    """What a batch of environments lives through: a sequence of events, over B environments."""
    env_num: int
    events: List[Event]

    def alone(self, env: int) -> 'Trace':
        """The same for one environment, as if there were no other."""
        events: List[Event] = []
        for event in self.events:
            if isinstance(event, ClearEnv):
                if event.env == env:
                    events.append(ClearEnv(0))
            elif isinstance(event, (Root, Expand)):
                events.append(type(event)(*(field[env:env + 1] for field in event)))
            elif isinstance(event, ClearSearch):
                events.append(event)
        return Trace(1, events)


def random_trace(
        rng: np.random.Generator,
        case: Case,
        env_num: int,
        root_steps: int,
        simulations: int,
        clears: float = 0.,
        episodes: float = 0.,
        unknown: float = 0.,
        repeats: float = 0.,
) -> Trace:
    """
    A random sequence of root steps, each with a random search below it. Half of all expansions go on from the
    newest node, so that trees are deep enough for windows to slide; the others start from any known node, so that
    depths in a batch are unequal. No node is expanded twice by the same (discrete) action. Of the probabilities,
    ``clears`` is that of contexts being thrown away before a simulation, ``unknown`` that of an environment beginning
    in the middle of an episode; ``episodes`` and ``repeats``, in each root step, those of a new episode and of the last
    observation being seen again.
    """
    events: List[Event] = []
    timesteps = rng.choice([0, 1, 30, case.max_seq_len // 2 - 2], size=env_num)
    last_obs = _random_obs(rng, case, env_num)
    for step in range(root_steps):
        fresh = rng.random(env_num) < (episodes if step else 1. - unknown)
        timesteps = np.where(fresh, rng.choice([0, 0, 17], size=env_num), timesteps + 1) if step else timesteps
        actions = [None if is_fresh else _random_action(rng, case) for is_fresh in fresh]
        if ON_MAIN:  # the action before a first step would have an angle below 0
            timesteps = np.maximum(timesteps, ~fresh)
        obs = _random_obs(rng, case, env_num)
        seen_again = rng.random(env_num) < repeats
        obs[seen_again] = last_obs[seen_again]
        events.append(Root(last_obs, actions, obs, [int(t) for t in timesteps]))
        events.extend(_random_search(rng, case, env_num, simulations, clears))
        last_obs = obs
    return Trace(env_num, events)


def random_reanalysis(rng: np.random.Generator, case: Case, samples: int, simulations: int) -> Reanalysis:
    """A random batch to reanalyze, ``case.unroll`` steps long."""
    rows = samples * (case.unroll + 1)
    shape = (samples, case.unroll)
    first = rng.integers(case.max_seq_len // 2, size=(samples, 1))
    actions = rng.uniform(-1., 1., (*shape, case.action_space_size)) if case.continuous else \
        rng.integers(case.action_space_size, size=shape)
    search = _random_search(rng, case, rows, simulations, 0.)
    return Reanalysis(_random_obs(rng, case, rows), actions, first + np.arange(case.unroll), search)


def _random_search(rng: np.random.Generator, case: Case, env_num: int, simulations: int, clears: float) -> List[Event]:
    """The events below one root inference."""
    events: List[Event] = []
    depths = [[0] for _ in range(env_num)]  # of every node, by environment
    tried = [set() for _ in range(env_num)]
    for simulation in range(simulations):
        if rng.random() < clears:
            events.append(ClearSearch() if rng.random() < 0.3 else ClearEnv(int(rng.integers(env_num))))
        parents, actions = [], []
        for env in range(env_num):
            parent, action = _random_leaf(rng, case, simulation + 1, tried[env])
            parents.append(parent)
            actions.append(action)
        # UniZero's search passes the length of the path to the new node, Sampled UniZero's the number of its parent.
        new_depths = [depths[env][parents[env]] + 1 for env in range(env_num)]
        events.append(Expand(parents, actions, parents if case.model_name.startswith('Sampled') else new_depths))
        for env in range(env_num):
            depths[env].append(new_depths[env])
    if rng.random() < clears:
        events.append(ClearEnv(int(rng.integers(env_num))))
    return events


def _random_leaf(rng: np.random.Generator, case: Case, nodes: int, tried: set) -> Tuple[int, Any]:
    """A node to expand and an action that was not yet tried there, if it has one."""
    for _ in range(20):
        parent = nodes - 1 if rng.random() < 0.5 else int(rng.integers(nodes))
        action = _random_action(rng, case)
        if case.continuous or (parent, action) not in tried:
            break
    if not case.continuous:
        tried.add((parent, action))
    return parent, action


def _random_action(rng: np.random.Generator, case: Case) -> Any:
    if case.continuous:
        return rng.uniform(-1., 1., size=case.action_space_size)
    return int(rng.integers(case.action_space_size))


def _random_obs(rng: np.random.Generator, case: Case, rows: int) -> np.ndarray:
    if case.obs_type == 'text':
        return rng.integers(VOCABULARY, size=(rows, *case.obs_shape))
    return rng.normal(size=(rows, *case.obs_shape)).astype(np.float32)


# ---- players ---------------------------------------------------------------------------------------------------------


class Batch:
    """
    Puts a whole batch to a model, argument for argument as LightZero's policies and tree searches do: timesteps are
    0-d arrays, actions of a continuing discrete episode numpy integers, those of a fresh one the int -1; a search
    passes latent states as one array, actions as one tensor (int64 [B], or float64 [B, A]), and keeps what the
    model returned without copying it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.world_model = model.world_model
        self._latents: List[np.ndarray] = []  # of the nodes since the last root inference, [B, 1, E] each
        self._history: List[Tuple[np.ndarray, torch.Tensor]] = []
        self._timesteps: List[np.ndarray] = []

    def play(self, event: Event) -> Union[Answer, None]:
        """Play one event; inferences have an answer."""
        with torch.no_grad():
            if isinstance(event, Root):
                return self.root(event)
            if isinstance(event, Expand):
                return self.expand(event)
            if isinstance(event, Reanalysis):
                return self.reanalyze(event)
            if isinstance(event, ClearEnv):
                return self.clear(event.env)
            return self.clear_search()

    def root(self, event: Root) -> Answer:
        """A root inference, as ``_forward_collect`` and ``_forward_eval`` make it."""
        self._timesteps = [np.array(t) for t in event.timesteps]
        output = self.model.initial_inference(
            torch.from_numpy(event.last_obs), self._root_actions(event.actions), torch.from_numpy(event.obs),
            self._timesteps
        )
        self._latents = [output.latent_state.detach().cpu().numpy()]
        self._history = []
        return dict(latent=output.latent_state, policy=output.policy_logits, value=output.value)

    def expand(self, event: Expand) -> Answer:
        """A simulation, as ``UniZeroMCTSCtree.search`` and ``SampledUniZeroMCTSCtree.search`` make it."""
        latents = np.asarray([self._latents[parent][row] for row, parent in enumerate(event.parents)])
        actions = torch.from_numpy(np.asarray(event.actions))
        self._history.append((latents, actions))
        output = self.model.recurrent_inference(
            self._history, len(self._history) - 1, list(event.depths), self._timesteps
        )
        self._latents.append(output.latent_state.detach().cpu().numpy())
        return dict(
            latent=output.latent_state, policy=output.policy_logits, value=output.value, reward=output.reward
        )

    def reanalyze(self, event: Reanalysis) -> Answer:
        """A reanalysis, as ``_compute_target_policy_reanalyzed`` makes it; answers are numbered by simulation."""
        self.world_model.reanalyze_phase = True
        self._timesteps = first = event.timesteps
        if ON_MAIN:  # whose buffer passes one for each sequence, and then one for each root
            first, self._timesteps = first[:, 0], np.pad(first, ((0, 0), (0, 1))).reshape(-1)
        output = self.model.initial_inference(torch.from_numpy(event.obs), event.actions, start_pos=first)
        self._latents, self._history = [output.latent_state.detach().cpu().numpy()], []
        answer = dict(latent=output.latent_state, policy=output.policy_logits, value=output.value)
        for number, simulation in enumerate(event.simulations):
            for name, tensor in self.expand(simulation).items():
                answer[f'{name} {number}'] = tensor
        self.world_model.reanalyze_phase = False
        return answer

    def clear(self, env: int) -> None:
        """Throw one environment's root contexts away, as the policies' ``_reset_collect`` does for all."""
        if getattr(self.world_model, 'use_new_cache_manager', False):
            self.world_model.kv_cache_manager.clear_init_caches(env_id=env)
        else:
            self.world_model.past_kv_cache_init_infer_envs[env].clear()

    def clear_search(self) -> None:
        """Throw the contexts of all inner nodes away."""
        if getattr(self.world_model, 'use_new_cache_manager', False):
            self.world_model.kv_cache_manager.clear_recur_cache()
        else:
            self.world_model.past_kv_cache_recurrent_infer.clear()

    @staticmethod
    def _root_actions(actions: Sequence[Any]) -> List[Any]:
        return [-1 if a is None else a if isinstance(a, np.ndarray) else np.int64(a) for a in actions]


class OriginalBatch(Batch):
    """
    LightZero's own model on the whole batch, driven as LightZero drives it: one environment's new episode puts all rows
    back to the first step, because its workers then call ``policy.reset`` without saying for whom.
    """

    def root(self, event: Root) -> Answer:
        if any(action is None for action in event.actions):
            event = event._replace(actions=[None] * len(event.actions))
        return super().root(event)


class _EndlessSlots(list):
    """A pool in which no slot is ever used twice, and a slot that nobody found (None) is empty."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if index is not None and index < len(self) else None

    def __setitem__(self, index: int, value: Any) -> None:
        assert index == len(self)
        self.append(value)


class LightZeroAlone(Batch):
    """
    The oracle: LightZero's own model with one environment, whose slots are never overwritten. A context that a
    search does not find raises TypeError in LightZero, because it indexes its pool by None; here that slot is
    empty, and so LightZero's own code goes on to rebuild the context from the latent state, as it was meant to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        assert self.world_model.env_num == 1
        adapter().grow_recurrent_pool(self.world_model)
        self.world_model.shared_pool_size_init = 2 ** 62
        self.world_model.shared_pool_recur_infer = _EndlessSlots()
        self.world_model.shared_pool_init_infer = [_EndlessSlots()]


# ---- comparison ------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How far one answer of one environment is from what it should be: max |a - b| / max |b|."""
    error: float
    event: int
    kind: str
    env: int
    answer: str


def play(player: Batch, trace: Trace) -> List[Union[Answer, None]]:
    """Play a trace; one answer, or None, for every event. Answers are copied as soon as they are given."""
    answers = []
    for event in trace.events:
        answer = player.play(event)
        answers.append(answer and {name: t.detach().clone() for name, t in answer.items()})
    return answers


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the expected tensor's largest entry; infinite for anything not comparable."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return math.inf
    return float((actual - expected).abs().max() / expected.abs().max())


def differences(trace: Trace, batch: Batch, alone: Sequence[Batch], told: Callable[[Answer], Answer] = dict,
                error_of: Callable[..., float] = lambda name, *tensors: relative_error(*tensors)) -> List[Difference]:
    """
    Play a trace to a batch, and to every environment alone; all differences, in the order of the trace. ``told`` makes
    of an answer of one environment alone what the batch is told.
    """
    actual = play(batch, trace)
    found = []
    for env, player in enumerate(alone):
        expected = iter([answer for answer in play(player, trace.alone(env)) if answer is not None])
        for number, (event, answers) in enumerate(zip(trace.events, actual)):
            if not isinstance(event, (Root, Expand)):
                continue
            wanted = told(next(expected))
            assert answers.keys() == wanted.keys()
            for name, right in wanted.items():
                error = error_of(name, answers[name][env:env + 1], right)
                found.append(Difference(error, number, type(event).__name__, env, name))
    return sorted(found, key=lambda d: (d.event, d.env))


def row_differences(actual: Answer, expected: Answer) -> List[Difference]:
    """All differences between two answers to one and the same batch, row by row."""
    assert actual.keys() == expected.keys()
    return [
        Difference(relative_error(actual[name][row], right[row]), 0, 'row', row, name)
        for name, right in expected.items() for row in range(len(right))
    ]


def worst(found: Sequence[Difference]) -> Difference:
    """The largest of some differences."""
    return max(found, key=lambda d: d.error)


def assert_same(found: Sequence[Difference], tolerance: float = TOLERANCE) -> None:
    """Every answer is right, or the first wrong one and the worst one are told."""
    wrong = [d for d in found if not d.error <= tolerance]
    assert not wrong, f'{len(wrong)} of {len(found)} answers are wrong\nfirst: {wrong[0]}\nworst: {worst(found)}'

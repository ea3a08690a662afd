"""
The exactness promise: in new mode every environment of a batch is answered as it is alone in LightZero's own model,
whatever else is in the batch. ``oracle.py`` says what alone means, and how a trace is played.
"""
import copy
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    Batch,
    ClearEnv,
    ClearSearch,
    LightZeroAlone,
    OriginalBatch,
    Root,
    Trace,
    assert_same,
    differences,
    random_reanalysis,
    random_trace,
    row_differences,
)
from small_models import (
    BOTH_ACTIONS,
    BOTH_POSITIONS,
    ON_MAIN_ALONE,
    ON_RELEASE_ALONE,
    Case,
    cached_model,
    original_model,
    random_cases,
)

from lzero_kvcache.host.weights import MANY_ROWS

SEED = 5

CASES = random_cases([4, 6, 8, 10, 20], embed_dim=st.sampled_from([32, 48]))

#: Everything that a random trace is made of. Small numbers come first, so that failures shrink to short traces.
TRACES = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2 ** 32 - 1),
        env_num=st.integers(1, 5),
        root_steps=st.integers(1, 6),
        simulations=st.integers(0, 10),
        clears=st.sampled_from([0., 0.1, 0.3]),
        episodes=st.sampled_from([0., 0.15, 0.4]),
        unknown=st.sampled_from([0., 0.3]),
        repeats=st.sampled_from([0., 0., 0.3]),
    )
)



def check(case: Case, trace: Trace, seed: int = SEED) -> None:
    """Play a trace to the new mode's batch and to LightZero, environment by environment; all answers are the same."""
    batch = Batch(cached_model(case, trace.env_num, seed))
    prototype = original_model(case, 1, seed)
    assert_same(differences(trace, batch, [LightZeroAlone(copy.deepcopy(prototype)) for _ in range(trace.env_num)]))


def check_random(case: Case, parts: dict) -> None:
    """Check a random trace."""
    parts = dict(parts)
    seed = parts.pop('seed')
    check(case, random_trace(np.random.default_rng(seed), case, **parts), seed)


@pytest.fixture
def as_for_many_rows(monkeypatch):
    """Small batches are computed as those of hundreds of rows are."""
    monkeypatch.setitem(MANY_ROWS, 'cpu', 1)
    monkeypatch.setattr('lzero_kvcache.engine.weights.MANY_NUMBERS', 1)


@pytest.fixture
def windows_that_grow(monkeypatch):
    """Windows are as long as the longest context of a batch asks for; these contexts are for several lengths."""
    monkeypatch.setattr('lzero_kvcache.engine.packing.LEAST_PAGES', 2)


HOW = pytest.mark.parametrize('how', [None, 'windows_that_grow', 'as_for_many_rows'])

MANY = int(os.environ.get('TRACES', 60))
"""How many random traces there are in all; results in the docs are of 600."""


@HOW
@settings(max_examples=MANY // 3, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, parts=TRACES)
def test_random_traces(request, how, case, parts):
    how and request.getfixturevalue(how)
    check_random(case, parts)


@pytest.mark.parametrize('context_length', [4, 20])
@BOTH_POSITIONS
def test_unequal_depths_and_slides(rotary, context_length):
    """One environment goes straight down, one stays at the root, the others take ways in between; then time goes on."""
    case = Case(rotary=rotary, context_length=context_length)
    rng = np.random.default_rng(SEED)
    trace = random_trace(rng, case, 4, root_steps=max(4, context_length // 2 + 1), simulations=6)
    for event in trace.events:
        if isinstance(event, Root):
            simulation, depths = 0, [[0] for _ in range(4)]
        else:
            event.parents[0], event.parents[1], event.parents[2] = simulation, 0, simulation // 2 * 2
            for env in range(4):
                depths[env].append(depths[env][event.parents[env]] + 1)
                event.depths[env] = depths[env][-1]
            simulation += 1
    check(case, trace)


@BOTH_ACTIONS
@BOTH_POSITIONS
def test_one_environment_is_cleared_in_a_search(rotary, continuous):
    """Its root is then a miss, for the rest of this search and for the next root step; the others notice nothing."""
    case = Case(rotary=rotary, continuous=continuous)
    trace = random_trace(np.random.default_rng(SEED), case, 3, root_steps=3, simulations=6)
    second_search = [i for i, event in enumerate(trace.events) if isinstance(event, Root)][1] + 1
    trace.events.insert(second_search + 2, ClearEnv(1))
    trace.events[second_search + 3].parents[1] = 0
    trace.events[second_search + 3].depths[1] = 0 if continuous else 1
    check(case, trace)


@BOTH_POSITIONS
def test_nodes_are_cleared_in_a_search(rotary):
    case = Case(rotary=rotary)
    trace = random_trace(np.random.default_rng(SEED), case, 3, root_steps=2, simulations=8)
    trace.events.insert(5, ClearSearch())
    check(case, trace)


@pytest.mark.parametrize('fresh', [0, 2])
@BOTH_ACTIONS
@BOTH_POSITIONS
def test_one_environment_starts_a_new_episode(rotary, continuous, fresh):
    """
    The others continue. (Beware of encoding only their last observations: in a batch of another size a latent state may
    come out different in its last bit, and so with another key.)
    """
    case = Case(rotary=rotary, continuous=continuous)
    trace = random_trace(np.random.default_rng(SEED), case, 3, root_steps=4, simulations=3)
    third = [event for event in trace.events if isinstance(event, Root)][2]
    third.actions[fresh] = None
    third.timesteps[fresh] = 0
    check(case, trace)


@BOTH_POSITIONS
def test_equal_latents_of_one_environment(rotary):
    """On a fresh model the newest of an environment's equal latent states is continued, but never a neighbour's."""
    case = Case(rotary=rotary, equal_latents=True)
    check(case, random_trace(np.random.default_rng(SEED), case, 3, root_steps=3, simulations=8, clears=0.1))


@BOTH_POSITIONS
def test_equal_observations(rotary):
    """Environments that see the same, at the same time or one after the other, keep their own contexts."""
    case = Case(rotary=rotary)
    trace = random_trace(np.random.default_rng(SEED), case, 4, root_steps=5, simulations=3, repeats=0.3)
    for event in trace.events:
        if isinstance(event, Root):
            event.obs[1], event.last_obs[1] = event.obs[0], event.last_obs[0]
    check(case, trace)


@pytest.mark.parametrize('case', [
    *(pytest.param(Case(obs_type=obs_type, sampled=sampled), marks=[ON_RELEASE_ALONE] * (obs_type == 'image_memory'))
      for obs_type in ('vector', 'image', 'image_memory') for sampled in (False, True)),
    *(pytest.param(Case(obs_type='text', rotary=rotary), marks=ON_RELEASE_ALONE) for rotary in (False, True)),
    pytest.param(Case(obs_type='image', encoder_type='vit'), marks=ON_MAIN_ALONE),
], ids=lambda case: f'{case.obs_type}-{case.encoder_type}-{case.model_name}-{case.rotary}')
def test_observations(case):
    check(case, random_trace(
        np.random.default_rng(SEED), case, 3, root_steps=3, simulations=3, clears=0.2, episodes=0.2
    ))


def check_reanalysis(case, seed, samples, simulations, environments=2):
    """The original is right here even in a batch: all of its contexts have one token."""
    event = random_reanalysis(np.random.default_rng(seed), case, samples, simulations)
    environments = environments or len(event.obs)
    actual = Batch(cached_model(case, environments, seed)).play(event)
    assert_same(row_differences(actual, OriginalBatch(original_model(case, environments, seed)).play(event)))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, seed=st.integers(0, 2 ** 32 - 1), samples=st.integers(1, 4), simulations=st.integers(1, 4))
def test_reanalysis(case, seed, samples, simulations):
    check_reanalysis(case, seed, samples, simulations)


@BOTH_POSITIONS
@BOTH_ACTIONS
def test_reanalysis_of_many_rows(as_for_many_rows, rotary, continuous):
    check_reanalysis(Case(rotary=rotary, continuous=continuous), SEED, samples=3, simulations=4)


@BOTH_POSITIONS
@BOTH_ACTIONS
def test_reanalysis_of_as_many_rows_as_environments(rotary, continuous):
    """LightZero's main branch keeps contexts along their paths, and its released one none."""
    check_reanalysis(Case(rotary=rotary, continuous=continuous), SEED, samples=2, simulations=6, environments=None)


@BOTH_POSITIONS
def test_reanalysis_leaves_collection_alone(rotary):
    """Nothing that a reanalysis makes is found later, and nothing that collection needs is lost by it."""
    case = Case(rotary=rotary)
    rng = np.random.default_rng(SEED)
    trace = random_trace(rng, case, 3, root_steps=3, simulations=4)
    for number, event in reversed(list(enumerate(trace.events))):
        if isinstance(event, Root) and number:
            trace.events.insert(number, random_reanalysis(rng, case, samples=2, simulations=2))
    check(case, trace)


def test_a_fresh_copy_answers_the_same():
    """A deep copy, as the policy makes it for its target model, starts with no contexts and has its own."""
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=3, simulations=4)
    model = cached_model(case, 2, SEED)
    used = Batch(model)
    for event in trace.events[:7]:
        used.play(event)
    prototype = original_model(case, 1, SEED)
    players = [LightZeroAlone(copy.deepcopy(prototype)) for _ in range(2)]
    assert_same(differences(trace, Batch(copy.deepcopy(model)), players))
    expected = Batch(cached_model(case, 2, SEED))
    for event in trace.events[:7]:
        expected.play(event)
    for event in trace.events[7:]:
        assert_same(row_differences(used.play(event), expected.play(event)))

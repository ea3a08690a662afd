"""
Pages have owners: whatever runs inside a search, beside it, or dies in it, changes nothing for anybody else.

A search that is disturbed, and the next two steps of its environments, are compared with a run that nothing disturbs.
"""
import gc
from unittest import mock

import numpy as np
import pytest
import torch
from builders import audit, in_threads
from disturbed import (
    CASE,
    ENVIRONMENTS,
    ROWS,
    SEED,
    SIMULATIONS,
    Broken,
    as_garbage,
    assert_undisturbed,
    lived,
    model_of,
    pages_that_are_taken,
    trace_of,
    undisturbed,
)
from oracle import Batch, play
from players import ByKey, ByNode
from small_models import cached_model

BOTH_SEARCHES = pytest.mark.parametrize('player', [ByNode, ByKey])


# ---------------------------------------------------------------------------------------------------- inside a search


def nodes_by_key(model, player):
    """As many as there are pages of a search."""
    rng = np.random.default_rng(SEED)
    for _ in range(20):
        latent = rng.random((ROWS, 1, CASE.embed_dim), dtype=np.float32)
        model.recurrent_inference([(latent, torch.zeros(ROWS, dtype=torch.long))], 0, [1] * ROWS, [np.array(3)] * ROWS)


def a_root_by_hand(model, player):
    Batch(model).play(trace_of(seed=SEED + 1).events[0])


def a_search_by_hand(model, player):
    play(Batch(model), trace_of(seed=SEED + 1, root_steps=2))


def a_root_by_hand_of_all(model, player):
    Batch(model).play(trace_of(ENVIRONMENTS, SEED + 1).events[0])


def searches_of(mode, env_ids, kind):
    def disturb(model, player):
        other = kind(model, mode, env_ids)
        play(other, trace_of(len(env_ids), SEED + 1, 3))
        other.close()

    return disturb


def another_search_from_the_same_root(model, player):
    """Opened, run half of its way, and closed by whoever closes the player."""
    if isinstance(player, ByKey):
        a_search_by_hand(model, player)
        return
    with model.world_model.inference.search_by_node(player.step, SIMULATIONS) as expand:
        for simulation in range(SIMULATIONS):
            expand(simulation, np.full(ROWS, simulation), np.arange(ROWS), np.full(ROWS, 2), [simulation + 1] * ROWS)


def an_exception(mode, env_ids):
    def disturb(model, player):
        other = ByNode(model, mode, env_ids)
        with pytest.raises(Broken), other._open:
            for event in trace_of(len(env_ids), SEED + 1).events[:5]:
                other.play(event)
            raise Broken

    return disturb


def a_search_that_is_abandoned(mode, env_ids):
    """Entered, never left, and garbage."""

    def disturb(model, player):
        other = ByNode(model, mode, env_ids)
        for event in trace_of(len(env_ids), SEED + 1).events[:5]:
            other.play(event)
        cycle = [other._open.pop_all()]
        cycle.append(cycle)
        del other, cycle
        gc.collect()

    return disturb


INSIDE = {
    'nodes by key': nodes_by_key,
    'a root by hand': a_root_by_hand,
    'a root by hand of more environments': a_root_by_hand_of_all,
    'a search by hand': a_search_by_hand,
    'a search of other environments': searches_of('collect', [3, 2], ByNode),
    'a search of other environments by key': searches_of('collect', [3, 2], ByKey),
    'an evaluation': searches_of('eval', [1, 0, 2], ByNode),
    'an evaluation by key': searches_of('eval', [1, 0, 2], ByKey),
    'another search from the same root': another_search_from_the_same_root,
    'an exception of other environments': an_exception('collect', [3, 2]),
    'an exception in an evaluation': an_exception('eval', [0, 1]),
    'a search that is abandoned': a_search_that_is_abandoned('collect', [3, 2]),
    'an evaluation that is abandoned': a_search_that_is_abandoned('eval', [0, 1]),
    'pages that are taken': pages_that_are_taken,
}


@BOTH_SEARCHES
@pytest.mark.parametrize('inside', list(INSIDE))
def test_what_runs_inside_a_search_changes_nothing_of_it(inside, player):
    model = model_of()
    assert_undisturbed(lived(player(model), trace_of(), INSIDE[inside]), undisturbed(player))
    assert model.world_model.inference.open.steps == []
    audit(model.world_model.kv_cache_manager)


@BOTH_SEARCHES
def test_a_step_of_the_same_environments_inside_a_search(player):
    """The search goes on as if it were alone; the environments are one step further, as if that had come after it."""
    trace, model, other = trace_of(root_steps=3), model_of(), model_of()
    first, inner, last = (trace.events[i:i + SIMULATIONS + 1] for i in range(0, 3 * (SIMULATIONS + 1), SIMULATIONS + 1))
    outside, inside = player(other), []
    expected = [outside.play(event) for event in (*first, *inner, *last)]
    outside.close()
    outer, within = player(model), player(model)
    answers = [outer.play(event) for event in first[:4]]
    inside = [within.play(event) for event in inner]
    within.close()
    pages_that_are_taken(model)
    answers += [outer.play(event) for event in first[4:]]
    outer.close()
    after = player(model)
    assert_undisturbed([*answers, *inside, *(after.play(event) for event in last)], expected)
    after.close()
    audit(model.world_model.kv_cache_manager)


def test_a_step_that_is_abandoned_inside_of_one_of_the_same_environments_that_ends_well():
    """It changes nothing, though its roots are newer."""
    trace, model = trace_of(root_steps=3), model_of()
    steps = [trace.events[i:i + SIMULATIONS + 1] for i in range(0, 3 * (SIMULATIONS + 1), SIMULATIONS + 1)]
    answers, player = [], ByNode(model)
    for number, step in enumerate(steps):
        answers += [player.play(event) for event in step[:3]]
        if number == 1:
            as_garbage(model, steps[2][:4])
        answers += [player.play(event) for event in step[3:]]
    player.close()
    assert_undisturbed(answers, undisturbed(ByNode, root_steps=3))
    audit(model.world_model.kv_cache_manager)


def test_a_search_of_other_rows_than_its_step_is_refused():
    model = model_of()
    player = ByNode(model)
    player.play(trace_of().events[0])
    problem = mock.Mock(rewards=[0.] * (ROWS - 1))
    with pytest.raises(ValueError, match=f'{ROWS - 1} rows for {ROWS} environments'):
        model.world_model.inference.in_arrays.search(player.step, problem)
    player.close()


def test_two_searches_from_one_root_side_by_side():
    """Each expands nodes of its own, turn by turn; one ends before the other."""
    root, *events = trace_of().events[:SIMULATIONS + 1]
    shifted = [event._replace(actions=[(action + 1) % 3 for action in event.actions]) for event in events]
    expected = []
    for each in (events, shifted):
        player = ByNode(model_of())
        expected.append([player.play(event) for event in (root, *each)][1:])
        player.close()
    model = model_of()
    player, other = ByNode(model), ByNode(model)
    player.play(root)
    other.step = player.step
    other.open(SIMULATIONS)
    answers = [], []
    for number in range(SIMULATIONS):
        answers[0].append(player.play(events[number]))
        if number < 4:
            answers[1].append(other.play(shifted[number]))
        if number == 3:
            other.close()
            pages_that_are_taken(model)
    player.close()
    assert_undisturbed(answers[0], expected[0])
    assert_undisturbed(answers[1], expected[1][:4])
    audit(model.world_model.kv_cache_manager)


class Later(ByNode):
    """Begins its search with the first node, as a policy does."""
    _later = None

    def open(self, simulations):
        self._later = simulations

    def expand(self, event):
        if self._later is not None:
            super().open(self._later)
            self._later = None
        return super().expand(event)


def in_turns(*players_and_events):
    """What each player is answered, one event of each after the other."""
    answers = [[] for _ in players_and_events]
    for events in zip(*(events for _, events in players_and_events)):
        for (player, _), event, found in zip(players_and_events, events, answers):
            found.append({name: part.clone() for name, part in player.play(event).items()})
    return answers


@pytest.mark.parametrize('kinds', [(Later, Later), (ByKey, ByKey), (Later, ByKey), (ByKey, Later)])
@pytest.mark.parametrize('places', [
    (('collect', [3, 2]), ('collect', [0, 1])), (('collect', [3, 2]), ('eval', [0, 1])),
    (('eval', [0, 1]), ('collect', [0, 1, 2])),
], ids=str)
def test_two_steps_that_take_turns_in_one_thread(kinds, places):
    """As two generators do: each search has its own roots and nodes, whichever step was opened last."""
    model = model_of(kv_cache_cfg=dict(recurrent_pool_size=400))  # which is not cleared while a step is open
    traces = [trace_of(len(env_ids), SEED + number) for number, (_, env_ids) in enumerate(places)]
    expected = [undisturbed(kind, mode, tuple(env_ids), seed=SEED + number)
                for number, (kind, (mode, env_ids)) in enumerate(zip(kinds, places))]
    players = [kind(model, *place) for kind, place in zip(kinds, places)]
    answers = in_turns(*((player, trace.events) for player, trace in zip(players, traces)))
    for player, found, right in zip(players, answers, expected):
        player.close()
        assert_undisturbed(found, right)
    counted = model.world_model.kv_cache_manager.counters()
    assert (counted['init']['misses'], counted['recur']['misses']) == (0, 0)
    audit(model.world_model.kv_cache_manager)


def test_a_root_inference_that_could_be_of_two_steps_is_refused():
    model, event = model_of(), trace_of().events[0]
    open_step, told = model.world_model.open_step, r'\[3, 2\] of collect or \[0, 1\] of eval'
    with open_step('collect', [3, 2]), open_step('eval', [0, 1]), pytest.raises(RuntimeError, match=told):
        Batch(model).play(event)
    audit(model.world_model.kv_cache_manager)


def test_a_search_from_a_step_of_another_thread_or_model_is_refused():
    model, other = model_of(), cached_model(CASE, ENVIRONMENTS, SEED + 1)
    player = ByNode(model)
    player.play(trace_of().events[0])

    def search(searched=model):
        with searched.world_model.inference.search_by_node(player.step, SIMULATIONS):
            pass

    for refused in (lambda: search(other), lambda: in_threads(search)):
        with pytest.raises(RuntimeError, match='in the same thread'):
            refused()
    player.close()
    audit(model.world_model.kv_cache_manager)

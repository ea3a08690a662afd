"""
Pages have owners: whatever runs inside a search, beside it, or dies in it, changes nothing for anybody else.

A search that is disturbed, and the next two steps of its environments, are compared with a run that nothing disturbs.
"""
import contextlib
import gc
import io
import sys
import threading
from unittest import mock

import lzero.mcts.tree_search.mcts_ctree as mcts_ctree
import numpy as np
import pytest
import seeded_search
import torch
from builders import Worker, assert_same_outputs, audit, cache_of, make_policy, roots
from ding.utils import MODEL_REGISTRY
from lzero.model.unizero_world_models.world_model import WorldModel as LightZeroWorldModel
from lzero.policy import utils as lightzero_utils
from oracle import Batch, Root, assert_same, play, random_trace, row_differences
from players import ByKey, ByNode
from small_models import Case, cached_model, world_model_cfg

from lzero_kvcache import KVCacheManager
from lzero_kvcache.cache.base import CURRENT
from lzero_kvcache.cache.nodes import NodeTable
from lzero_kvcache.host.old_world_model import OldWorldModel
from lzero_kvcache.host.tree_search import NodeSearch
from lzero_kvcache.host.world_model import NewWorldModel
from lzero_kvcache.search import inference
from lzero_kvcache.search import roots as root_inference

SEED, CASE = 11, Case()
ROWS, ENVIRONMENTS, SIMULATIONS = 2, 4, 6
MIDDLE = SIMULATIONS + 1 + 4  # of the second search
BOTH_SEARCHES = pytest.mark.parametrize('player', [ByNode, ByKey])
BOTH_FLAGS = pytest.mark.parametrize('new', [False, True], ids=['old', 'new'])
BOTH_WAYS = pytest.mark.parametrize('keyed', [False, True], ids=['by node', 'by key'])


class Broken(Exception):
    """What a step may die of."""


def trace_of(rows=ROWS, seed=SEED, root_steps=4):
    return random_trace(np.random.default_rng(seed), CASE, rows, root_steps=root_steps, simulations=SIMULATIONS)


def model_of(**options):
    return cached_model(CASE, ENVIRONMENTS, SEED, **options)


def lived(model, player, trace, disturb=None, at=MIDDLE):
    """What a player is answered in four steps, in the second of which something else goes on."""
    answers = []
    for number, event in enumerate(trace.events):
        if number == at and disturb is not None:
            disturb(model, player)
            pages_that_are_taken(model)
        answers.append({name: part.clone() for name, part in player.play(event).items()})
    player.close()
    return answers


def assert_undisturbed(answers, expected):
    assert len(answers) == len(expected)
    for answer, right in zip(answers, expected):
        assert_same(row_differences(answer, right))


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
    with model.world_model.inference.search_by_node(player.served, SIMULATIONS) as expand:
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


def pages_that_are_taken(model, player=None):
    """More than there are: the storage grows; and all that is free is overwritten."""
    manager = model.world_model.kv_cache_manager
    with manager.lease() as lease:
        taken = lease.allocate(manager._pages.free + 7)
        model.world_model.inference._slab().data[taken] = float('nan')
    model.world_model.inference._slab().data[taken] = 0.


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
    trace, model = trace_of(), model_of()
    expected = lived(model_of(), player(model_of()), trace)
    answers = lived(model, player(model), trace, INSIDE[inside])
    assert_undisturbed(answers, expected)
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
    expected = lived(model_of(), ByNode(model_of()), trace)
    answers, player = [], ByNode(model)
    for number, step in enumerate(steps):
        answers += [player.play(event) for event in step[:3]]
        if number == 1:
            as_garbage(model, steps[2][:4])
        answers += [player.play(event) for event in step[3:]]
    player.close()
    assert_undisturbed(answers, expected)
    audit(model.world_model.kv_cache_manager)


def test_a_search_of_other_rows_than_its_step_is_refused():
    model = model_of()
    player = ByNode(model)
    player.play(trace_of().events[0])
    problem = mock.Mock(rewards=[0.] * (ROWS - 1))
    with pytest.raises(ValueError, match=f'{ROWS - 1} rows for {ROWS} environments'):
        model.world_model.inference.search(player.served, problem)
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
    other.served = player.served
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
    expected = [lived(model_of(), kind(model_of(), *place), trace) for kind, place, trace in zip(kinds, places, traces)]
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
    serving, told = model.world_model.serving, r'\[3, 2\] of collect or \[0, 1\] of eval'
    with serving('collect', [3, 2]), serving('eval', [0, 1]), pytest.raises(RuntimeError, match=told):
        Batch(model).play(event)
    audit(model.world_model.kv_cache_manager)


def test_a_search_from_a_step_of_another_thread_or_model_is_refused():
    model, other = model_of(), cached_model(CASE, ENVIRONMENTS, SEED + 1)
    player = ByNode(model)
    player.play(trace_of().events[0])

    def search(searched=model):
        with searched.world_model.inference.search_by_node(player.served, SIMULATIONS):
            pass

    for refused in (lambda: search(other), lambda: in_threads(search)):
        with pytest.raises(RuntimeError, match='in the same thread'):
            refused()
    player.close()
    audit(model.world_model.kv_cache_manager)


# ---------------------------------------------------------------------------------------------------- steps that fail


def failed(model, events):
    """A step that dies in the middle of its search."""
    other = ByNode(model)
    with pytest.raises(Broken), other._open:
        for event in events:
            other.play(event)
        raise Broken


def abandoned(model, events):
    other = ByNode(model)
    for event in events:
        other.play(event)
    return other._open.pop_all()


def as_garbage(model, events):
    cycle = [abandoned(model, events)]
    cycle.append(cycle)
    del cycle
    gc.collect()


@pytest.mark.parametrize('fail', [failed, as_garbage])
@pytest.mark.parametrize('done', [1, 5])
def test_a_step_that_failed_is_no_step(fail, done):
    """Its environments go on from the roots that they had, or begin if it was their first."""
    trace, model = trace_of(), model_of()
    expected = lived(model_of(), ByNode(model_of()), trace)
    answers = []
    for number in range(0, len(trace.events), SIMULATIONS + 1):
        events = trace.events[number:number + SIMULATIONS + 1]
        fail(model, events[:done])
        player = ByNode(model)
        answers += [player.play(event) for event in events]
        player.close()
    assert_undisturbed(answers, expected)
    audit(model.world_model.kv_cache_manager)


@pytest.mark.parametrize('kept', [1, 2])
def test_a_step_that_is_abandoned_and_collected_late(kept):
    """By then its environments have moved on: nothing of theirs is put back."""
    trace, model = trace_of(), model_of()
    expected = lived(model_of(), ByNode(model_of()), trace)
    left = abandoned(model, trace.events[:3])
    for number in range(0, len(trace.events), SIMULATIONS + 1):
        player = ByNode(model)
        answers = [player.play(event) for event in trace.events[number:number + SIMULATIONS + 1]]
        player.close()
        assert_undisturbed(answers, expected[number:number + SIMULATIONS + 1])
        if number == kept * (SIMULATIONS + 1):
            del left
            gc.collect()
    audit(model.world_model.kv_cache_manager)


def test_an_abandoned_search_is_collected_in_the_middle_of_an_allocation():
    """It only leaves its pages to be released, since an allocation in two places at once would hand out one twice."""
    model = model_of()
    manager = model.world_model.kv_cache_manager
    trace = trace_of()
    left, release = [abandoned(model, trace.events[:3])], manager._pages.release

    def collecting(pages):
        before = manager._pages.references.copy()
        left.clear()
        assert (manager._pages.references == before).all()
        release(pages)

    with mock.patch.object(manager._pages, 'release', collecting), manager.lease() as lease:
        lease.allocate(3)
    assert not left
    assert_undisturbed(lived(model, ByNode(model), trace), lived(model_of(), ByNode(model_of()), trace))
    audit(manager)


def test_a_failed_step_puts_back_no_root_that_was_cleared():
    """As at the end of an episode, or after an update."""
    trace, model = trace_of(), model_of()
    player = ByNode(model)
    for event in trace.events[:SIMULATIONS + 1]:
        player.play(event)
    player.close()
    other = ByNode(model)
    with pytest.raises(Broken), other._open:
        other.play(trace.events[SIMULATIONS + 1])
        model.world_model.forget('collect', 1)
        raise Broken
    assert roots(model.world_model.kv_cache_manager) == [1, 0, 0, 0]
    audit(model.world_model.kv_cache_manager)


# ---------------------------------------------------------------------------------------------------- whole policies


def keyed_policy(policy):
    for name in ('_mcts_collect', '_mcts_eval'):
        setattr(policy, name, mcts_ctree.UniZeroMCTSCtree(policy._cfg))
    return policy


def policy_of(keyed=False, seed=SEED, **options):
    policy = make_policy(True, seed=seed, evaluators=3, **options)
    return keyed_policy(policy) if keyed else policy


@contextlib.contextmanager
def in_the_middle(action, at=2):
    """Call something once, after some simulations of the search that comes."""
    function, calls = seeded_search.TREE.batch_backpropagate, []

    def run(*args, **kwargs):
        calls.append(at)
        if len(calls) == at:
            action()
        return function(*args, **kwargs)

    with mock.patch.object(seeded_search.TREE, 'batch_backpropagate', run):
        yield
    assert len(calls) > at


@BOTH_WAYS
@pytest.mark.parametrize('modes', [('collect', 'eval'), ('eval', 'collect'), ('collect', 'collect')], ids=' in '.join)
def test_a_whole_search_inside_another(modes, keyed, lines):
    """A collection inside an evaluation and the reverse, and other environments' inside one of the same mode. By key
    both have their nodes in one pool, which must have room for them."""
    inner_ids, outer_ids = ([2], [0, 1]) if modes[0] == modes[1] else ([0, 1, 2], [0, 1, 2])
    room = dict(kv_cache_cfg=dict(recurrent_pool_size=24))
    policy = policy_of(keyed, **room)
    inner, outer = (Worker(policy, mode) for mode in modes)
    alone_inner, alone_outer = (Worker(policy_of(keyed, **room), mode) for mode in modes)
    for step in range(5):
        within = []
        if step % 2 == 0:
            with in_the_middle(lambda found=within: found.append(inner.step(inner_ids))):
                output = outer.step(outer_ids)
        else:
            output = outer.step(outer_ids)
            within.append(inner.step(inner_ids))
        assert_same_outputs(output, alone_outer.step(outer_ids), outer_ids)
        assert_same_outputs(within[0], alone_inner.step(inner_ids), inner_ids)
        audit(cache_of(policy))
    assert not [message for level, message in lines() if level == 'WARNING']


def test_a_pool_without_room_for_a_search_by_key_inside_another_says_so(lines):
    policy = policy_of(True)
    with in_the_middle(lambda: Worker(policy, 'eval').step([0, 1, 2])):
        Worker(policy).step([0, 1, 2])
    [warning] = [message for level, message in lines() if level == 'WARNING']
    assert 'raise kv_cache_cfg.recurrent_pool_size' in warning
    audit(cache_of(policy))


class TestTwoPolicies:

    @BOTH_WAYS
    def test_in_one_thread(self, keyed):
        """Turn by turn, and one inside the other."""
        ours, theirs = Worker(policy_of(keyed)), Worker(policy_of(not keyed, SEED + 1))
        expected = Worker(policy_of(keyed)), Worker(policy_of(not keyed, SEED + 1))
        for step in range(4):
            within = []
            if step % 2:
                with in_the_middle(lambda found=within: found.append(theirs.step([2, 0]))):
                    output = ours.step([0, 1, 2])
            else:
                output = ours.step([0, 1, 2])
                within.append(theirs.step([2, 0]))
            assert_same_outputs(output, expected[0].step([0, 1, 2]), [0, 1, 2])
            assert_same_outputs(within[0], expected[1].step([2, 0]), [2, 0])
        for worker in (ours, theirs):
            audit(worker.policy.get_attribute('model').world_model.kv_cache_manager)

    def test_in_two_threads(self):
        before, steps = lightzeros_names(), 6
        policies = [policy_of(), policy_of(seed=SEED + 1)]
        expected = [Worker(policy_of()), Worker(policy_of(seed=SEED + 1))]
        expected = [[worker.step([0, 1, 2]) for _ in range(steps)] for worker in expected]
        workers, outputs = [Worker(policy) for policy in policies], [[], []]
        with contextlib.redirect_stdout(io.StringIO()), seeded_search.seeded_search(NodeSearch):
            in_threads(*[
                lambda worker=worker, found=found: [found.append(worker.forward([0, 1, 2])) for _ in range(steps)]
                for worker, found in zip(workers, outputs)
            ])
        for found, right in zip(outputs, expected):
            for output, wanted in zip(found, right):
                assert_same_outputs(output, wanted, [0, 1, 2])
        for policy in policies:
            audit(cache_of(policy))
        assert lightzeros_names() == before

    @pytest.mark.parametrize('search', ['tree', 'auto'])
    def test_collection_and_evaluation_of_one_in_two_threads(self, search):
        modes, steps = ('collect', 'eval'), 30

        def workers():
            policy = make_policy(True, seed=SEED, evaluators=3, kv_cache_cfg=dict(search=search))
            return [Worker(policy, mode) for mode in modes]

        found = [], []
        with contextlib.redirect_stdout(io.StringIO()), seeded_search.seeded_search(NodeSearch):
            expected = [[worker.forward([0, 1, 2]) for _ in range(steps)] for worker in workers()]
            in_threads(*[
                lambda worker=worker, outputs=outputs: [outputs.append(worker.forward([0, 1, 2])) for _ in range(steps)]
                for worker, outputs in zip(workers(), found)
            ])
        values = [[[output[row]['predicted_value'] for row in range(3)] for output in outputs]
                  for each in (found, expected) for outputs in each]
        np.testing.assert_allclose(values[:2], values[2:], rtol=1e-4, atol=1e-5)

    def test_caches_of_the_old_system_are_cleared_in_two_threads(self, capsys):
        models = [make_policy(False, seed=seed)._model.world_model for seed in (SEED, SEED + 1)]
        before, times = sys.stdout, 3000
        capsys.readouterr()
        in_threads(*[lambda model=model: [model.clear_caches() for _ in range(times)] for model in models])
        assert sys.stdout is before
        assert capsys.readouterr().out.count(OldWorldModel.clear_line) == len(models) * times

    @BOTH_FLAGS
    def test_an_episode_that_ends_in_another_thread_is_no_reset_inside_of_a_search(self, new):
        policy = make_policy(new, seed=SEED, evaluators=3)
        worker = Worker(policy)
        worker.step([0, 1, 2])
        with in_the_middle(lambda: in_threads(lambda: policy.collect_mode.reset([1]))):
            worker.step([2, 0])
        assert [('collect', env_id) in policy._environments for env_id in range(3)] == [True, False, True]
        assert not new or roots(cache_of(policy)) == [1, 0, 1]

    def test_models_that_are_built_in_two_threads(self):
        """Each gets the world model of its own flag, under the one name that LightZero has for both."""
        before, built = lightzeros_names(), {True: [], False: []}
        assert lightzero_utils.entropy is not None and LightZeroWorldModel in before.values()

        def build(flag):
            for _ in range(4):
                built[flag].append(MODEL_REGISTRY.get(CASE.model_name)(
                    observation_shape=CASE.obs_shape[0], action_space_size=CASE.action_space_size,
                    world_model_cfg=world_model_cfg(CASE, 2, use_new_cache_manager=flag)
                ))

        with contextlib.redirect_stdout(io.StringIO()):
            in_threads(lambda: build(True), lambda: build(False))
        assert [type(model.world_model) for model in built[True]] == [NewWorldModel] * 4
        assert [type(model.world_model) for model in built[False]] == [OldWorldModel] * 4
        assert lightzeros_names() == before


def lightzeros_names():
    """Everything that LightZero's modules have under a name."""
    modules = [(name, module) for name, module in sys.modules.items() if name.split('.')[0] == 'lzero']
    return {
        (name, attribute): value for name, module in modules for attribute, value in vars(module).items()
        if callable(value) and not attribute.startswith('__')
    }


def in_threads(*functions):
    """Run functions at once, switching as often as can be; what one of them raises is raised here."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function, )) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


# ---------------------------------------------------------------------------------------------------- failures


#: Where a step may fail, and the ways of searching that pass there.
POINTS = {
    'taking pages': (lambda policy: (cache_of(policy), 'take'), 'both'),
    'the slab': (lambda policy: (cache_of(policy).storage, 'ready'), 'both'),
    'contexts begun anew': (lambda policy: (policy._model.world_model.inference.engine, 'begin'), 'both'),
    'first observations': (lambda policy: (policy._model.world_model.inference.engine, 'first'), 'both'),
    'a step': (lambda policy: (policy._model.world_model.inference.engine, 'step'), 'both'),
    'writing pages': (lambda policy: (cache_of(policy).storage.slab, 'write'), 'both'),
    'finding roots': (lambda policy: (cache_of(policy), 'find_init'), 'both'),
    'storing roots': (lambda policy: (cache_of(policy), 'store_init'), 'both'),
    'finding nodes': (lambda policy: (cache_of(policy), 'find_recur'), 'by key'),
    'storing nodes': (lambda policy: (cache_of(policy), 'store_recur'), 'by key'),
    'forgetting keys': (lambda policy: (cache_of(policy), 'forget_init'), 'by key'),
    'a table of nodes': (lambda policy: (NodeTable, '__init__'), 'by node'),
    'expanding a node': (lambda policy: (NodeTable, 'expand'), 'by node'),
    'the copy there': (lambda policy: (root_inference, 'send'), 'both'),
    'the copy back': (lambda policy: (root_inference, 'to_cpu'), 'both'),
    "a node's copy back, by key": (lambda policy: (inference, 'to_cpu'), 'by key'),
    "a node's copy back": (lambda policy: (inference, 'to_cpu'), 'by node'),
    'the tree, down': (lambda policy: (seeded_search.TREE, 'batch_traverse'), 'both'),
    'the tree, up': (lambda policy: (seeded_search.TREE, 'batch_backpropagate'), 'both'),
}


@contextlib.contextmanager
def failing(owner, name, at):
    """The ``at``-th call of a function, from 0, raises; yields a list of the calls."""
    function, calls = getattr(owner, name), []

    def run(*args, **kwargs):
        calls.append(name)
        if len(calls) == at + 1:
            raise Broken
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, run):
        yield calls


def begun_anew(step, *workers):
    """What happens before a step: contexts are lost, one environment's episode ends, or all do."""
    for worker in workers:
        if step % 3 == 1:
            worker.policy.get_attribute('model').world_model.kv_cache_manager.clear_init_caches('collect', 1)
        for env_id in {2: [0], 3: [0, 1, 2]}.get(step % 4, ()):
            worker.done(env_id)


@pytest.mark.parametrize(('point', 'keyed'), [
    (point, keyed) for point, (_, ways) in POINTS.items() for keyed in (False, True)
    if ways in ('both', 'by key' if keyed else 'by node')
])
def test_a_failure_at_each_point_of_a_step(point, keyed):
    """Nothing leaks, counts agree, and the step can be done again as if nothing had been: at each call that it makes
    there, one after the other."""
    policy = policy_of(keyed, simulations=3)
    worker, expected = Worker(policy), Worker(policy_of(keyed, simulations=3))
    owner, name = POINTS[point][0](policy)
    failures, step, at = 0, 0, 0
    while step < 4 or failures == step:
        begun_anew(step, worker, expected)
        with failing(owner, name, at) as calls, contextlib.suppress(Broken):
            output = worker.step([0, 1, 2])
        if len(calls) > at:
            failures += 1
            audit(cache_of(policy))
            counters = cache_of(policy).counters()
            for pool in ('init', 'recur', 'total'):
                assert counters[pool]['hits'] + counters[pool]['misses'] == counters[pool]['queries']
            output = worker.step([0, 1, 2])
        at = at + 1 if len(calls) > at else 0
        assert_same_outputs(output, expected.step([0, 1, 2]), [0, 1, 2])
        step += 1
    assert failures > 0
    audit(cache_of(policy))
    assert policy._model.world_model.inference.open.steps == []


# ---------------------------------------------------------------------------------------------------- by environment


class TestByEnvironment:

    @pytest.mark.parametrize('mode', ['collect', 'eval'])
    def test_a_served_step_hashes_nothing_and_copies_no_latent(self, mode, monkeypatch):
        hashed, copied = [], []
        for owner, found, name in ((root_inference, hashed, 'hash_rows'), (root_inference, copied, 'to_cpu'),
                                   (inference, copied, 'to_cpu')):
            function = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda value, found=found, function=function: (
                found.append(value.shape), function(value))[1])
        policy = policy_of()
        worker = Worker(policy, mode)
        for _ in range(3):
            worker.step([0, 1, 2])
        assert hashed == []
        # A root: whether its latent state and its predictions are finite. A node: reward, value and two logits.
        assert copied == ([(3, 2)] + [(3, 4)] * 4) * 3
        Batch(policy._model).play(Root(*(field[:2] for field in trace_of().events[0]))._replace(
            last_obs=np.zeros((2, 4), np.float32), obs=np.ones((2, 4), np.float32)
        ))
        assert hashed == [(2, 32)]  # by hand they are found by key

    @pytest.mark.parametrize('finds', [True, False])
    def test_an_override_is_called(self, finds, registered):
        """And what it says is done: a manager that finds nothing has every context begun anew."""
        asked = []

        class Mine(KVCacheManager):

            def find_init(self, mode, env_ids, keys):
                asked.append(('find', mode, list(env_ids), list(keys)))
                tables, counts = super().find_init(mode, env_ids, keys)
                return tables * finds, counts * finds

            def store_init(self, mode, env_ids, keys, rows):
                asked.append(('store', mode, list(env_ids), list(keys)))
                super().store_init(mode, env_ids, keys, rows)

        registered('mine', Mine)
        policy = policy_of(kv_cache_cfg=dict(type='mine'))
        for mode in ('collect', 'eval'):
            worker = Worker(policy, mode)
            worker.step([0, 1, 2])
            worker.step([2, 0])
        assert asked == [
            (what, mode, env_ids, [CURRENT] * len(env_ids)) for mode in ('collect', 'eval')
            for what, env_ids in (('store', [0, 1, 2]), ('find', [2, 0]), ('store', [2, 0]))
        ]
        counted = cache_of(policy).counters()['init']
        assert (counted['queries'], counted['hits']) == (4, 4 * finds)
        audit(cache_of(policy))

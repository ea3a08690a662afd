"""Whole policies at once: one's search inside another's, in turn, and in threads. Each is answered as it is alone."""
import contextlib
import io
import sys
from unittest import mock

import numpy as np
import pytest
import seeded_search
from builders import Worker, assert_same_outputs, audit, cache_of, in_threads, make_policy, policy_of, roots
from ding.utils import MODEL_REGISTRY
from lzero.model.unizero_world_models.world_model import WorldModel as LightZeroWorldModel
from lzero.policy import utils as lightzero_utils
from small_models import Case, world_model_cfg

from lzero_kvcache.host.old_world_model import OldWorldModel
from lzero_kvcache.host.tree_search import KeylessSearch
from lzero_kvcache.host.world_model import NewWorldModel

SEED, CASE = 11, Case()
BOTH_FLAGS = pytest.mark.parametrize('new', [False, True], ids=['old', 'new'])
BOTH_WAYS = pytest.mark.parametrize('keyed', [False, True], ids=['by node', 'by key'])


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
        with contextlib.redirect_stdout(io.StringIO()), seeded_search.seeded_search(KeylessSearch):
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
        with contextlib.redirect_stdout(io.StringIO()), seeded_search.seeded_search(KeylessSearch):
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
        assert [policy._environments.inside('collect', env_id) for env_id in range(3)] == [True, False, True]
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

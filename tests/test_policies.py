"""The policies: configuration through DI-engine's own merging, and contexts and counts that belong to environments."""
import contextlib
import copy
import io
import types
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from builders import Worker, assert_same_outputs, audit, cache_of, compiled, differs, make_policy, roots, small_cartpole
from hypothesis import given
from hypothesis import strategies as st
from lzero.policy import utils as lightzero_utils
from lzero.policy.sampled_unizero import SampledUniZeroPolicy as LightZeroSampledUniZeroPolicy
from lzero.policy.unizero import UniZeroPolicy as LightZeroUniZeroPolicy
from small_models import ON_MAIN
from test_whole_search import ACTIONS, make

from lzero_kvcache import ConfigError
from lzero_kvcache.host import policies, row_loops
from lzero_kvcache.run_hooks import HOOKS
from lzero_kvcache.telemetry import HOOK_CONFIG, HOOK_KEY

BOTH_FLAGS = pytest.mark.parametrize('new', [False, True], ids=['old', 'new'])
#: LightZero's main branch keeps the last observations of vectors as whole numbers, so that it finds no root.
OLD_FINDS_ROOTS = pytest.mark.parametrize('new', [
    pytest.param(False, marks=pytest.mark.skipif(ON_MAIN, reason='the main branch finds no root')), True
], ids=['old', 'new'])
POSITIONS = pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])


def counts(policy):
    """(queries, hits) of init, recur and total."""
    counters = cache_of(policy).counters()
    return {pool: (counters[pool]['queries'], counters[pool]['hits']) for pool in ('init', 'recur', 'total')}


class TestConfiguration:

    @pytest.mark.parametrize(('ours', 'theirs'), [
        (policies.UniZeroPolicy, LightZeroUniZeroPolicy),
        (policies.SampledUniZeroPolicy, LightZeroSampledUniZeroPolicy),
    ])
    def test_the_default_config_is_lightzeros_and_the_hooks(self, ours, theirs):
        config, original = ours.default_config(), theirs.default_config()
        assert {key: config.learn.learner.hook.pop(key) for key in HOOKS} == HOOKS
        # Whether a user gave it must be seen; the policy puts LightZero's value back.
        assert original.model.world_model_cfg.pop('env_num') == 8
        assert config.cfg_type == original.cfg_type
        if not original.learn.get('learner'):
            assert config.learn.pop('learner') == dict(hook={})
        assert config == original

    @BOTH_FLAGS
    @pytest.mark.parametrize('policy_type', ['unizero', 'sampled_unizero'])
    def test_the_compiled_config_has_one_hook(self, new, policy_type):
        """However often it is asked for, under its fixed key, and beside DI-engine's own."""
        for user_hook in ({}, {HOOK_KEY: dict(HOOK_CONFIG)}, {HOOK_KEY: {'priority': 40}, 'log_show_after_iter': 7}):
            main = small_cartpole(new)
            main.policy.learn = dict(learner=dict(hook=user_hook))
            hooks = compiled(main, policy_type).policy.learn.learner.hook
            ours = [key for key, hook in hooks.items() if isinstance(hook, dict) and hook.get('type') == HOOK_KEY]
            assert ours == [HOOK_KEY]
            assert hooks[HOOK_KEY].position == 'after_iter'
            assert hooks[HOOK_KEY].priority == user_hook.get(HOOK_KEY, {}).get('priority', HOOK_CONFIG['priority'])
            assert hooks.log_show_after_iter == user_hook.get('log_show_after_iter', 100)
            assert 'save_ckpt_after_iter' in hooks


class Twins:
    """A batch of environments, and each of them in a policy of its own with the same weights."""

    def __init__(self, env_ids, mode='collect', **options):
        self.env_ids = env_ids
        self.batch = Worker(make_policy(True, **options), mode)
        self.alone = {env_id: Worker(make_policy(True, **options), mode) for env_id in env_ids}

    def step(self, env_ids, ready=None):
        output = self.batch.step(list(env_ids) if ready is None else ready)
        for env_id in env_ids:
            assert_same_outputs(output, self.alone[env_id].step([env_id]), [env_id])
        assert set(output) == set(env_ids)
        return output

    def done(self, env_id):
        self.batch.done(env_id)
        self.alone[env_id].done(env_id)


class TestEnvironments:
    """In new mode a context belongs to an environment, whatever rows there are."""

    @pytest.mark.parametrize('mode', ['collect', 'eval'])
    @POSITIONS
    def test_a_batch_is_answered_as_its_environments_alone(self, mode, rotary):
        """All, then some, in any order, one only; one starts a new episode on the way."""
        twins = Twins([0, 1, 2], mode, rotary=rotary, evaluators=3)
        twins.step([0, 1, 2])
        twins.step([0, 1, 2])
        twins.step([2, 0])
        twins.done(1)
        twins.step([1, 0, 2])
        twins.step([1])
        twins.step([0, 1, 2])

    def test_an_environment_keeps_no_observation_but_its_own(self):
        """Whatever batches it was in."""
        policy = make_policy(True)
        worker = Worker(policy)
        for env_ids in ([0, 1, 2], [0, 1], [0], [2, 0]):
            worker.step(env_ids)
        steps = policy._environments._steps['collect'].values()
        kept = {step.observations.data_ptr(): step.observations.untyped_storage().nbytes() for step in steps}
        assert sum(kept.values()) == 3 * 4 * 4

    def test_old_mode_keeps_no_observation(self):
        """LightZero's policies keep their own."""
        policy = make_policy(False)
        Worker(policy).step([0, 1, 2])
        assert [step.observations for step in policy._environments._steps['collect'].values()] == [None] * 3

    def test_ready_environments_as_an_array_or_not_at_all(self):
        twins = Twins([0, 1, 2])
        twins.step([0, 1, 2], np.arange(3))
        twins.step([2, 1], np.array([2, 1]))
        policy = make_policy(True)
        output = policy.collect_mode.forward(
            torch.zeros(3, 4), [np.ones(2, np.int8)] * 3, to_play=[-1] * 3, timestep=[np.array(0)] * 3
        )
        assert list(output) == [0, 1, 2]

    def test_the_context_matters(self):
        """Or else nothing above would show anything: an environment without its past is answered otherwise."""
        with_past, without = Worker(make_policy(True)), Worker(make_policy(True))
        for worker in (with_past, without):
            worker.step([0, 1, 2])
        without.policy.reset([1])
        assert differs(without.step([0, 1, 2]), with_past.step([0, 1, 2]), [0, 1, 2]) == [1]

    @pytest.mark.parametrize('steps', [200, 2000])
    def test_the_periodic_clearing_is_no_reset(self, steps):
        """LightZero clears every cache when one environment's step count divides by 200 (or 2,000)."""
        policy = make_policy(True)
        worker = Worker(policy)
        worker.step([0, 1, 2])
        policy.collect_mode.reset(env_id=1, current_steps=steps, reset_init_data=False)
        policy.eval_mode.reset(env_id=1, current_steps=steps, reset_init_data=False)
        assert roots(cache_of(policy)) == [1, 1, 1]
        worker.step([0, 1, 2])
        assert counts(policy)['init'] == (3, 3)

    @pytest.mark.parametrize('mode', ['collect', 'eval'])
    def test_more_environments_than_the_config_knows(self, mode):
        policy = make_policy(True)
        worker = Worker(policy, mode)
        worker.step([0, 1])
        for env_ids in ([0, 1, 2, 3], [5]):
            with pytest.raises(ValueError, match=r'world_model_cfg\.env_num=3'):
                worker.step(env_ids)
        audit(cache_of(policy))
        worker.step([0, 1])
        assert counts(policy)['init'][0] >= 2


class TestSelection:

    @given(st.data(), st.sampled_from([1., 0.5, 0.25, 3]), st.integers(0, 2 ** 32 - 1))
    def test_lightzeros_actions_and_entropies_by_the_same_draws(self, data, temperature, seed):
        """To the last bit, for roots with any numbers of legal actions, and for one that nobody has searched."""
        visits = data.draw(st.lists(
            st.lists(st.integers(0, 100), min_size=1, max_size=20).filter(any), min_size=1, max_size=6))
        ways = data.draw(st.lists(st.booleans(), min_size=len(visits), max_size=len(visits)))
        found = []
        step = types.SimpleNamespace(visits=visits[1:])
        for function in (lightzero_utils.select_action, row_loops.Selection(step)):
            np.random.seed(seed)
            found.append([function(row, temperature, way) for row, way in zip(visits, ways)])
            found[-1].append(np.random.random_sample())
        assert found[0] == found[1]

    @pytest.mark.parametrize('deterministic', [True, False])
    def test_a_root_without_visits_is_an_error(self, deterministic):
        """As in LightZero, wherever it stands."""
        for function in (lightzero_utils.select_action, row_loops.Selection(types.SimpleNamespace(visits=[[3, 1]]))):
            with pytest.raises(ZeroDivisionError):
                function([0, 0], 1., deterministic)

    @BOTH_FLAGS
    @pytest.mark.parametrize('whose', ['ours', 'somebody else\'s'])
    def test_it_serves_searches_of_new_mode_alone(self, new, whose, monkeypatch):
        """Unless somebody has put a function of their own in the place of scipy's."""
        owner, name = (row_loops.Selection, '__call__') if whose == 'ours' else (lightzero_utils, 'entropy')
        function, asked = getattr(owner, name), []

        def counted(*args, **kwargs):
            asked.append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        output = Worker(make_policy(new)).step([0, 1, 2])
        assert len(asked) == (0 if whose == 'ours' and not new else 3)
        assert getattr(owner, name) is counted
        for row in output.values():
            visits = np.asarray(row['visit_count_distributions'], dtype=float)
            expected = scipy.stats.entropy(visits / visits.sum(), base=2)
            assert row['visit_count_distribution_entropy'] == pytest.approx(expected, rel=1e-12)


class Choosy(Worker):
    """In each step other actions are illegal."""
    temperature = 0.5

    def mask(self, env_id):
        mask = np.ones(ACTIONS, np.int8)
        mask[env_id] = self._timestep.get(env_id, 0) % 2
        return mask


class TestRowsAtOnce:
    """What LightZero does for one row after the other."""

    @given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), min_size=1, max_size=8),
           st.integers(0, 2 ** 32 - 1))
    def test_noise_is_that_of_each_row_alone(self, legal, seed):
        """Also where the next row has other numbers of legal actions, and past the last row."""
        masks, found = row_loops.masks_of([np.array(row, np.int8) for row in legal]), []
        for numpy in (np, row_loops.drawing_at_once(masks)):
            np.random.seed(seed)
            rows = [numpy.random.dirichlet([0.3] * sum(mask)).tolist() for mask in [*masks, masks[0]]]
            found.append([*rows, np.random.random_sample()])
        assert found[0] == found[1]

    @pytest.mark.parametrize(('kind', 'search', 'mode', 'eps'), [
        ('unizero', 'tree', 'collect', False), ('unizero', 'device', 'collect', False),
        ('unizero', 'device', 'collect', True), ('unizero', 'device', 'eval', False),
        ('discrete', 'device', 'collect', False), ('continuous', 'device', 'eval', False),
    ])
    def test_a_step_is_lightzeros_own(self, kind, search, mode, eps, monkeypatch):
        """Bit for bit and with the same draws, also with other legal actions in some rows, or fewer ready rows."""
        changes, found = dict(root_noise_weight=0.25, eps=dict(eps_greedy_exploration_in_collect=eps)), []
        for at_once in (True, False):
            if not at_once:
                monkeypatch.setattr(policies, 'with_rows_at_once', lambda forward, *_: forward)
                monkeypatch.setattr(policies, 'masks_of', lambda masks: masks)
            worker = Choosy(make(kind, search, changes=changes), mode)
            torch.manual_seed(3)
            np.random.seed(3)
            steps = [worker.step(ready) for ready in ([0, 1, 2], [2, 1], [0, 1, 2])]
            found.append((steps, np.random.random_sample()))
        np.testing.assert_equal(*found)


class TestCounts:
    """The design's table, on a script whose counts are told by hand: three environments, four simulations."""

    @OLD_FINDS_ROOTS
    def test_one_environments_new_episode(self, new):
        """It has no predecessor. In old mode its end throws the other two contexts away: both are misses."""
        policy = make_policy(new)
        worker = Worker(policy)
        worker.step([0, 1, 2])
        worker.done(1)
        worker.step([0, 1, 2])
        hits = 2 if new else 0
        assert counts(policy) == dict(init=(2, hits), recur=(24, 24), total=(26, 24 + hits))
        worker.step([0, 1, 2])
        assert counts(policy) == dict(init=(5, hits + 3), recur=(36, 36), total=(41, 39 + hits))

    @OLD_FINDS_ROOTS
    def test_fewer_ready_environments(self, new):
        """After a step with two of three, old mode puts all rows back to "first step"."""
        policy = make_policy(new)
        worker = Worker(policy)
        worker.step([0, 1, 2])
        worker.step([0, 1])
        assert counts(policy) == dict(init=(2, 2), recur=(20, 20), total=(22, 22))
        worker.step([0, 1, 2])
        hits = 3 if new else 0
        assert counts(policy) == dict(init=(5, 2 + hits), recur=(32, 32), total=(37, 34 + hits))

    @OLD_FINDS_ROOTS
    def test_collection_and_evaluation_together(self, new):
        policy = make_policy(new)
        Worker(policy).step([0, 1, 2])
        evaluator = Worker(policy, 'eval')
        evaluator.step([0, 1])
        evaluator.step([0, 1])
        assert counts(policy) == dict(init=(2, 2), recur=(28, 28), total=(30, 30))

    @BOTH_FLAGS
    def test_cleared_contexts_are_misses(self, new):
        """As after every training phase."""
        policy = make_policy(new)
        worker = Worker(policy)
        worker.step([0, 1, 2])
        with contextlib.redirect_stdout(io.StringIO()):
            policy._model.world_model.clear_caches()
        worker.step([0, 1, 2])
        assert counts(policy) == dict(init=(3, 0), recur=(24, 24), total=(27, 24))

    def test_the_pools_of_both_modes(self):
        """The raw counts of the summary: 3 + 2 queries of roots, and what a search found in its nodes."""
        policy = make_policy(True)
        worker, evaluator = Worker(policy), Worker(policy, 'eval')
        worker.step([0, 1, 2])
        worker.step([0, 1, 2])
        evaluator.step([0, 1])
        evaluator.step([0, 1])
        summary = cache_of(policy).get_stats_summary()
        assert list(summary['eval_pools']) == ['env_0', 'env_1']
        assert sum(pool['size'] for pool in summary['init_pools'].values()) == 3
        assert sum(pool['size'] for pool in summary['eval_pools'].values()) == 2
        assert summary['wm_pool']['total_queries'] == 3 + 2 + 6 * 4 + 4 * 4
        for pool in [*summary['init_pools'].values(), *summary['eval_pools'].values(), summary['recur_pool']]:
            assert pool['hits'] + pool['misses'] == pool['total_queries']
            assert pool['misses'] == 0

    @OLD_FINDS_ROOTS
    def test_resetting(self, new):
        policy = make_policy(new)
        worker = Worker(policy)
        worker.step([0, 1, 2])
        cache_of(policy).reset_stats()
        assert counts(policy) == dict(init=(0, 0), recur=(0, 0), total=(0, 0))
        worker.step([0, 1, 2])
        assert counts(policy) == dict(init=(3, 3), recur=(12, 12), total=(15, 15))


class TestCheckpoints:

    def test_same_keys_and_they_load_either_way(self):
        old, new = make_policy(False, seed=1), make_policy(True, seed=2)
        states = [copy.deepcopy(policy.learn_mode.state_dict()) for policy in (old, new)]
        assert states[0].keys() == states[1].keys()
        for name in ('model', 'target_model'):
            assert list(states[0][name]) == list(states[1][name])
        old.learn_mode.load_state_dict(states[1])
        new.learn_mode.load_state_dict(states[0])
        for policy, state in ((old, states[1]), (new, states[0])):
            for model, name in ((policy._model, 'model'), (policy._target_model, 'target_model')):
                for key, value in model.state_dict().items():
                    assert torch.equal(value, state[name][key])

    @BOTH_FLAGS
    def test_one_of_another_model_is_one_error(self, new):
        """As a notebook loads it, where nobody knows the path."""
        state = make_policy(new).learn_mode.state_dict()
        other = make_policy(new, embed_dim=16).learn_mode
        with pytest.raises(ConfigError, match='^the checkpoint is of another model: .* more; use the config that'):
            other.load_state_dict(state)
        with pytest.raises(ConfigError, match='^it is no checkpoint of a UniZero training; it lacks model, target'):
            other.load_state_dict({})

    @BOTH_FLAGS
    def test_they_hold_no_cache(self, new):
        """Collecting changes nothing about what a checkpoint holds."""
        policy = make_policy(new)

        def saved():
            file = io.BytesIO()
            torch.save(policy.learn_mode.state_dict(), file)
            return file.tell()

        before = saved()
        for _ in range(3):
            Worker(policy).step([0, 1, 2])
        assert saved() == before


class TestModes:
    """LightZero asks for a mode at each step."""

    @BOTH_FLAGS
    def test_each_module_gets_it(self, new):
        model = make_policy(new)._collect_model
        modules = list(model.modules())
        for mode in (False, True, True, False):
            assert model.train(mode) is model
            assert {module.training for module in modules} == {mode}
        for module in modules:  # which somebody has switched by hand
            module.training = True
            model.eval()
            assert not module.training

    @BOTH_FLAGS
    def test_who_does_more_is_asked(self, new):
        model, asked = make_policy(new)._collect_model.eval(), []

        class Frozen(torch.nn.Module):
            def train(self, mode=True):
                asked.append(mode)
                return super().train(False)

        encoder = getattr(model, '_orig_mod', model).tokenizer.encoder
        encoder.more = Frozen().eval()
        model.eval()
        assert asked
        del encoder.more, asked[:]
        list(encoder.children())[-1].train = asked.append
        model.eval()
        assert asked

    def test_new_mode_sets_nothing_twice(self):
        model = make_policy(True)._collect_model.eval()
        with mock.patch.object(torch.nn.Module, 'train', autospec=True) as train:
            getattr(model, '_orig_mod', model).eval()
        assert not train.called

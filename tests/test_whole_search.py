"""Policies whose search is one compiled call, against the same policies with LightZero's tree.

Statistical tests fail by chance once in a million runs or less.
"""
import contextlib
import copy
import dataclasses
import importlib.util
import io
import pickle
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from builders import Worker, audit, cache_of, calls_of, compiled, small_cartpole
from ding.utils import POLICY_REGISTRY
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from lzero.policy.utils import select_action
from small_models import ON_MAIN, ON_RELEASE_ALONE, Case, altered, randomise
from test_tree import alike

from lzero_kvcache import ConfigError, KVCacheManager
from lzero_kvcache.engine.kernel_check import KernelCheck
from lzero_kvcache.host.policies import UniZeroPolicy
from lzero_kvcache.host.tree_search import _KeylessSearch
from lzero_kvcache.search import compiled_model, compiled_search, tree
from lzero_kvcache.search.array_search import ArraySearch
from lzero_kvcache.search.roots import RootInference

pytestmark = pytest.mark.skipif(importlib.util.find_spec('numba') is None, reason='needs numba')

SIMULATIONS, ACTIONS, ALL = 6, 5, [0, 1, 2]
#: Values are means over a support from -50 to 50, and rounding in its logits weighs accordingly.
TOLERANCE = 2e-3
KINDS = pytest.mark.parametrize('kind', ['unizero', 'discrete', 'continuous'])
MODES = pytest.mark.parametrize('mode', ['collect', 'eval'])
POSITIONS = pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])


def make(kind='unizero', search='device', seed=0, new=True, policy_class=None, simulations=SIMULATIONS, rotary=True,
         changes=None, cache=None, **world_model_cfg):
    """A policy with random weights for three environments: UniZero with five actions, or Sampled UniZero, which draws
    three of them, or five continuous ones of two numbers. ``changes`` are made to ``policy``, and ``cache`` is the rest
    of ``kv_cache_cfg``."""
    actions = 2 if kind == 'continuous' else ACTIONS
    main = small_cartpole(
        new, simulations=simulations, rotary=rotary, evaluators=3, action_space_size=actions,
        kv_cache_cfg=dict(search=search, **(cache or {})), **world_model_cfg
    )
    main.policy.model.action_space_size = actions
    if kind != 'unizero':
        sampled = dict(continuous_action_space=kind == 'continuous', num_of_sampled_actions=5 if actions == 2 else 3)
        main.policy.model.update(sampled)
        main.policy.model.world_model_cfg.update(
            sampled, sigma_type='conditioned', fixed_sigma_value=0.5, bound_type=None, policy_loss_type='kl'
        )
    main.policy.update(changes or {})
    policy_type = 'unizero' if kind == 'unizero' else 'sampled_unizero'
    with contextlib.redirect_stdout(io.StringIO()):
        policy = (policy_class or POLICY_REGISTRY.get(policy_type))(
            compiled(main, policy_type).policy, enable_field=['learn', 'collect', 'eval']
        )
    for model in (policy._model, policy._target_model):
        randomise(model, Case(), seed)
    return policy


class Player(Worker):
    """Whatever a search finds, environments go on with actions that depend on nothing but environment and timestep.
    Where ``one_legal``, each has one legal action at its root, its own number."""
    goes_its_own_way = True

    def __init__(self, policy, mode='collect', one_legal=False, temperature=1.):
        super().__init__(policy, mode)
        self.whole, self.one_legal, self.temperature = policy, one_legal, temperature

    def mask(self, env_id):
        mask = np.zeros(ACTIONS, np.int8) if self.one_legal else np.ones(ACTIONS, np.int8)
        mask[env_id] = 1
        return mask

    def step(self, env_ids):
        with contextlib.redirect_stdout(io.StringIO()):
            return self.forward(env_ids)

    def forward(self, env_ids):
        output = super().forward(env_ids)
        steps, model = self.whole._environments._steps[self.mode], self.whole._cfg.model
        for env_id in env_ids if self.goes_its_own_way and not self.one_legal else []:
            rng = np.random.default_rng([env_id, self._timestep[env_id]])
            action = int(rng.integers(ACTIONS))
            if model.world_model_cfg.continuous_action_space:
                action = rng.uniform(-1, 1, 2).astype(np.float32)
            steps[env_id] = steps[env_id]._replace(action=action)
        return output

    def restart(self):
        """All environments begin their episodes anew."""
        self.policy.reset()
        self._timestep.clear()

    def play(self):
        """Fewer ready environments, in other orders; episodes end beside others that go on, until windows slide."""
        outputs = []
        for env_ids, done in ((ALL, None), (ALL, None), ([2, 0], 1), ([1, 0, 2], None), ([1], 0), (ALL, None), (ALL, 2),
                              (ALL, None)):
            outputs.append(self.step(env_ids))
            if done is not None:
                self.done(done)
        return outputs


def found(output):
    """What a search found, exactly."""
    return {env_id: (row['visit_count_distributions'], row['searched_value'], row['predicted_value'].tolist())
            for env_id, row in output.items()}


def assert_same_values(outputs, others, *names):
    for output, other in zip(outputs, others):
        assert list(output) == list(other)
        for env_id, row in output.items():
            for name in names:
                np.testing.assert_allclose(row[name], other[env_id][name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def world_model_of(policy):
    return policy._model.world_model


def memory_of(policy):
    return world_model_of(policy).inference._cpu_search._memories


def counts(policy):
    """Queries and hits of each pool, and what was skipped."""
    counters = cache_of(policy).counters()
    pools = {pool: (counters[pool]['queries'], counters[pool]['hits']) for pool in ('init', 'recur', 'total')}
    return dict(pools, skipped=counters['skipped'])


def ways():
    """The ways that searches go inside."""
    return calls_of(arrays=(ArraySearch, 'search'), ctree=(_KeylessSearch, '_search_in_ctree'))


# ---- which search --------------------------------------------------------------------------------------------------


def told(lines):
    """What the log says about searches, and how loud, for both that a policy has."""
    return [(level, message) for level, message in lines() if message.startswith('Searching')]


@pytest.mark.parametrize('search', ['auto', 'device'])
@pytest.mark.parametrize('kind', ['unizero', 'continuous'])
def test_searches_in_arrays(kind, search, lines):
    policy = make(kind, search)
    why = 'since the model can be compiled for the CPU'
    assert told(lines) == [('INFO', f'Searching in arrays, {why}: a search is one compiled call')]
    with ways() as taken:
        Player(policy).step(ALL)
        Player(policy, 'eval').step(ALL)
    assert taken == ['arrays'] * 2


@pytest.mark.parametrize('kind', ['unizero', 'continuous'])
@pytest.mark.parametrize('search', ['tree', 'device'])
def test_roots_are_stepped_as_they_are_searched(kind, search):
    policy, stepped = make(kind, search), []
    run_compiled = RootInference._run_compiled

    def noted(self, step, given):
        stepped.append(step.mode)
        return run_compiled(self, step, given)

    with mock.patch.object(RootInference, '_run_compiled', noted):
        Player(policy).play()
        Player(policy, 'eval').step(ALL)
    assert stepped == (['collect'] * 8 + ['eval'] if search == 'device' else [])


def test_searches_in_lightzeros_tree(lines):
    policy = make(search='tree')
    assert told(lines) == []
    with ways() as taken:
        Player(policy).step(ALL)
        Player(policy, 'eval').step(ALL)
    assert taken == ['ctree'] * 2


@pytest.mark.parametrize('search', ['auto', 'device'])
@pytest.mark.parametrize('options, reason', [
    pytest.param(dict(gru_gating=True), 'its layers are gated', marks=ON_RELEASE_ALONE),
    (dict(cache=dict(dtype='bfloat16')), 'pages are kept as torch.bfloat16'),
    ('no numba', 'numba is not installed (pip install numba)'),
    ('broken numba', 'numba cannot be imported: '),
], ids=['gates', 'bfloat16', 'no numba', 'broken numba'])
def test_what_cannot_be_compiled_is_searched_by_node(options, reason, search, lines, monkeypatch):
    if isinstance(options, str):
        find_spec, spec = importlib.util.find_spec, object() if options == 'broken numba' else None
        monkeypatch.setattr(
            importlib.util, 'find_spec', lambda name, *more: spec if name == 'numba' else find_spec(name, *more))
    if options == 'broken numba':
        monkeypatch.setitem(sys.modules, 'numba', None)
    policy = make(search=search, **options if isinstance(options, dict) else {})
    [(level, said)] = told(lines)
    ignored = search == 'device'
    assert level == ('WARNING' if ignored else 'INFO')
    beside = ", not as kv_cache_cfg.search='device' asks" if ignored else ''
    assert said.startswith(f"Searching in LightZero's tree, node by node{beside}: {reason}")
    with ways() as taken:
        output = Player(policy).step(ALL)
    assert taken == ['ctree'] and {sum(row['visit_count_distributions']) for row in output.values()} == {SIMULATIONS}


def on_a_gpu_whose_kernels(policy, run):
    """A policy whose model is said to be on a GPU, where a probe does what it is told."""
    world_model = world_model_of(policy)
    world_model.weights_source = altered(world_model.weights_source, device=lambda: torch.device('cuda', 0))
    world_model.inference.engine.kernels = KernelCheck(run)
    return world_model


needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')


@needs_triton
def test_on_a_gpu_whose_kernels_do_not_run_searches_are_in_lightzeros_tree(lines):
    tried = []

    def probe(device):
        tried.append(device)
        raise RuntimeError('Failed to find C compiler. Please specify via CC environment variable.\nand a long trace')

    policy = make(search='auto')
    world_model = on_a_gpu_whose_kernels(policy, probe)
    with ways() as taken:
        for _ in range(2):
            Player(policy).step(ALL)
    assert taken == ['ctree'] * 2 and tried == [torch.device('cuda', 0)]
    why = 'RuntimeError: Failed to find C compiler. Please specify via CC environment variable.'
    said = f"Searching in LightZero's tree, node by node: triton runs no kernel on cuda:0 ({why})"
    assert told(lines)[1:] == [('INFO', said)]
    assert not world_model.searches_in_arrays('Reanalyzing') and len(tried) == 1


@pytest.mark.parametrize('asked', ["search='device'", "matmul='tf32'"])
def test_what_a_gpu_is_asked_for_and_cannot_do_is_refused(asked, lines):
    def probe(device):
        raise OSError('ptxas is missing')

    name, value = asked.replace("'", '').split('=')
    world_model = on_a_gpu_whose_kernels(make(search='auto'), probe)
    world_model._options = dataclasses.replace(world_model._options, **{name: value})
    for _ in range(2):
        with pytest.raises(ConfigError) as refused:
            world_model.searches_in_arrays('Searching')
    [line] = str(refused.value).split('\n')
    assert line.startswith(f'policy.model.world_model_cfg.kv_cache_cfg.{asked} is not served here: triton')
    assert "search='auto'" in line and len(told(lines)) == 1


@needs_triton
def test_on_a_gpu_whose_kernels_run_searches_are_in_arrays(lines):
    world_model = on_a_gpu_whose_kernels(make(search='auto'), lambda device: None)
    assert world_model.eval().searches_in_arrays('Searching')
    why = 'since the model is on cuda:0, where triton runs'
    said = f'Searching in arrays, {why}: a search is a graph that is replayed for each simulation'
    assert told(lines)[1:] == [('INFO', said)]


def test_a_managers_own_look_ups_are_asked(registered, lines):
    asked = []

    @registered('asking')
    class Asking(KVCacheManager):
        def find_recur(self, mode, env_ids, keys):
            asked.append(list(env_ids))
            return super().find_recur(mode, env_ids, keys)

    policy = make(cache=dict(type='asking'))
    assert told(lines) == [('INFO', 'Searching by key: Asking has a find_recur of its own')] * 2
    with ways() as taken:
        Player(policy).step([2, 0])
    assert not taken and asked == [[2, 0]] * SIMULATIONS


@pytest.mark.parametrize('where', ['made by the policy', 'put there'])
def test_a_search_of_ones_own_is_asked(where, lines):
    searched = []

    class Own(UniZeroMCTSCtree):
        def search(self, *args):
            searched.append(type(args[0]).__module__)
            return super().search(*args)

    policy = make()
    own = Own(policy._cfg)
    # As a subclass of LightZero's policy makes it before the plugin sees it, or as one of the plugin's replaces it.
    policy._mcts_collect = policy._mcts_of(own, 'collect') if where == 'made by the policy' else own
    if where == 'made by the policy':
        assert lines()[-1][1].startswith('Searching by key: the policy has a search')
    with ways() as taken:
        output = Player(policy).step(ALL)
    assert not taken and len(searched) == 1 and 'lzero_kvcache' not in searched[0]
    assert {sum(row['visit_count_distributions']) for row in output.values()} == {SIMULATIONS}


def test_a_policy_of_ones_own_has_arrays_all_the_same():
    class Own(UniZeroPolicy):
        def _forward_collect(self, *args, **kwargs):
            output = super()._forward_collect(*args, **kwargs)
            return {env_id: dict(row, mine=True) for env_id, row in output.items()}

    with ways() as taken:
        output = Player(make(policy_class=Own)).step(ALL)
    assert taken == ['arrays'] and all(row['mine'] for row in output.values())


@pytest.mark.parametrize('kind', ['unizero', 'continuous'])
def test_a_model_in_training_is_searched_in_lightzeros_tree(kind):
    """Which has dropout as the model says, for as long as it is so; and roots give its results."""
    policy = make(kind)
    player, model = Player(policy, one_legal=True), policy._model
    player.step(ALL)
    with mock.patch.object(model, 'eval', model.train), ways() as taken:
        model.train()
        output = player.step(ALL)
        others = player.step(ALL)
    assert taken == ['ctree'] * 2
    for row in [*output.values(), *others.values()]:
        assert sum(row['visit_count_distributions']) == SIMULATIONS and type(row['searched_value']) is float
    with ways() as taken:
        player.step(ALL)
    assert taken == ['arrays']


def test_a_model_elsewhere_is_not_searched_in_arrays():
    """As after a move to a GPU: the device is asked for at every search."""
    policy = make()
    world_model = world_model_of(policy)
    elsewhere = altered(world_model.weights_source, device=lambda: torch.device('meta'))
    with mock.patch.object(world_model, 'weights_source', elsewhere), \
            ways() as taken:
        assert world_model.why_not_in_arrays() == 'the model is on meta'
        Player(policy).step(ALL)
    assert taken == ['ctree']


# ---- what is found -------------------------------------------------------------------------------------------------


@MODES
@KINDS
@POSITIONS
def test_roots_are_those_of_lightzeros_tree(kind, mode, rotary):
    """Whatever other environments do, and if each has but one thing to do, so is all that is found."""
    forced = kind == 'unizero'
    device, tree = (
        Player(make(kind, search, simulations=1 if forced else SIMULATIONS, rotary=rotary), mode, forced).play()
        for search in ('device', 'tree')
    )
    assert_same_values(device, tree, 'predicted_value', 'predicted_policy_logits')
    assert len({np.round(row['predicted_value'].item(), 3) for output in device for row in output.values()}) > 10
    for output, other in zip(device, tree):
        for env_id, row in output.items():
            assert row.keys() == other[env_id].keys()
            for name in row:
                assert type(row[name]) is type(other[env_id][name]), name
            assert np.shape(row['action']) == np.shape(other[env_id]['action'])
            assert sum(row['visit_count_distributions']) == (1 if forced else SIMULATIONS)
            if forced:
                assert row['visit_count_distributions'] == other[env_id]['visit_count_distributions'] == [1]
                assert row['action'] == other[env_id]['action'] == env_id
            elif kind == 'continuous':
                assert np.shape(row['root_sampled_actions']) == (5, 2)
            else:
                assert len(set(np.ravel(row['root_sampled_actions']))) == 3
    if forced:
        assert_same_values(device, tree, 'searched_value')


@pytest.mark.parametrize('mode', ['collect', 'eval'])
def test_only_what_is_legal_is_visited(mode):
    class Choosy(Player):
        def mask(self, env_id):
            return np.isin(np.arange(ACTIONS), [env_id, 4]).astype(np.int8)

    policy = make(simulations=20)
    player = Choosy(policy, mode)
    for output in player.play():
        for env_id, row in output.items():
            assert len(row['visit_count_distributions']) == 2 and sum(row['visit_count_distributions']) == 20
            assert row['action'] in (env_id, 4)


@pytest.mark.parametrize('weight', [0., 1.])
def test_noise_at_the_roots_counts_by_its_weight(weight):
    """Without values that tell actions apart, visits go by priors: the noise's, or the policy's."""
    changes = dict(root_noise_weight=weight, root_dirichlet_alpha=0.3, value_delta_max=1e9)
    player, drawn, follow = Player(make(simulations=30, changes=changes)), [], {'noise': [], 'policy': []}
    dirichlet = np.random.dirichlet

    def noting(alpha, rows):
        drawn.extend(dirichlet(alpha, rows))
        return drawn[-rows:]

    with mock.patch('numpy.random.dirichlet', noting):
        outputs = [player.step(ALL) for _ in range(8)]
    rows = [row for output in outputs for row in output.values()]
    assert len(drawn) == len(rows) == 24
    for noise, row in zip(drawn, rows):
        visits = np.array(row['visit_count_distributions']) / 30
        logits = np.array(row['predicted_policy_logits'])
        follow['noise'].append(abs(visits - noise).max())
        follow['policy'].append(abs(visits - np.exp(logits) / np.exp(logits).sum()).max())
    followed, ignored = ('noise', 'policy') if weight else ('policy', 'noise')
    assert max(follow[followed]) < 0.15 and np.mean(follow[ignored]) > 0.3


def test_actions_are_selected_by_lightzero():
    """From the visits, at the temperature that it is told, with numpy's numbers."""
    eps = dict(eps_greedy_exploration_in_collect=False)
    player = Player(make(simulations=20, changes=dict(eps=eps)), temperature=0.5)
    taken = []
    for seed in range(12):
        np.random.seed(seed)
        output = player.step(ALL)
        np.random.seed(seed)
        np.random.dirichlet([0.3] * ACTIONS, 3)
        for row in output.values():
            expected = select_action(row['visit_count_distributions'], temperature=0.5, deterministic=False)
            assert (row['action'], row['visit_count_distribution_entropy']) == pytest.approx(expected, rel=1e-12)
            taken.append(row['action'] == np.argmax(row['visit_count_distributions']))
    assert any(taken) and not all(taken)


@KINDS
def test_random_streams_are_consumed_as_with_lightzeros_tree(kind):
    changes = dict(root_noise_weight=0.25, eps=dict(eps_greedy_exploration_in_collect=kind == 'unizero'))
    states = []
    for search in ('device', 'tree'):
        player = Player(make(kind, search, changes=changes))
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        player.play()
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1:3], random.getstate()))
    assert states[0][0] == states[1][0] and states[0][2] == states[1][2]
    np.testing.assert_array_equal(states[0][1][0], states[1][1][0])
    assert states[0][1][1] == states[1][1][1]


def in_ctree(search, roots, to_play):
    """The same roots in LightZero's C++ tree."""
    model, sizes = search._cfg.model, ()
    if search.sampled:
        sizes = model.action_space_size, model.num_of_sampled_actions, model.continuous_action_space
    made = search.roots(roots.num, roots.legal_actions, *sizes)
    if roots.noises is None:
        made.prepare_no_noise(roots.rewards, roots.logits, to_play)
    else:
        made.prepare(roots.noise_weight, roots.noises, roots.rewards, roots.logits, to_play)
    return made


class BothWays:
    """Searches the roots of a policy's step many times over: in arrays, in LightZero's tree, and in arrays with
    another discount. ``found`` has one row for each search of each."""

    def __init__(self, policy, times):
        self.found, self._search, self._times = {'arrays': [], 'ctree': [], 'other': []}, policy._mcts_collect, times
        self._search.search, self._run = self.run, self._search.search
        self._rng = np.random.default_rng(0)

    def run(self, roots, model, latents, to_play, timestep):
        rules = self._search._rules()
        for _ in range(self._times):
            for way, rows in self.found.items():
                again = copy.copy(roots)
                if way == 'ctree':
                    again = in_ctree(self._search, roots, to_play)
                    inference, step = model.world_model.inference, self._search._running.innermost
                    self._search._search_in_ctree(again, inference, step, to_play)
                else:
                    changed = rules._replace(discount=np.float32(0.5)) if way == 'other' else rules
                    with mock.patch.object(self._search, '_rules', lambda rules=changed: rules):
                        self._run(again, model, latents, to_play, timestep)
                rows.append(self._numbers(again))
        return self._run(roots, model, latents, to_play, timestep)

    def _numbers(self, roots):
        visits, values = np.array(roots.get_distributions(), float), np.array(roots.get_values())
        values += self._rng.normal(scale=0.02, size=values.shape)  # or rounding would be told from rounding
        numbers = [visits.ravel(), visits.max(axis=1), values, abs(values)]
        if self._search.sampled:
            actions = np.array(roots.get_sampled_actions())
            numbers += [actions.ravel(), (visits[:, :, None] * actions).sum(axis=1).ravel()]
        return np.concatenate(numbers)


@pytest.mark.filterwarnings('ignore:Precision loss')  # of numbers that never vary
@KINDS
def test_means_over_many_searches_are_those_of_lightzeros_tree(kind):
    """In the middle of episodes; 1e-7 for each mean, Welch's test."""
    policy = make(kind, simulations=8, changes=dict(root_noise_weight=0.25))
    player = Player(policy)
    for _ in range(3):
        player.step(ALL)
    both = BothWays(policy, 250)
    player.step(ALL)
    arrays, ctree, other = (np.array(both.found[way]) for way in ('arrays', 'ctree', 'other'))
    assert (arrays.std(axis=0) > 0).any()
    assert alike(arrays, ctree)
    assert not alike(other, ctree)  # such a difference would be seen


# ---- counts, memory, what is no number -----------------------------------------------------------------------------


def test_the_time_of_a_search_is_without_what_is_compiled_for_it(monkeypatch):
    """Which is once for a machine, and takes as long as thousands of searches."""
    function, calls = compiled_search.search_rows, []

    def compiling(*args):
        calls.append(args)
        if len(calls) == 1:
            time.sleep(1)
        return function(*args)

    policy = make(rotary=False)
    Player(policy).step(ALL)  # whatever there really is to compile
    world_model = world_model_of(policy)
    before = dataclasses.replace(world_model.timings['search'])
    monkeypatch.setattr(compiled_search, 'search_rows', compiling)
    Player(policy).step(ALL)
    assert len(calls) > 1
    assert world_model.timings['search'].count == before.count + 1
    assert 0 < world_model.timings['search'].seconds - before.seconds < 1


def test_searches_are_compiled_for_whole_arrays_alone():
    """Contexts of part of a table, as after an episode's end, would be waited for as another kind of search."""
    policy = make()
    player = Player(policy, 'collect')
    player.play()
    cache_of(policy).clear_init_caches(env_id=1)
    player.step(ALL)
    roots = {str(signature[3]) for signature in compiled_search.search_rows.overloads}
    assert roots and not any('d, A)' in arrays for arrays in roots)


@KINDS
@MODES
def test_counts_and_times_are_those_of_lightzeros_tree(kind, mode):
    seen = []
    for search in ('device', 'tree'):
        policy = make(kind, search)
        player, timings = Player(policy, mode), world_model_of(policy).timings
        player.play()
        cache_of(policy).clear_init_caches(env_id=1)
        player.step(ALL)
        assert (timings['search'].count, timings['step'].count) == (9, 9 * SIMULATIONS)
        assert 0 < timings['step'].seconds <= timings['search'].seconds < 60
        seen.append((counts(policy), cache_of(policy).get_stats_summary()))
        seen[-1][1].pop('memory_mb')
    assert seen[0] == seen[1]
    rows = 3 + 3 + 2 + 3 + 1 + 3 + 3 + 3 + 3
    assert seen[0][0]['recur'] == (rows * SIMULATIONS, ) * 2 and seen[0][0]['init'] == (rows - 6, rows - 7)


def test_trees_count_as_memory():
    """Those of one size, however many sizes there were."""
    policy, trees, read = make(simulations=40), [], tree.root_visits
    memories, player = memory_of(policy), Player(policy)
    with mock.patch.object(tree, 'root_visits', lambda found: trees.append((found, memories.memory_mb)) or read(found)):
        player.step(ALL)
        of_three, [(first, meanwhile)] = memories.memory_mb, trees
        assert meanwhile == of_three
        assert 0 <= of_three - sum(array.nbytes for array in first) / 2 ** 20 < 0.01
        for env_ids in ([0, 1], [2], [0, 2], ALL):
            player.step(env_ids)
    assert memories.memory_mb == of_three
    with mock.patch.object(cache_of(policy).store, 'counted', []):
        without = cache_of(policy).memory_mb
    scratch = world_model_of(policy).inference._cpu_search._model.memory.memory_mb
    assert 0 < scratch < 0.5
    assert cache_of(policy).counters()['memory_mb'] == pytest.approx(without + scratch + of_three)


def spoil(policy, env_id):
    """Have the only action of an environment (see ``Player``) predict no number."""
    with torch.no_grad():
        world_model_of(policy).act_embedding_table.weight[env_id] = float('nan')


def test_what_is_no_number_names_environment_and_step():
    policy = make()
    player = Player(policy, one_legal=True)
    player.step([1, 2])
    player.done(2)
    spoil(policy, 2)
    message = 'A reward, value or policy at depth 1 with nan or inf in collect, environment 2, step 0'
    with mock.patch.object(policy._mcts_collect._cfg, 'num_simulations', 1), \
            pytest.raises(FloatingPointError, match=message):
        player.step([1, 2])
    audit(cache_of(policy))


def test_what_is_no_number_names_the_depth():
    policy = make()
    player = Player(policy, one_legal=True)
    spoil(policy, ACTIONS - 1)  # which is legal below the root alone
    with pytest.raises(FloatingPointError, match='at depth [2-9] with nan or inf in collect, environment 1, '):
        for _ in range(20):
            player.step([1])


def test_what_is_no_number_is_skipped_and_counted_as_with_lightzeros_tree():
    found_of = {}
    for search in ('device', 'tree'):
        policy = make(search=search, simulations=1, cache=dict(on_nan='skip'))
        player = Player(policy, one_legal=True)
        spoil(policy, 2)
        found_of[search] = [player.step(ALL)]
        assert counts(policy)['skipped'] == 1
        found_of[search].append(player.step(ALL))
        assert counts(policy)['skipped'] == 3  # its root as well
        audit(cache_of(policy))
    assert_same_values(*found_of.values(), 'predicted_value', 'searched_value')
    assert found_of['device'][0][2]['searched_value'] == 0
    policy = make(cache=dict(on_nan='skip'))
    with torch.no_grad():
        world_model_of(policy).head_rewards.head_module[-1].bias.fill_(float('nan'))
    for output in Player(policy).play():
        for row in output.values():
            assert np.isfinite(row['searched_value']) and sum(row['visit_count_distributions']) == SIMULATIONS
    assert counts(policy)['skipped'] == counts(policy)['recur'][0]


# ---- weights -------------------------------------------------------------------------------------------------------


def twin(policy, **options):
    """A fresh policy with the same weights, whose next search draws the same numbers."""
    other = make(**options)
    other._model.load_state_dict(policy._model.state_dict())
    world_model_of(other)._loaded = world_model_of(policy)._loaded
    other._mcts_collect._searches = policy._mcts_collect._searches
    return other


def add_noise(model):
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * noise)


def move(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def replace_a_layer(model):
    head = model.world_model.head_value.head_module
    head[-1] = torch.nn.Linear(head[-1].in_features, head[-1].out_features)


def load(model):
    model.load_state_dict(randomise(copy.deepcopy(model), Case(), 3).state_dict())


@POSITIONS
@pytest.mark.parametrize('change', [add_noise, move, replace_a_layer, load])
def test_weights_that_change_between_searches_are_seen_at_once(change, rotary):
    policy, unchanged = make(rotary=rotary), make(rotary=rotary)
    player, other = Player(policy), Player(unchanged)
    for _ in range(2):
        assert found(player.step(ALL)) == found(other.step(ALL))
    change(policy._model)
    player.restart()
    other.restart()
    expected = Player(twin(policy, rotary=rotary))
    for _ in range(3):
        after = found(player.step(ALL))
        assert after == found(expected.step(ALL)) != found(other.step(ALL))


def test_a_layer_that_cannot_be_compiled_is_noticed_when_it_comes_and_when_it_goes(lines):
    policy = make()
    player, head = Player(policy), world_model_of(policy).head_value.head_module
    own, sizes = head[-1], (head[-1].out_features, head[-1].out_features)
    with ways() as taken:
        player.step(ALL)
        head[-1] = torch.nn.Sequential(own, torch.nn.Linear(*sizes), torch.nn.Softplus())
        player.step(ALL)
        head[-1] = own
        player.step(ALL)
    assert taken == ['arrays', 'ctree', 'arrays']
    assert [message.split(',')[0] for _, message in told(lines)] == [
        'Searching in arrays', "Searching in LightZero's tree", 'Searching in arrays']


def test_searches_for_other_ends_draw_other_numbers():
    """Collection, evaluation and reanalysis, and a resumed training; one that is begun again draws the same."""

    def seeds_of(policy):
        seeds, run = [policy._target_model.world_model.seed_of('reanalysis')], ArraySearch.search
        with mock.patch.object(ArraySearch, 'search', lambda search, step, problem: (
                seeds.append(problem.seed), run(search, step, problem))[1]):
            for mode in ('collect', 'eval'):
                Player(policy, mode).step(ALL)
        return seeds

    resumed = make()
    state = randomise(copy.deepcopy(resumed._model), Case(), 3).state_dict()
    resumed._load_state_dict_learn(dict(resumed._state_dict_learn(), model=state, target_model=state))
    first, again, later = map(seeds_of, (make(), make(), resumed))
    assert first == again and len({*first, *later}) == 6


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=['deepcopy', 'pickle'])
def test_copies_of_a_model_have_arrays_and_weights_of_their_own(copied):
    policy, other = make(), make()
    player = Player(policy)
    player.step(ALL)
    model = copied(getattr(policy._model, '_orig_mod', policy._model))
    assert model.world_model.inference._cpu_search._memories.memory_mb == 0 < memory_of(policy).memory_mb
    assert model.world_model.inference._cpu_search._model._network is None  # or it would hold weights of the other
    other._model = other._collect_model = model
    add_noise(policy._model)  # which is not seen by the copy
    other._mcts_collect._searches = 0
    assert found(Player(other).step(ALL)) == found(Player(make()).step(ALL))
    arrays = [
        [array for memories in search._memories._free.values() for memory in memories for array in memory.tree]
        for search in (model.world_model.inference._cpu_search, world_model_of(policy).inference._cpu_search)
    ]
    assert not any(np.shares_memory(one, another) for one in arrays[0] for another in arrays[1])
    assert policy._target_model.world_model.inference._cpu_search._memories.memory_mb == 0


def test_checkpoints_have_the_same_keys():
    keys = []
    for search in ('device', 'tree'):
        policy = make(search=search)
        Player(policy).step(ALL)
        state = policy.learn_mode.state_dict()
        keys.append({name: list(part) for name, part in state.items() if isinstance(part, dict)})
    assert keys[0] == keys[1] and any('world_model' in name for name in keys[0]['model'])


# ---- pages ---------------------------------------------------------------------------------------------------------


def test_older_contexts_make_room_for_a_search():
    policy, unlimited = make(cache=dict(max_memory_mb=0.05, init_pool_size=9)), make()
    player, cache = Player(policy), cache_of(policy)
    for key in range(16):
        with cache.lease() as lease:
            cache.store_init('collect', [key % 3], [key], (lease.allocate(3)[None], np.array([3])))
    for output, expected in zip(player.play(), Player(unlimited).play()):
        assert found(output) == found(expected)
    assert sum(pool['evictions'] for pool in cache.get_stats_summary()['init_pools'].values()) > 0
    audit(cache)


class Broken(Exception):
    pass


def broken_at(function, calls):
    """The function, which raises at some of its calls, counted from 0."""
    count = iter(range(10 ** 6))

    def run(*args, **kwargs):
        if next(count) in calls:
            raise Broken
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize('name, owner, calls', [
    ('search_rows', lambda policy: compiled_search, [0]),
    ('search_rows', lambda policy: compiled_search, [0, 1, 2]),
    ('ready', lambda policy: cache_of(policy).store, [1]),
    ('take', cache_of, [1]),
    ('lease', cache_of, [1]),
    ('count_queries', cache_of, [1]),
    ('report', lambda policy: world_model_of(policy).inference.shared.guard, [0]),
], ids=['a thread', 'all threads', 'the slab', 'pages', 'a lease', 'a count', 'the look at predictions'])
def test_nothing_is_left_of_a_search_that_fails(name, owner, calls, monkeypatch):
    """The same step again finds what it would have found."""
    monkeypatch.setattr(compiled_model, 'WIDTH', 1)
    torch.set_num_threads(3)
    policy, unbroken = make(rotary=False), make(rotary=False)
    player, other = Player(policy), Player(unbroken)
    for _ in range(2):
        assert found(player.step(ALL)) == found(other.step(ALL))
    place = owner(policy)
    with mock.patch.object(place, name, broken_at(getattr(place, name), calls)), pytest.raises(Broken):
        player.step(ALL)
    audit(cache_of(policy))
    assert world_model_of(policy).timings['search'].count == 2
    policy._mcts_collect._searches = unbroken._mcts_collect._searches
    for _ in range(4):
        assert found(player.step(ALL)) == found(other.step(ALL))
        audit(cache_of(policy))
        assert cache_of(policy).pages_used == cache_of(unbroken).pages_used


@MODES
@KINDS
def test_a_search_gives_its_pages_back(kind, mode):
    policy = make(kind)
    player = Player(policy, mode)
    for step in range(1, 7):
        player.step(ALL)
        audit(cache_of(policy))
        assert cache_of(policy).pages_used == 3 * min(step, cache_of(policy).context_pages)


# ---- validation ----------------------------------------------------------------------------------------------------


def validated(kind='unizero', validation='exact', **options):
    cache = dict(validation=validation, validation_freq=1, validation_tol=1e-3, validation_action='raise')
    return make(kind, cache=cache, **options)


@KINDS
@POSITIONS
@pytest.mark.parametrize('validation', ['exact', 'legacy'])
def test_searches_are_replayed(kind, rotary, validation):
    policy = validated(kind, validation, rotary=rotary)
    player = Player(policy)
    player.goes_its_own_way = False  # replays go on with what was found
    player.play()
    tally = world_model_of(policy).validator.tally
    # The main branch's Sampled UniZero raises where a batch has more rows than the one before it.
    fails = ON_MAIN and kind != 'unizero' and validation == 'legacy'
    assert (tally.searches, tally.unexplained, tally.failures > 0) == (8, 0, fails)
    assert tally.inferences == (8 - tally.failures) * (1 + SIMULATIONS)
    assert fails or tally.rows == 21 * (1 + SIMULATIONS)
    assert validation == 'legacy' or tally.over == 0


def test_only_searches_that_are_replayed_are_noted(monkeypatch):
    policy = make(cache=dict(validation='exact', validation_freq=3))
    calls, search_rows = [], compiled_search.search_rows
    monkeypatch.setattr(compiled_search, 'search_rows', lambda *args: calls.append(args[-1]) or search_rows(*args))
    player = Player(policy)
    lengths = []
    for _ in range(4):
        player.step(ALL)
        lengths.append(sum(rows > 0 for rows in calls))  # else it is only compiled
        calls.clear()
    assert lengths == [1, 1, SIMULATIONS, 1]


@pytest.mark.parametrize('kind', ['unizero', 'continuous'])
def test_a_replay_sees_a_page_that_is_not_what_it_should_be(kind):
    """Of one environment, between its root and its search."""
    policy, run = validated(kind), ArraySearch.search
    player = Player(policy)
    player.step(ALL)

    def spoiled(search, step, problem):
        cache_of(policy).store.slab.data[step.roots[0][1, 0]] += 0.5
        return run(search, step, problem)

    with mock.patch.object(ArraySearch, 'search', spoiled), pytest.raises(RuntimeError, match='environment 1, step'):
        player.step(ALL)
    tally = world_model_of(policy).validator.tally
    assert 0 < tally.unexplained <= SIMULATIONS


def test_a_replay_sees_a_weight_that_is_not_the_models():
    """As if what moved had not been noticed."""
    policy = validated()
    player = Player(policy)
    player.step(ALL)
    search = world_model_of(policy).inference._cpu_search
    (network, _), _ = search._model._network
    bias = torch.ones(network.rewards[-1, 2])
    bias[:3] = -5
    network.rewards[-1, 4] = bias.data_ptr()
    with pytest.raises(RuntimeError, match='reward differs'):
        player.step(ALL)


# ---- beside each other ---------------------------------------------------------------------------------------------


def some_players():
    """Policies of all kinds, LightZero's own among them."""
    return [Player(make(kind, seed=seed)) for seed, kind in enumerate(['unizero', 'unizero', 'discrete', 'continuous'])]


def test_policies_that_take_turns_find_what_each_finds_alone():
    names = {name: vars(sys.modules[f'lzero.policy.{name}'])['MCTSCtree'] for name in ('unizero', 'sampled_unizero')}
    alone = [[found(output) for output in player.play()] for player in some_players()]
    old = Player(make(new=False))
    generators = [iter([lambda player=player: player.step(ALL)] * 4) for player in some_players()]
    steps = [[found(next(generator)()) for generator in generators] for _ in range(2)]
    for outputs, right in zip(zip(*steps), alone):
        assert list(outputs) == right[:2]
    assert {sum(row['visit_count_distributions']) for row in old.step(ALL).values()} == {SIMULATIONS}
    assert all(vars(sys.modules[f'lzero.policy.{name}'])['MCTSCtree'] is tree for name, tree in names.items())


def test_policies_in_two_threads_find_what_each_finds_alone():
    alone = [[found(output) for output in player.play()] for player in some_players()]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads, contextlib.redirect_stdout(io.StringIO()):
            together = list(threads.map(Player.play, some_players()))
    finally:
        sys.setswitchinterval(interval)
    assert [[found(output) for output in outputs] for outputs in together] == alone

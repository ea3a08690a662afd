"""
Contexts found by node: what a search gets this way is right for the node's true path, whatever its latent state is, and
agrees with the keyed way where latent states differ.
"""
import contextlib
import copy
import io
import types
from unittest import mock

import builders
import lzero.mcts.tree_search.mcts_ctree as mcts_ctree
import lzero.mcts.tree_search.mcts_ctree_sampled as mcts_ctree_sampled
import numpy as np
import pytest
import torch
from builders import Worker, audit, cache_of, compiled, make_policy, small_cartpole
from ding.policy import create_policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    TOLERANCE,
    Batch,
    ClearEnv,
    Difference,
    Expand,
    LightZeroAlone,
    Root,
    Trace,
    assert_same,
    differences,
    play,
    random_trace,
    relative_error,
    worst,
)
from path_reference import PathReference
from players import ByNode, error_of, for_search
from small_models import (
    BOTH_ACTIONS,
    BOTH_POSITIONS,
    Case,
    cached_model,
    original_model,
    random_cases,
    randomise,
    to_scalar,
)
from test_exactness import MANY

from lzero_kvcache.engine.step import StepOutput
from lzero_kvcache.host.tree_search import KeylessSearch, SampledKeylessSearch

SEED = 7
#: An error that no rounding explains.
WRONG = 1e-2

CASES = random_cases([4, 6, 8, 20])
TRACES = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2 ** 32 - 1),
        env_num=st.integers(1, 4),
        root_steps=st.integers(1, 5),
        simulations=st.integers(1, 10),
        episodes=st.sampled_from([0., 0.15, 0.4]),
        unknown=st.sampled_from([0., 0.3]),
        repeats=st.sampled_from([0., 0., 0.3]),
    )
)
BOTH_MODES = pytest.mark.parametrize('mode', ['collect', 'eval'])

# ---- traces ----------------------------------------------------------------------------------------------------------

def node_differences(trace, batch, alone):
    """All differences between a batch that is asked by node and each environment alone."""
    with contextlib.closing(batch):
        return differences(trace, batch, alone, for_search, error_of)


def batch_differences(trace, batch, keyed):
    """All differences between two players of the whole batch, the first one asked by node."""
    found, actual = [], play(batch, trace)
    batch.close()
    for number, (answer, other) in enumerate(zip(actual, play(keyed, trace))):
        for name, right in for_search(other).items() if answer else ():
            for row in range(len(right)):
                error = error_of(name, answer[name][row:row + 1], right[row:row + 1])
                found.append(Difference(error, number, 'row', row, name))
    return found


def alone(kind, case, trace, seed):
    prototype = original_model(case, 1, seed)
    return [kind(copy.deepcopy(prototype)) for _ in range(trace.env_num)]


def with_cleared_roots(trace):
    """Now and then an environment's context is gone when its next root step comes."""
    for number, event in reversed(list(enumerate(trace.events))):
        if isinstance(event, Root) and number and number % 3 == 0:
            trace.events.insert(number, ClearEnv(number % trace.env_num))
    return trace


def check_random(case, parts, player=PathReference):
    parts = dict(parts)
    seed = parts.pop('seed')
    trace = with_cleared_roots(random_trace(np.random.default_rng(seed), case, **parts))
    model = cached_model(case, trace.env_num, seed)
    assert_same(node_differences(trace, ByNode(model), alone(player, case, trace, seed)))
    audit(model.world_model.kv_cache_manager)


class TestTraces:

    @settings(max_examples=MANY // 2, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=CASES, parts=TRACES)
    def test_every_node_is_answered_for_its_true_path(self, case, parts):
        check_random(case, parts)

    @pytest.mark.parametrize('context_length', [4, 20])
    @BOTH_ACTIONS
    @BOTH_POSITIONS
    def test_as_lightzero_alone_and_as_the_keyed_way(self, rotary, continuous, context_length):
        """Where latent states differ from node to node."""
        case = Case(rotary=rotary, continuous=continuous, context_length=context_length)
        trace = random_trace(np.random.default_rng(SEED), case, 4, root_steps=6, simulations=9, episodes=0.2)
        assert_same(node_differences(
            trace, ByNode(cached_model(case, 4, SEED)), alone(LightZeroAlone, case, trace, SEED)
        ))
        assert_same(batch_differences(trace, ByNode(cached_model(case, 4, SEED)), Batch(cached_model(case, 4, SEED))))

    @BOTH_ACTIONS
    @BOTH_POSITIONS
    def test_a_fresh_model(self, rotary, continuous):
        """All of its predicted latent states are one vector: by node each has its own path, by key the newest one's."""
        case = Case(rotary=rotary, continuous=continuous, equal_latents=True)
        trace = random_trace(np.random.default_rng(SEED), case, 3, root_steps=3, simulations=9)
        assert_same(node_differences(
            trace, ByNode(cached_model(case, 3, SEED)), alone(PathReference, case, trace, SEED)
        ))
        keyed = batch_differences(trace, ByNode(cached_model(case, 3, SEED)), Batch(cached_model(case, 3, SEED)))
        assert worst(keyed).error > WRONG

    def test_equal_latents_do_show(self):
        """Or else the test above would show nothing: on that model the path matters."""
        case = Case(equal_latents=True)
        trace = random_trace(np.random.default_rng(SEED), case, 1, root_steps=1, simulations=4)
        trace.events[1:] = [Expand([parent], [0], [depth]) for parent, depth in ((0, 1), (1, 2), (2, 3))]
        answers = play(ByNode(cached_model(case, 1, SEED)), trace)
        assert relative_error(answers[3]['policy'], answers[1]['policy']) > WRONG


class TestMisuse:

    def test_a_search_without_a_root(self):
        world_model = cached_model(Case(), 2, SEED).world_model
        with pytest.raises(RuntimeError, match='root inference'), world_model.inference.search_by_node(None, 4):
            pass
        with world_model.open_step('collect', [0, 1]) as step, pytest.raises(RuntimeError, match='root inference'):
            with world_model.inference.search_by_node(step, 4):
                pass

    def test_roots_of_another_time_are_no_roots(self):
        case = Case()
        model = cached_model(case, 2, SEED)
        player = ByNode(model)
        player.play(random_trace(np.random.default_rng(SEED), case, 2, 1, 0).events[0])
        player.close()
        for step in (None, player.step):  # and a step that is over is no step
            with model.world_model.open_step('collect', [0, 1]) as current:
                with pytest.raises(RuntimeError, match='root inference'):
                    with model.world_model.inference.search_by_node(step or current, 4):
                        pass

    def test_one_environment_in_two_rows(self):
        world_model = cached_model(Case(), 2, SEED).world_model
        with pytest.raises(ValueError, match='two rows'), world_model.open_step('collect', [1, 1]):
            pass


# ---- whole searches --------------------------------------------------------------------------------------------------


def make(kind, rotary=True, new=True, simulations=12, **options):
    """A policy with random weights: 'unizero', or sampled with 'discrete' or 'continuous' actions."""
    if kind == 'unizero':
        return make_policy(new, simulations=simulations, rotary=rotary, evaluators=3, **options)
    continuous = kind == 'continuous'
    main = small_cartpole(new, simulations=simulations, rotary=rotary, evaluators=3, **options)
    main.policy.model.update(continuous_action_space=continuous, num_of_sampled_actions=5 if continuous else 2)
    main.policy.model.world_model_cfg.update(
        continuous_action_space=continuous, num_of_sampled_actions=5 if continuous else 2, sigma_type='conditioned',
        fixed_sigma_value=0.5, bound_type=None, policy_loss_type='kl'
    )
    with contextlib.redirect_stdout(io.StringIO()):
        policy = create_policy(
            compiled(main, 'sampled_unizero').policy, enable_field=['learn', 'collect', 'eval']
        )
    for model in (policy._model, policy._target_model):
        randomise(model, Case(), SEED)
        if not new and not rotary:
            model.world_model.precompute_pos_emb_diff_kv()
    return policy


KEYED = {
    'unizero': (mcts_ctree.UniZeroMCTSCtree, mcts_ctree, 'tree_muzero', KeylessSearch),
    'discrete': (
        mcts_ctree_sampled.SampledUniZeroMCTSCtree, mcts_ctree_sampled, 'tree_sampled_muzero', SampledKeylessSearch
    ),
}
KEYED['continuous'] = KEYED['discrete']
KINDS = pytest.mark.parametrize('kind', ['unizero', 'discrete', 'continuous'])


@pytest.fixture
def lightzeros_tree(monkeypatch):
    """The tree in C++, as users have it, in place of the one that breaks ties the same way every time."""
    monkeypatch.setattr(builders, 'seeded_search', lambda *searches: contextlib.nullcontext())


class RecordingTree:
    """LightZero's tree, which notes what it chose and what it was given back."""

    def __init__(self, tree):
        self.tree, self.chosen, self.given = tree, [], []

    def __getattr__(self, name):
        return getattr(self.tree, name)

    def batch_traverse(self, *args):
        chosen = self.tree.batch_traverse(*args)
        self.chosen.append((*chosen, list(args[5].get_search_len())))
        return chosen

    def batch_backpropagate(self, number, discount, rewards, values, policies, *args):
        self.given.append((rewards, values, policies))
        return self.tree.batch_backpropagate(number, discount, rewards, values, policies, *args)


class ReplayedTree(RecordingTree):
    """Chooses what another tree chose, and only notes what it is given."""

    def __init__(self, recorded):
        super().__init__(recorded.tree)
        self._script = iter(recorded.chosen)

    def ResultsWrapper(self, num):
        return types.SimpleNamespace(get_search_len=lambda: self._lengths)

    def batch_traverse(self, *args):
        *chosen, self._lengths = next(self._script)
        return chosen

    def batch_backpropagate(self, number, discount, rewards, values, policies, *args):
        self.given.append((rewards, values, policies))


class Shadowed:
    """A search by node, after which LightZero's own keyed search is taken the same ways and its numbers compared."""

    def __init__(self, kind, search):
        self.kind, self.search_by_node, self.searches = kind, search, 0
        self.differ = 0.

    def search(self, roots, model, latent_state_roots, to_play, timestep):
        keyed, module, name, _ = KEYED[self.kind]
        recorded = RecordingTree(getattr(module, name))
        with mock.patch.object(type(self.search_by_node), 'tree', recorded):
            found = self.search_by_node.search(roots, model, latent_state_roots, to_play, timestep)
        replayed = ReplayedTree(recorded)
        with mock.patch.object(module, name, replayed):
            keyed(self.search_by_node._cfg).search(
                types.SimpleNamespace(num=roots.num), model, latent_state_roots, to_play, timestep
            )
        assert len(recorded.given) == len(replayed.given) == self.search_by_node._cfg.num_simulations
        for ours, theirs in zip(recorded.given, replayed.given):
            for actual, expected in zip(ours, theirs):
                assert all(type(number) is float for number in np.asarray(actual, dtype=object).ravel())
                scale = max(1., np.abs(expected).max())
                self.differ = max(self.differ, np.abs(np.asarray(actual) - np.asarray(expected)).max() / scale)
        self.searches += 1
        return found


class TestSearches:

    @pytest.mark.usefixtures('lightzeros_tree')
    @BOTH_MODES
    @KINDS
    @BOTH_POSITIONS
    def test_the_tree_is_given_what_the_keyed_way_gives(self, kind, mode, rotary):
        """Along the ways of one and the same tree, since LightZero's draws by the time of day."""
        policy = make(kind, rotary)
        shadowed = Shadowed(kind, getattr(policy, '_mcts_' + mode))
        setattr(policy, '_mcts_' + mode, shadowed)
        worker = Worker(policy, mode)
        for env_ids in ([0, 1, 2], [0, 1, 2], [2, 0], [0, 1, 2], [1]):
            worker.step(env_ids)
        worker.done(1)
        worker.step([0, 1, 2])
        assert shadowed.searches == 6
        assert shadowed.differ < 2e-4
        audit(cache_of(policy))

    @pytest.mark.usefixtures('lightzeros_tree')
    @BOTH_MODES
    def test_board_games_are_given_copies_of_the_players(self, mode):
        """LightZero's tree changes the players that it is given, and would change the caller's."""
        policy = make('unizero')
        getattr(policy, '_mcts_' + mode)._cfg.env_type = 'board_games'
        given = []

        class Tree(RecordingTree):

            def batch_traverse(self, *args):
                given.append(args[6])
                return super().batch_traverse(*args)

        with mock.patch.object(KeylessSearch, 'tree', Tree(KeylessSearch.tree)):
            Worker(policy, mode).step([0, 1, 2])
        assert len({id(players) for players in given}) > 1
        assert all(players == [-1, -1, -1] for players in given)

    def test_other_scalars_than_categorical_ones_are_searched_by_key(self, caplog):
        """The device knows how to make scalars of categorical logits only."""
        main = small_cartpole(True)
        main.policy.model.categorical_distribution = False
        with contextlib.redirect_stdout(io.StringIO()):
            policy = create_policy(compiled(main).policy, enable_field=['learn', 'collect', 'eval'])
        assert type(policy._mcts_collect) is type(policy._mcts_eval) is mcts_ctree.UniZeroMCTSCtree
        assert 'Searching by key: policy.model.categorical_distribution=False' in caplog.text


class TestScalars:

    @pytest.mark.parametrize('support', [5, 50, 300])
    def test_as_lightzeros_transform(self, support):
        generator = torch.Generator().manual_seed(SEED)
        world_model = cached_model(Case(), 1, SEED).world_model
        engine, weights = world_model.inference.engine, world_model.weights_source.read(False)
        for spread in (0., 0.1, 1., 10., 100.):
            rewards, values = torch.randn(2, 64, 1, 2 * support + 1, generator=generator) * spread
            policy = torch.randn(64, 1, 3, generator=generator)
            packed = engine.for_search(weights, StepOutput(policy, policy, rewards, policy, values))
            transform = to_scalar(support)
            expected = torch.cat([transform(rewards[:, 0]), transform(values[:, 0]), policy[:, 0]], dim=1)
            torch.testing.assert_close(packed, expected, rtol=1e-4, atol=2e-4)


# ---- counts, times, pages --------------------------------------------------------------------------------------------


@BOTH_MODES
@KINDS
def test_searches_and_steps_of_the_old_system_are_timed(kind, mode):
    """Those of the new one, and its counts, are compared by ``test_whole_search.py`` for both kinds of trees."""
    policy = make(kind, new=False, simulations=4)
    timings = policy._model.world_model.timings
    worker = Worker(policy, mode)
    for done in range(4):
        assert (timings['search'].count, timings['step'].count) == (done, 4 * done)
        worker.step([0, 1, 2])
    assert 0. < timings['step'].seconds < timings['search'].seconds < 60.


class TestPages:

    @BOTH_MODES
    @KINDS
    def test_a_search_gives_its_pages_back(self, kind, mode):
        """What is left is the window of each environment's newest root."""
        policy = make(kind)
        worker = Worker(policy, mode)
        for step in range(1, 7):
            worker.step([0, 1, 2])
            audit(cache_of(policy))
            assert cache_of(policy)._pages.used == 3 * min(step, cache_of(policy).context_pages)
        assert len(cache_of(policy).recur_pool) == 0

    def test_roots_that_are_cleared_in_the_middle(self):
        """A running search holds its roots' pages, and nobody else is given them."""
        case = Case()
        trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=3, simulations=6)
        roots = [number for number, event in enumerate(trace.events) if isinstance(event, Root)]
        uncleared = Trace(2, list(trace.events))
        trace.events.insert(roots[1] + 3, ClearEnv(0))
        model = cached_model(case, 2, SEED)
        player = ByNode(model)
        clear = trace.events[:roots[2] + 1]
        answers = []
        for event in clear:
            answers.append(player.play(event))
            if isinstance(event, ClearEnv):  # somebody else's pages, for as long as this search takes
                taken = model.world_model.kv_cache_manager.take(5)
                model.world_model.kv_cache_manager.store.slab.data[taken] = float('nan')
        model.world_model.kv_cache_manager._pages.release(taken)
        player.close()
        audit(model.world_model.kv_cache_manager)
        expected = play(ByNode(cached_model(case, 2, SEED)), uncleared)
        answers = [answer for answer in answers if answer is not None]
        for number, (answer, right) in enumerate(list(zip(answers, expected))[:roots[2]]):
            for name in right:
                assert error_of(name, answer[name], right[name]) <= TOLERANCE, (number, name)

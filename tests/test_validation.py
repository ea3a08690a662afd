"""Validation while training: what the shadows find, what they do not touch, and that a wrong answer is caught."""
import contextlib
import copy
import random
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from builders import Worker, make_policy
from ding.worker.learner.learner_hook import build_learner_hook_by_cfg
from easydict import EasyDict
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from lzero.worker import MuZeroEvaluator
from oracle import ClearEnv, Expand, play, random_trace
from players import ByNode, Placed
from scripted import COLLECTORS, Life, quiet
from seeded_search import seeded_search
from small_models import BOTH_POSITIONS, ON_MAIN, ON_RELEASE_ALONE, Case, cached_model, randomise
from test_search_by_node import make
from torch.utils.tensorboard import SummaryWriter
from trainings import events_in

from lzero_kvcache import ConfigError
from lzero_kvcache.config import CacheConfig
from lzero_kvcache.engine.backends import EAGER, Backend
from lzero_kvcache.host.kept_rows import KeptRows
from lzero_kvcache.host.legacy_reference import CAUSES
from lzero_kvcache.host.lightzero import lightzero
from lzero_kvcache.host.shadow import Shadow
from lzero_kvcache.telemetry import HOOK_CONFIG, HOOK_KEY, VALIDATION
from lzero_kvcache.validation import ValidationError, Validator
from lzero_kvcache.validation.tally import QUANTITIES, Tally

SEED = 11
ALL = [0, 1, 2]
#: What rounding may come to.
TOLERANCE = 1e-4
BOTH_KINDS = pytest.mark.parametrize('validated', ['legacy', 'exact'])


def options(validation='exact', freq=1, action='warn', **more):
    return dict(validation=validation, validation_freq=freq, validation_tol=TOLERANCE, validation_action=action, **more)


def legacy(simulations=2, alone=False, **kwargs):
    """A policy that stops at what no cause explains; if asked for, with one environment. As for images, the main branch
    keeps the last observations as they are."""
    kwargs.update(dict(collectors=1, evaluators=1) if alone else {})
    policy = make_policy(True, simulations=simulations, kv_cache_cfg=options('legacy', action='raise'), **kwargs)
    policy.pad_token_id = -1
    return policy


def validator_of(policy):
    return policy._model.world_model.validator


def tally_of(policy):
    return validator_of(policy).tally


def found(policy):
    """Causes that were counted, rows over the tolerance, and those without a cause."""
    tally = tally_of(policy)
    return {cause for cause, count in tally.causes.items() if count}, tally.over, tally.unexplained


def stepped(policy, *batches, mode='collect'):
    """A worker that has made a step of each of these batches of environments."""
    worker = Worker(policy, mode)
    for env_ids in batches:
        worker.step(env_ids)
    return worker


def live_through(policy):
    """Episodes that end at different times, fewer ready environments, another order, an evaluation, new weights."""
    worker, evaluator = Worker(policy), Worker(policy, 'eval')
    for step in range(9):
        if step in (2, 5):
            worker.done(2)
        worker.step([2, 1, 0] if step == 3 else [1, 2] if step == 4 else ALL)
        if step == 6:
            for _ in range(2):
                evaluator.step([0, 1])
            randomise(policy._model, Case(), SEED)
            policy._model.world_model.weights_changed('a test')


def test_a_reset_that_is_followed_prints_nothing_and_leaves_standard_output_to_other_threads(capsys):
    used = []

    class Policy:
        _cfg = None

        def _reset_collect(self, env_id):
            print('clear_interval: 200')
            used.append((env_id, sys.stdout))

    KeptRows().reset(Policy()._reset_collect, None, 3)
    assert used == [(3, sys.stdout)]
    assert capsys.readouterr().out == ''


class Checked(ByNode):
    """Puts a trace to a model whose searches are validated."""
    _acted = ()

    def root(self, event):
        """A root inference, before which the environments acted."""
        self._acted = event.actions
        return super().root(event)

    def close(self):
        """End the search that is under way."""
        if self.step is not None:
            self.world_model.validator.check(self.step.trace, self._root_actions(self._acted))
            self.step = None
        super().close()


def checked(case, trace, prepare=lambda world_model: None, **changed):
    """The tally of a trace."""
    player = Checked(cached_model(case, trace.env_num, SEED, kv_cache_cfg=options(**changed)))
    prepare(player.world_model)
    play(player, trace)
    player.close()
    return player.world_model.validator.tally


def below_one_root(case, *rows):
    """A search whose simulations expand, in each row, children of the given nodes."""
    trace = random_trace(np.random.default_rng(SEED), case, len(rows), root_steps=1, simulations=0)
    depths = [[0] for _ in rows]
    for number, parents in enumerate(zip(*rows)):
        for of_row, parent in zip(depths, parents):
            of_row.append(of_row[parent] + 1)
        trace.events.append(Expand(parents, [number % case.action_space_size] * len(rows), [d[-1] for d in depths]))
    return trace


class TestOptions:

    @BOTH_KINDS
    def test_the_flag_alone_switches_back(self, validated):
        cfg = dict(kv_cache_cfg=dict(validation=validated, validation_freq=3))
        assert CacheConfig.read(dict(cfg, use_new_cache_manager=True, context_length=8)).validation == validated
        for old in (cfg, dict(cfg, use_new_cache_manager=False)):
            assert CacheConfig.read(old).validation == 'off'
        with pytest.raises(ConfigError, match='validation_freq'):
            CacheConfig.read(dict(cfg, kv_cache_cfg=dict(validation_freq=0), use_new_cache_manager=True))

    def test_off_constructs_nothing(self, monkeypatch):
        for owner in (Validator, Shadow):
            monkeypatch.setattr(owner, '__init__', mock.Mock(side_effect=AssertionError('constructed')))
        policy = make_policy(True, kv_cache_cfg=dict(validation='off'))
        stepped(policy, ALL)
        assert validator_of(policy) is None
        with pytest.raises(AssertionError, match='constructed'):
            make_policy(True, kv_cache_cfg=options())


class TestExact:

    @pytest.mark.parametrize('kind', ['unizero', 'discrete', 'continuous'])
    @BOTH_POSITIONS
    def test_policies(self, kind, rotary):
        policy = make(kind, rotary=rotary, simulations=6, kv_cache_cfg=options(action='raise'))
        live_through(policy)
        tally = tally_of(policy)
        assert (tally.over, tally.lost, tally.searches, tally.inferences) == (0, 0, 11, 11 * 7)
        assert tally.rows == 7 * (8 * 3 + 1 * 2 + 2 * 2)
        assert set(QUANTITIES) <= {tag.replace('_max', '') for tag, value in tally.read().items() if value > 0}

    @pytest.mark.parametrize('case', [
        Case(), pytest.param(Case(rotary=True, gru_gating=True), marks=ON_RELEASE_ALONE),
        Case(continuous=True, context_length=4),
        Case(rotary=True, max_seq_len=32), Case(equal_latents=True), Case(equal_latents=True, rotary=True),
        pytest.param(Case(obs_type='text'), marks=ON_RELEASE_ALONE),
        Case(obs_type='image', rotary=True, context_length=20),
    ], ids=lambda case: f'{case.obs_type}-{case.rotary}-{case.continuous}-{case.context_length}-{case.equal_latents}')
    def test_random_traces(self, case):
        trace = random_trace(
            np.random.default_rng(SEED), case, 3, root_steps=6, simulations=8, episodes=0.2, unknown=0.3, repeats=0.3
        )
        trace.events.insert(20, ClearEnv(1))
        tally = checked(case, trace)
        assert (tally.over, tally.searches, tally.inferences, tally.rows) == (0, 6, 6 * 9, 6 * 9 * 3)
        assert tally.lost == 1

    @pytest.mark.parametrize('equal_latents', [False, True])
    def test_a_search_by_key(self, equal_latents):
        policy = make_policy(True, simulations=6, kv_cache_cfg=options(action='raise'))
        randomise(policy._model, Case(equal_latents=equal_latents), SEED)
        policy._mcts_collect = UniZeroMCTSCtree(policy._cfg)
        stepped(policy, ALL, ALL, ALL)
        assert (tally_of(policy).inferences, tally_of(policy).over) == (3 * 7, 0)

    def test_a_latent_that_no_node_has(self):
        """A search that does not go by its own tree is not replayed, but its root is followed."""
        world_model = cached_model(Case(), 2, SEED, kv_cache_cfg=options()).world_model
        trace = random_trace(np.random.default_rng(SEED), Case(), 2, root_steps=1, simulations=0)
        last_obs, obs = (torch.from_numpy(part) for part in (trace.events[0].last_obs, trace.events[0].obs))
        actions = torch.zeros(2).long()
        with world_model.open_step('collect', [0, 1]) as step:
            _, root, *_ = world_model.forward_initial_inference(
                dict(obs=last_obs, action=[-1, -1], current_obs=obs), [0, 0]
            )
            for latent in (root.numpy(), np.ones((2, 1, 32), np.float32)):
                world_model.forward_recurrent_inference([(latent, actions)], 0, [1, 1], [0, 0])
            world_model.validator.check(step.trace, [0, 0])
        assert (world_model.validator.tally.inferences, world_model.validator.tally.searches) == (2, 0)

    def test_every_nth_search(self):
        policy = make_policy(True, simulations=4, kv_cache_cfg=options(freq=3))
        stepped(policy, *[ALL] * 7)
        assert (tally_of(policy).searches, tally_of(policy).inferences) == (2, 7 + 2 * 4)

    def test_skipped_rows_are_not_compared(self):
        """Rows that are nan on both sides are no difference, and an environment that was one starts afresh on both."""
        policy = make_policy(True, kv_cache_cfg=options(on_nan='skip'))
        worker = stepped(policy, ALL)
        observe = worker._observe
        worker._observe = lambda env_id: observe(env_id) * (np.nan if env_id == 1 else 1.).__float__()
        worker.step(ALL)
        worker._observe = observe
        for _ in range(3):
            worker.step(ALL)
        assert found(policy) == (set(), 0, 0)


class TestCaught:
    """A wrong answer of the new system is seen, or else all of the above would show nothing."""

    @staticmethod
    def spoil_a_page(policy):
        manager = policy._model.world_model.kv_cache_manager
        page = manager._current['collect'].tables[1, 0]
        manager.store.slab.data[page] += 0.5

    @staticmethod
    def swap_contexts(policy):
        manager = policy._model.world_model.kv_cache_manager
        find = manager.find_init
        manager.find_init = lambda *args: tuple(part[::-1].copy() for part in find(*args))

    @staticmethod
    def shift_angles(policy):
        inference = policy._model.world_model.inference
        step, end = inference.backend.step, -inference.engine.geometry.action_rows

        def shifted(weights, slab, numbers, *rest):
            numbers[end - 2:end] += 2
            return step(weights, slab, numbers, *rest)

        inference.backend.step = shifted

    @pytest.mark.parametrize('spoil', ['spoil_a_page', 'swap_contexts', 'shift_angles'])
    def test_it_is_counted_and_told(self, spoil, lines):
        policy = make_policy(True, kv_cache_cfg=options())
        worker = stepped(policy, ALL)
        assert found(policy) == (set(), 0, 0)
        getattr(self, spoil)(policy)
        worker.step(ALL)
        _, over, unexplained = found(policy)
        assert over == unexplained > 0
        warning, = [line for level, line in lines() if level == 'WARNING']
        assert warning.startswith(f"Validation 'exact', search 2: {over} of 15 rows over 0.0001 (unexplained {over})")

    def test_the_error_says_where_and_how_much(self):
        """The other environments are not blamed."""
        policy = make_policy(True, simulations=4, kv_cache_cfg=options(action='raise'))
        worker = stepped(policy, ALL)
        self.spoil_a_page(policy)
        worker.step([0, 2])
        with pytest.raises(ValidationError, match=(
            r"validation='exact': in collect, environment 1, step 1, (the root|simulation \d+): "
            r'(value|policy|reward|latent) differs by [\d.e+-]+, more than kv_cache_cfg.validation_tol=0.0001'
        )):
            worker.step(ALL)

    def test_legacy_sees_what_no_cause_explains(self):
        policy = legacy(alone=True)
        worker = stepped(policy, [0], [0])
        self.shift_angles(policy)
        with pytest.raises(ValidationError, match="validation='legacy'.*environment 0, step 2"):
            worker.step([0])


class TestCauses:
    """What LightZero's own code gets wrong, each by a case of its own; ``raise`` would tell of anything unexplained."""

    @pytest.mark.parametrize(('rotary', 'precomputed'), [(True, False), (False, True), (False, False)])
    def test_positions(self, rotary, precomputed):
        """One environment, deep enough to slide: with the right tables LightZero alone is right. Before the first
        training phase has ended, they are differences of other weights."""
        policy = legacy(12, alone=True, rotary=rotary)
        if precomputed:
            policy._model.world_model.precompute_pos_emb_diff_kv()
        stepped(policy, *[[0]] * 6)
        causes, over, _ = found(policy)
        assert tally_of(policy).rows == 6 * 13
        if rotary or precomputed:
            assert (causes, over) == (set(), 0)
        else:
            assert causes == {'positions'}
            assert over > 10

    @BOTH_POSITIONS
    def test_padding(self, rotary):
        case = Case(rotary=rotary)
        tally = checked(
            case, below_one_root(case, ALL, [0, 0, 0], [0, 1, 1]), lambda one: one.precompute_pos_emb_diff_kv(),
            validation='legacy', action='raise'
        )
        assert tally.over == 3 * (not ON_MAIN)  # the shorter rows: one of three, then two
        assert sum(tally.causes.values()) == tally.causes['padding'] == tally.over

    def test_rows(self):
        """Somebody's end puts everybody back; on the main branch that environment alone."""
        policy = legacy()
        worker = stepped(policy, ALL)
        worker.done(1)
        worker.step(ALL)
        tally = tally_of(policy)
        assert tally.causes['rows'] == tally.over == 2 * 3 * (not ON_MAIN)  # root and nodes of the other two

    def test_an_evaluation_between(self):
        """The two share everything in LightZero; on the main branch roots, which an end of the other clears."""
        policy = legacy()
        worker = stepped(policy, [0, 1])
        evaluator = stepped(policy, [0, 1], mode='eval')
        assert tally_of(policy).causes['rows'] == tally_of(policy).over == 0
        worker.step([0, 1])
        assert ON_MAIN or tally_of(policy).causes['rows'] >= 2
        evaluator.done(1)
        worker.step([0, 1])
        assert tally_of(policy).causes['rows'] == tally_of(policy).over > 1

    def test_equal_latents(self):
        policy = legacy(12, alone=True)
        randomise(policy._model, Case(equal_latents=True), SEED)
        stepped(policy, [0])
        causes, over, _ = found(policy)
        assert causes == {'equal_latents'}
        assert over > 3

    def test_stale_slots(self):
        """A search of more simulations than LightZero's pool has slots for, whose keys the main branch forgets."""
        def prepare(world_model):
            setattr(world_model.validator.reference._shadow, lightzero.RECURRENT_SLOTS, 3)

        case = Case(rotary=True)
        tally = checked(case, below_one_root(case, [0, 1, 2, 3, 1]), prepare, validation='legacy', action='raise')
        assert tally.causes['miss' if ON_MAIN else 'stale_slot'] == tally.over == 1
        assert sum(tally.causes.values()) == 1

    def test_misses(self, lines):
        """Where a node is not stored, the simulation that expands it raises, and the training goes on; the main branch
        makes the context anew."""
        def prepare(world_model):
            one = world_model.validator.reference._shadow
            update = one.update_cache_context
            one.update_cache_context = lambda *args, is_init_infer, **kw: (
                is_init_infer and update(*args, is_init_infer=is_init_infer, **kw))

        case = Case()
        tally = checked(case, below_one_root(case, [0, 0, 1], [0, 0, 0]), prepare, validation='legacy', action='raise')
        if ON_MAIN:
            assert (tally.causes['miss'], tally.failures, tally.inferences, tally.over) == (1, 0, 4, 1)
            return
        assert (tally.causes['miss'], tally.failures, tally.inferences, tally.over) == (1, 1, 3, 0)
        warning, = [line for level, line in lines() if level == 'WARNING']
        assert 'TypeError' in warning
        assert 'a context that it does not find' in warning

    @BOTH_POSITIONS
    @pytest.mark.parametrize('fresh', [False, True], ids=['random', 'fresh'])
    def test_everything(self, fresh, rotary):
        """Nothing of a whole life is left unexplained, with the weights of LightZero's constructor either."""
        with mock.patch('builders.randomise') if fresh else contextlib.nullcontext():
            policy = legacy(8, rotary=rotary)
        live_through(policy)
        assert (found(policy)[1] > 20) is not (ON_MAIN and rotary)  # where nothing was found to be wrong

    @pytest.mark.skipif(not ON_MAIN, reason="of LightZero's main branch")
    @BOTH_POSITIONS
    def test_last_observations(self, rotary):
        """Of vectors they are kept as whole numbers, so that no root is found."""
        policy = legacy(8, rotary=rotary)
        policy.pad_token_id = 0
        live_through(policy)
        assert tally_of(policy).causes['last_obs'] == found(policy)[1] > 20

    @pytest.mark.skipif(not ON_MAIN, reason="of LightZero's main branch")
    def test_last_observations_before_any_reset(self):
        """They are those that the policy begins with, whole numbers too."""
        policy = legacy(8)
        policy.pad_token_id = 0
        stepped(policy, ALL, ALL, ALL)
        assert tally_of(policy).causes['last_obs'] > 0

    @pytest.mark.parametrize('kind', ['discrete', 'continuous'])
    @BOTH_POSITIONS
    def test_sampled(self, kind, rotary):
        """Sampled UniZero keeps rows of a batch."""
        policy = make(kind, rotary=rotary, simulations=6, kv_cache_cfg=options('legacy', action='raise'))
        live_through(policy)
        assert found(policy)[1] > 20 and found(policy)[0] >= {'rows'}


class TestModel:

    @BOTH_KINDS
    def test_checkpoints_and_parameters(self, validated):
        with_one = make_policy(True, rotary=False, kv_cache_cfg=options(validated))
        stepped(with_one, ALL)
        without = make_policy(True, rotary=False)
        without._model.load_state_dict(with_one._model.state_dict())
        for each in ('parameters', 'modules'):
            assert len(list(getattr(with_one._model, each)())) == len(list(getattr(without._model, each)()))
        assert all(parameter.grad is None for parameter in with_one._model.parameters())
        reference = validator_of(with_one).reference
        ours = {id(parameter) for parameter in with_one._model.world_model.parameters()}
        for shadow in [reference._shadow] if validated == 'legacy' else reference._alone.values():
            assert {id(parameter) for parameter in shadow.parameters()} == ours

    @BOTH_KINDS
    def test_copies_do_not_validate(self, validated):
        policy = make_policy(True, kv_cache_cfg=options(validated))
        worker = stepped(policy, ALL)
        twin = copy.deepcopy(policy._model)
        assert twin.world_model.validator is None
        assert policy._target_model.world_model.validator is None
        twin.world_model.forget()
        twin.to('cpu')
        worker.step(ALL)
        assert tally_of(policy).searches == 2

    def test_a_model_in_training_mode_is_not_compared(self):
        """Dropout is live in it, and a shadow must draw nothing."""
        player = Checked(cached_model(Case(), 2, SEED, kv_cache_cfg=options()))
        player.world_model.train()
        play(player, random_trace(np.random.default_rng(SEED), Case(), 2, root_steps=2, simulations=2))
        assert player.world_model.validator.tally.rows == 0

    @BOTH_KINDS
    def test_a_search_that_fails_is_no_step(self, validated):
        policy = make_policy(True, kv_cache_cfg=options(validated))
        worker = Worker(policy)
        for step in range(4):
            if step == 2:
                with mock.patch.object(policy._mcts_collect, 'search', side_effect=KeyError), pytest.raises(KeyError):
                    worker.step(ALL)
            worker.step(ALL)
        assert found(policy)[2] == 0
        assert tally_of(policy).searches == 4


class TestTraces:
    """A search owns what it notes, so that others may be in the middle of theirs."""

    @staticmethod
    def policy(validated, seed=0):
        cfg = options(validated, action='raise')
        return make_policy(True, seed=seed, simulations=4, evaluators=3, kv_cache_cfg=cfg)

    @staticmethod
    def step_with_another_inside(outer, inner):
        """Three collections, each with an evaluation between its root and its nodes."""
        evaluator, search = Worker(inner, 'eval'), outer._mcts_collect.search

        def with_one_inside(*args):
            evaluator.step(ALL)
            return search(*args)

        outer._mcts_collect.search = with_one_inside
        stepped(outer, ALL, ALL, ALL)

    @BOTH_KINDS
    def test_a_search_inside_another(self, validated):
        policy = self.policy(validated)
        self.step_with_another_inside(policy, policy)
        assert (tally_of(policy).inferences, tally_of(policy).unexplained) == (2 * 3 * 5, 0)


class Overwriting(Backend):
    """Hands out what the next step overwrites, as a replayed graph does."""
    _held = None

    def step(self, *args):
        result = super().step(*args)
        if self._held is None:
            self._held = result
        for held, new in zip((*self._held.output, self._held.search), (*result.output, result.search)):
            if held is not None and held is not new:
                held.copy_(new)
        return self._held


class TestBackends:

    def test_results_that_are_overwritten(self):
        policy = make_policy(True, simulations=6, kv_cache_cfg=options(action='raise'))
        world_model = policy._model.world_model
        backend = Overwriting(EAGER, world_model.inference.engine, world_model.weights_source)
        world_model.inference.backend = backend
        stepped(policy, ALL, ALL, ALL)
        assert (tally_of(policy).inferences, tally_of(policy).over) == (3 * 7, 0)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
    @BOTH_KINDS
    @BOTH_POSITIONS
    def test_a_graph(self, rotary, validated):
        case = Case(rotary=rotary)
        cfg = options(validated, action='raise', backend='cudagraph')
        player = Checked(cached_model(case, 3, SEED, device='cuda', kv_cache_cfg=cfg).to('cuda'))
        player.model = Placed(player.model)
        play(player, random_trace(np.random.default_rng(SEED), case, 3, root_steps=4, simulations=8))
        player.close()
        tally = player.world_model.validator.tally
        assert player.world_model.inference.backend.replayed.graphs.memory_mb > 0
        assert (tally.unexplained, tally.inferences) == (0, 4 * 9)


def trained(folder, kind, rotary, **kv_cache_cfg):
    """Collection, evaluation and an update, twice: all that has come of it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    life = Life((0, 1, 2), True, folder, rotary=rotary, max_blocks=10, max_tokens=20, kv_cache_cfg=kv_cache_cfg)
    buffer = life.buffer()
    collector, evaluator = life.worker(COLLECTORS[kind]), life.worker(MuZeroEvaluator)
    losses = []
    for train_iter in range(2):
        life.evaluate(evaluator, train_iter=train_iter, n_episode=3)
        life.fill(buffer, collector)
        with quiet(), seeded_search():
            losses.append(life.policy.learn_mode.forward([*buffer.sample(2, life.policy), train_iter]))
            life.policy.recompute_pos_emb_diff_and_clear_cache()
    life.close()
    world_model = life.policy._model.world_model
    states = {**life.policy._model.state_dict(), **{
        f'target.{name}': value for name, value in life.policy._target_model.state_dict().items()
    }}
    counts = {name: value for name, value in vars(world_model).items() if name.endswith(('_cnt', '_count'))}
    numbers = (
        [worker.noted.searches for worker in (collector, evaluator)], losses, counts, life.cache.counters(),
        life.cache.get_stats_summary(), random.getstate(), [np.array(part) for part in np.random.get_state()[1:]],
        {name: timing.count for name, timing in world_model.timings.items()},
    )
    return life, states, torch.get_rng_state(), numbers


@pytest.mark.slow
@pytest.mark.parametrize('kind', list(COLLECTORS))
@BOTH_POSITIONS
def test_a_training_is_the_same_with_and_without(rotary, kind, tmp_path, monkeypatch):
    """Bit for bit: weights, losses, searches, counts, and what the generators draw next."""
    monkeypatch.chdir('/')
    _, states, rng, numbers = trained(tmp_path, kind, rotary)
    for validated in ('legacy', 'exact'):
        life, with_one, rng_with_one, numbers_with_one = trained(tmp_path, kind, rotary, **options(validated))
        tally = tally_of(life.policy)
        assert tally.searches > 20
        assert tally.unexplained == 0
        assert (tally.over > 0) == (validated == 'legacy')
        assert all(torch.equal(value, with_one[name]) for name, value in states.items())
        assert torch.equal(rng, rng_with_one)
        np.testing.assert_equal(numbers_with_one, numbers)


class TestTally:

    def test_counts_are_cumulative_and_differences_since_the_last_point(self):
        tally = Tally(0.1, ['a', 'b'])
        causes = [[frozenset('ab'), frozenset()]]

        def of_value(*values):
            return np.array([[values], *[[[np.nan] * 2]] * 3])

        assert tally.read() == {}
        over, unexplained = tally.add(of_value(.5, .3), causes)
        assert (over.tolist(), unexplained.tolist()) == ([[True, True]], [[False, True]])
        values = tally.read()
        assert (values['value_max'], values['value_mean']) == (.5, .4)
        assert 'policy_max' not in values
        assert tally.read() == {}
        tally.add(of_value(.05, .2), causes)
        values = tally.read()
        assert [values[name] for name in ('rows_compared', 'rows_over', 'unexplained', 'inferences')] == [4, 3, 2, 2]
        assert (values['cause_a'], values['cause_b'], values['value_max']) == (1, 1, .2)


@BOTH_KINDS
def test_tags(validated, tmp_path):
    policy = make_policy(True, simulations=2, kv_cache_cfg=options(validated))
    worker = Worker(policy)
    hook, = build_learner_hook_by_cfg(EasyDict({HOOK_KEY: copy.deepcopy(HOOK_CONFIG)}))['after_iter']
    with SummaryWriter(str(tmp_path)) as writer:
        engine = SimpleNamespace(
            tb_logger=writer, collector_envstep=5, exp_name=str(tmp_path), last_iter=SimpleNamespace(val=0),
            policy=mock.Mock(get_attribute=lambda name: getattr(policy, f'_{name}'))
        )
        for iteration in range(4):
            if iteration in (0, 2):
                worker.step(ALL)
            engine.last_iter.val = iteration
            hook(engine)
    events = events_in(tmp_path)
    points = {tag.split('/')[1]: [(point.step, point.value) for point in events.Scalars(tag)]
              for tag in events.Tags()['scalars'] if tag.startswith(f'{VALIDATION}/')}
    causes = {f'cause_{cause}' for cause in set(CAUSES).difference(lightzero.NEVER_CAUSES) if validated == 'legacy'}
    assert set(points) == causes | {f'{name}_{kind}' for name in QUANTITIES for kind in ('max', 'mean')} | {
        'searches_replayed', 'inferences', 'rows_compared', 'rows_over', 'unexplained', 'lost', 'failures', 'seconds'
    }
    assert points['rows_compared'] == [(0, 9.), (2, 18.)]
    assert points['searches_replayed'] == [(0, 1.), (2, 2.)]
    assert 0 < points['seconds'][0][1] < points['seconds'][1][1]

"""Reanalysis in arrays: against the same trees with the model's reanalysis step by step, and in LightZero's buffer.

Statistical tests fail by chance once in a million runs or less.
"""
import contextlib
import importlib
from typing import Any, List, NamedTuple, Tuple
from unittest import mock

import numpy as np
import pytest
import torch
from builders import calls_of
from easydict import EasyDict
from lzero.mcts import UniZeroGameBuffer
from recorded_choices import make_rules
from scripted import COLLECTORS, Life, quiet
from seeded_search import seeded_search
from small_models import ON_MAIN, Case, cached_model, original_model
from test_tree import alike

from lzero_kvcache.engine.compiling import entry
from lzero_kvcache.engine.weights import to_scalar
from lzero_kvcache.host import entries
from lzero_kvcache.host.buffers import ReanalysisSearch, reanalyzed_in_arrays
from lzero_kvcache.host.lightzero import lightzero
from lzero_kvcache.host.patches import applied
from lzero_kvcache.search import cpu_search, tree
from lzero_kvcache.search.array_search import ArraySearch, Problem
from lzero_kvcache.search.tree import make_key, make_tree, root_values, root_visits

pytest.importorskip('numba')
prepare_rows, select_rows, backup_rows = map(entry, (tree.prepare_rows, tree.select_rows, tree.backup_rows))

SAMPLES, UNROLL, SIMULATIONS = 5, 3, 10
ROWS = SAMPLES * (UNROLL + 1)
LEGAL = [[], [2, 0], [1]]
FIRST = 0  # number of a model's first reanalysis
IN_ARRAYS = (
    'INFO', 'Reanalyzing in arrays, since the model can be compiled for the CPU: a search is one compiled call'
)
#: Values are means over a support from -50 to 50, and rounding in its logits weighs accordingly.
TOLERANCE = 3e-4

CASES = pytest.mark.parametrize('case, two_players, grows', [
    (Case(rotary=True), False, False), (Case(), True, False), (Case(num_layers=1, num_heads=4), False, False),
    (Case(rotary=True), True, True), (Case(context_length=4), False, True), (Case(num_layers=1), False, True),
], ids=['rotary', 'learned, two players', 'one layer', 'grown, two players', 'grown, short', 'grown, one layer'])


class Asked(NamedTuple):
    """What a replay buffer asks, and whether contexts grow along the paths, as the main branch's do."""
    world_model: Any
    problem: Problem
    latents: np.ndarray
    timesteps: np.ndarray
    grows: bool


def asked(case: Case, two_players: bool, grows: bool = False, device: str = 'cpu', **kv_cache_cfg: Any) -> Asked:
    model, rng = cached_model(case, ROWS, 5, device=device, kv_cache_cfg=kv_cache_cfg), np.random.default_rng(1)
    world_model = model.to(device).world_model
    slots = case.action_space_size
    problem = Problem(
        make_rules(two_players=two_players), 1, 0, SIMULATIONS, slots, 0, [0.] * ROWS,
        rng.normal(size=(ROWS, slots)).tolist(), [LEGAL[row % 3] for row in range(ROWS)],
        rng.dirichlet([0.3] * slots, ROWS).tolist(), 0.25
    )
    latents = rng.dirichlet([1.] * 8, (ROWS, case.embed_dim // 8)).reshape(ROWS, -1).astype(np.float32)
    timesteps = 40 + np.arange(UNROLL) + np.zeros((SAMPLES, 1), np.int64)
    world_model.reserve_angles(timesteps, SIMULATIONS)
    return Asked(world_model, problem, latents, timesteps, grows)


def by_steps(question: Asked, number: int = FIRST) -> Tuple[List[List[int]], List[float]]:
    """The same search with one reanalysis of LightZero's for each simulation."""
    world_model, problem, roots, timesteps, grows = question
    world_model.clear_caches()
    rules, key, rows = problem.rules, make_key(problem.seed, number), np.arange(len(roots))
    found = make_tree(len(roots), SIMULATIONS, problem.slots, 1)
    prepare_rows(
        found, rules, key, np.zeros(len(roots), np.float32), np.float32(problem.logits),
        problem.padded_legal(), np.float32(problem.noises), np.float32(problem.noise_weight), 0,
        len(roots)
    )
    latents = [roots]
    with mock.patch.object(world_model, 'reanalyze_phase', True), torch.no_grad(), \
            mock.patch.object(lightzero, 'KEEPS_REANALYSES', grows):
        for simulation in range(SIMULATIONS):
            select_rows(found, rules, key, simulation, 0, len(roots))
            parents = found.path[rows, found.depth - 1]
            state = np.stack([latents[parent][row] for row, parent in enumerate(parents)])
            _, latent, reward, policy, value = world_model.forward_recurrent_inference(
                [(state[:, None], torch.from_numpy(found.action.astype(np.int64)))], simulation, found.depth.tolist(),
                timesteps
            )
            latents.append(latent.squeeze(1).cpu().numpy())
            rewards, values = (to_scalar(logits.squeeze(1)).cpu().numpy().reshape(-1) for logits in (reward, value))
            backup_rows(found, rules, key, simulation, rewards, values, policy.squeeze(1).cpu().numpy(), 0, len(roots))
    return root_visits(found), root_values(found)


def part_of(question: Asked, begin: int, end: int) -> Asked:
    """Some of the rows, as one sequence; its last timestep is one that the buffer appends."""
    world_model, problem, latents, timesteps, grows = question
    rows = slice(begin, end)
    padded = np.pad(timesteps, ((0, 0), (0, 1))).reshape(-1)[rows]
    assert padded[-1] == 0
    return Asked(world_model, problem.part(rows, 0), latents[rows], padded[None, :-1], grows)


@CASES
def test_it_is_the_search_by_steps(case: Case, two_players: bool, grows: bool) -> None:
    question = asked(case, two_players, grows)
    visits, values, _ = question.world_model.inference.in_arrays.reanalyze(*question[1:])
    expected, expected_values = by_steps(question)
    assert visits == expected
    np.testing.assert_allclose(values, expected_values, atol=TOLERANCE)
    assert np.std(values) > 0.01 and all(sum(row) == SIMULATIONS for row in visits)
    assert [len(row) for row in visits[:3]] == [case.action_space_size, 2, 1]


@pytest.mark.parametrize(('grows', 'allowed', 'at_once'), [(True, 0.15, [13, 7]), (False, 0.15, [20]), (True, 9, [20])])
def test_its_pages_take_no_more_memory_than_is_allowed(grows: bool, allowed: float, at_once: List[int]) -> None:
    question = asked(Case(), False, grows, max_memory_mb=allowed, recurrent_pool_size=1)
    search, sizes = question.world_model.inference._cpu_search, []
    find = search._from_states

    def noted(problem: Problem, latents: np.ndarray, *args: Any) -> Any:
        sizes.append(len(latents))
        return find(problem, latents, *args)

    with mock.patch.object(search, '_from_states', noted):
        visits, _, _ = question.world_model.inference.in_arrays.reanalyze(*question[1:])
    assert sizes == at_once and [sum(row) for row in visits] == ROWS * [SIMULATIONS]
    [[memory]] = search._memories._free.values()
    assert memory.slab.nbytes <= allowed * 2 ** 20


@CASES
def test_some_rows_at_a_time(case: Case, two_players: bool, grows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with draws of its own; the last are fewer. Memory is that of some rows, and is counted."""
    question = asked(case, two_players, grows)
    manager, search = question.world_model.kv_cache_manager, question.world_model.inference._cpu_search
    before = manager.memory_mb
    monkeypatch.setattr(cpu_search, 'ROWS', 2 * (UNROLL + 1))
    visits, values, _ = question.world_model.inference.in_arrays.reanalyze(*question[1:])
    small = search._memories.memory_mb
    assert manager.memory_mb - before == pytest.approx(small + search._model.memory.memory_mb)
    parts = [by_steps(part_of(question, begin, min(begin + 8, ROWS)), FIRST + number)
             for number, begin in enumerate((0, 8, 16))]
    assert visits == [row for part, _ in parts for row in part]
    np.testing.assert_allclose(values, [value for _, part in parts for value in part], atol=TOLERANCE)
    latents, pages = (0, 1 + 8 * (1 + SIMULATIONS)) if grows else (8 * (1 + SIMULATIONS), 1 + 8 * 2)
    assert small > 4 * (latents + pages * 4 * case.num_layers) * case.embed_dim / 2 ** 20
    monkeypatch.setattr(cpu_search, 'ROWS', 64)
    question.world_model.inference.in_arrays.reanalyze(*question[1:])
    assert small < search._memories.memory_mb < 2.5 * small


def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    question = asked(Case(), False)
    alone = by_steps(question)[0]
    torch.set_num_threads(2)
    visits, _, _ = question.world_model.inference.in_arrays.reanalyze(*question[1:])
    torch.set_num_threads(1)
    assert visits == alone


def test_what_is_no_number_is_reported() -> None:
    for on_nan in ('raise', 'skip'):
        question = asked(Case(), False, on_nan=on_nan)
        with torch.no_grad():
            question.world_model.head_value.head_module[-1].bias.fill_(float('nan'))
        raised = pytest.raises(FloatingPointError, match='with nan or inf in reanalysis, row 0, step 40')
        with raised if on_nan == 'raise' else contextlib.nullcontext():
            question.world_model.inference.in_arrays.reanalyze(*question[1:])
        assert question.world_model.kv_cache_manager.counters()['skipped'] == (ROWS * SIMULATIONS) * (on_nan == 'skip')


# ---- LightZero's buffer ----------------------------------------------------------------------------------------------


@pytest.fixture
def life(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A policy and what its collector has collected."""
    monkeypatch.chdir('/')  # LightZero's workers write below where they are, also if they are told a whole path
    made = []

    def make(**kv_cache_cfg: Any) -> Tuple[Any, Any]:
        life = Life((0, 1, 2), True, tmp_path, max_blocks=10, max_tokens=20,
                    kv_cache_cfg=dict(dict(search='device'), **kv_cache_cfg))
        made.append(life)
        for config in (life.config.policy, life.policy._cfg):
            config.update(batch_size=3, num_unroll_steps=UNROLL, root_noise_weight=0.25)
            config.update(reanalyze_ratio=1., reanalyze_partition=0.75)
        buffer = UniZeroGameBuffer(life.config.policy)
        segments = life.collect(life.worker(COLLECTORS['segments']))
        for segment in segments[0]:  # LightZero pads a target's rewards with scalars
            segment.reward_segment = np.ravel(segment.reward_segment)
        with quiet():
            buffer.push_game_segments(segments)
        return buffer, life.policy

    yield make
    for life in made:
        life.close()


def ways() -> Any:
    """How each search of a reanalysis goes."""
    searches = importlib.import_module('lzero.mcts.tree_search.mcts_ctree').UniZeroMCTSCtree
    return calls_of(arrays=(ArraySearch, 'reanalyze'), ctree=(searches, 'search'))


def lines_of(lines: Any) -> List[Tuple[str, str]]:
    return [(level, message) for level, message in lines() if message.startswith('Reanalyzing')]


def test_a_buffer_reanalyzes_in_arrays(life: Any, lines: Any) -> None:
    buffer, policy = life()
    module = importlib.import_module('lzero.mcts.buffer.game_buffer_unizero')
    own, method = module.MCTSCtree, UniZeroGameBuffer._compute_target_policy_reanalyzed
    with applied(reanalysis=reanalyzed_in_arrays), ways() as taken:
        assert module.MCTSCtree is own
        for _ in range(2):
            _, (_, _, policies) = buffer.sample(3, policy)
        buffer.reanalyze_buffer(2, policy)
    assert taken == ['arrays'] * 3
    assert UniZeroGameBuffer._compute_target_policy_reanalyzed is method
    sums = policies.sum(-1)
    assert policies.shape == (3, UNROLL + 1, 2) and set(np.round(sums, 6).ravel()) <= {0., 1.} and sums.any()
    assert lines_of(lines) == [IN_ARRAYS]
    assert policy._target_model.world_model.inference._cpu_search._memories.memory_mb > 0


@pytest.mark.parametrize('search, prepare, told', [
    ('tree', lambda buffer, model: None, None),
    ('auto', lambda buffer, model: setattr(model.world_model.config, 'gru_gating', True),
     ('INFO', "Reanalyzing in LightZero's tree, node by node: its layers are gated")),
    ('device', lambda buffer, model: setattr(model.world_model.config, 'gru_gating', True),
     ('WARNING', "Reanalyzing in LightZero's tree, node by node, not as kv_cache_cfg.search='device' asks: its layers "
                 "are gated")),
    ('device', lambda buffer, model: setattr(model, 'recurrent_inference', model.recurrent_inference), None),
    ('device', lambda buffer, model: setattr(model, 'eval', model.train),
     IN_ARRAYS),
], ids=['tree', 'auto', 'device', 'inference of its own', 'training'])
def test_what_is_reanalyzed_in_lightzeros_tree(search: str, prepare: Any, told: Any, life: Any, lines: Any) -> None:
    buffer, policy = life(search=search)
    target = policy._target_model
    prepare(buffer, getattr(target, '_orig_mod', target))
    with applied(reanalysis=reanalyzed_in_arrays), ways() as taken, seeded_search(), \
            mock.patch.object(target, 'eval', target.train if told and 'arrays' in told[1] else target.eval):
        _, (_, _, policies) = buffer.sample(3, policy)
    assert set(taken) == {'ctree'} and policies.sum() > 0
    assert lines_of(lines) == [told] * (told is not None)


@pytest.mark.skipif(not ON_MAIN, reason="LightZero's main branch searches some roots at a time")
@pytest.mark.parametrize('own', [False, True])
def test_all_roots_at_once_unless_somebody_searches(own: bool, life: Any) -> None:
    buffer, policy = life()
    asked_for: List[int] = []

    class Own(UniZeroGameBuffer):

        def _search_reanalyzed_roots_in_chunks(self, **roots: Any) -> Any:
            asked_for.append(len(roots['legal_actions']))
            return super()._search_reanalyzed_roots_in_chunks(**roots)

    buffer.__class__ = Own if own else UniZeroGameBuffer
    with applied(reanalysis=reanalyzed_in_arrays), ways() as taken:
        buffer.sample(3, policy)
    assert (taken, asked_for) == ((['ctree'] * 4, [12]) if own else (['arrays'], []))


def test_old_mode_reanalyzes_as_it_does() -> None:
    """Whatever runs around it, the very method is called, with what it was called with."""
    model, buffer = original_model(Case(), 1, 0), object()
    compute = mock.Mock(return_value='targets', __name__='compute')
    for context in (None, []):
        assert reanalyzed_in_arrays(compute)(buffer, context, model, 1, batch_timestep=2) == 'targets'
        compute.assert_called_with(buffer, context, model, 1, batch_timestep=2)


def test_runs_reanalyze_in_arrays() -> None:
    before, during = UniZeroGameBuffer._compute_target_policy_reanalyzed, []

    def train(configs: Any, **arguments: Any) -> Any:
        during.append(UniZeroGameBuffer._compute_target_policy_reanalyzed.__wrapped__)  # type: ignore[attr-defined]
        return configs, arguments

    with mock.patch('lzero.entry.train_unizero', train):
        assert entries.run_entry('train_unizero', (EasyDict(a=1), EasyDict(b=2)), seed=3) == ([{'a': 1}, {'b': 2}],
                                                                                              {'seed': 3})
    assert during == [before] and UniZeroGameBuffer._compute_target_policy_reanalyzed is before


@pytest.mark.filterwarnings('ignore:Precision loss')  # of numbers that never vary
def test_means_over_many_reanalyses_are_those_of_lightzeros_tree(life: Any) -> None:
    """Of the same positions; 1e-7 for each mean, Welch's test."""
    buffer, policy = life()
    _, context, _, batch = buffer._make_batch(2, 1.)
    timesteps = [] if ON_MAIN else [batch[-1]]
    compute, model = UniZeroGameBuffer._compute_target_policy_reanalyzed, policy._target_model.eval()

    def targets(compute: Any) -> np.ndarray:
        with quiet():
            return np.array([
                compute(buffer, context, model, batch[1], *timesteps)[..., 0].ravel() for _ in range(150)
            ])

    arrays, ctree = targets(reanalyzed_in_arrays(compute)), targets(compute)
    with mock.patch.object(ReanalysisSearch, '_rules',
                           lambda self, rules=ReanalysisSearch._rules: rules(self)._replace(init=np.float32(12))):
        other = targets(reanalyzed_in_arrays(compute))
    assert (arrays.std(axis=0) > 0).any()
    assert alike(arrays, ctree)
    assert not alike(other, ctree)  # such a difference would be seen

"""Environments in LightZero's own workers: each is answered as LightZero's model answers it alone, whatever others do.

The original is shown to fail every one of these comparisons. ``scripted.py`` has the environments and the workers.
"""
import functools
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np
import pytest
from builders import audit
from lzero.worker import MuZeroEvaluator
from scripted import COLLECTORS, Life, Search
from small_models import ON_MAIN

SCRIPTS = (0, 1, 2, 3)
EVALUATOR = 'evaluator'
SEGMENT = 3  # of which the original ends a collection without any episode's end
#: A value is a mean over a support from -50 to 50, and rounding in its logits weighs accordingly.
TOLERANCE = 1e-3
#: No rounding makes as much.
WRONG = 0.3
# LightZero's main branch has no angles below 0, which an episode has that goes on at timestep 0.
ROTARY_SEGMENTS = pytest.mark.skipif(ON_MAIN, reason='its segment collector tells timesteps of other steps')
POSITIONS = pytest.mark.parametrize('rotary', [False, pytest.param(True, marks=ROTARY_SEGMENTS)])
KINDS = pytest.mark.parametrize('kind', ['episodes', pytest.param('segments', marks=ROTARY_SEGMENTS), EVALUATOR])


pytestmark = pytest.mark.usefixtures('at_the_root')


def lived(scripts: Sequence[int], new: bool, folder: Any, kind: str, rounds: int, **options: Any) -> Any:
    """
    The notes of a worker, after some collections or evaluations of these environments.
    """
    # Episodes are collected until there are half as many again as environments: some have one, some two, and at the end
    # fewer and fewer are ready. A segment collector tells the timestep that its collection began with, which depends on
    # when the others have ended theirs.
    n_episode = len(scripts) + len(scripts) // 2 if kind == 'episodes' else 0
    life = Life(scripts, new, folder, n_episode=n_episode, timesteps=kind != 'segments', **options)
    worker = life.worker(COLLECTORS.get(kind, MuZeroEvaluator))
    for number in range(rounds):
        if kind == EVALUATOR:
            life.evaluate(worker, train_iter=number, n_episode=len(scripts))
        else:
            life.collect(worker)
    life.close()
    if new:
        audit(life.cache)
    return worker.noted


@pytest.fixture(scope='module')
def alone(tmp_path_factory: Any) -> Any:
    """The searches of one environment that LightZero's own model has to itself."""

    @functools.lru_cache(maxsize=None)
    def searches(script: int, kind: str, rotary: bool) -> List[Search]:
        rounds = 5 if kind == EVALUATOR else 7
        return lived((script, ), False, tmp_path_factory.mktemp('alone'), kind, rounds, rotary=rotary).searches[0]

    return searches


class Difference(NamedTuple):
    """How far the searches of one environment are from those that are right."""
    searches: int
    value: float  # largest relative difference
    others: int  # searches with other visits, another action or another timestep


def difference(actual: List[Search], right: List[Search]) -> Difference:
    pairs = list(zip(actual, right))
    value = max(
        abs(ours - theirs) / max(abs(theirs), 1.)
        for one, other in pairs for ours, theirs in zip(one[:2], other[:2])
    )
    return Difference(len(pairs), value, sum(one[2:] != other[2:] for one, other in pairs))


def assert_as_alone(searches: Dict[int, List[Search]], right: Sequence[List[Search]], least: int) -> None:
    assert sorted(searches) == list(range(len(right)))
    for env_id, expected in enumerate(right):
        assert len(expected) >= len(searches[env_id])
        found = difference(searches[env_id], expected)
        assert found.searches >= least
        assert found.value < TOLERANCE and found.others == 0, f'environment {env_id}: {found}'


class TestAlone:

    @pytest.mark.parametrize('manager', ['base', 'subprocess'])
    @KINDS
    def test_each_environment_is_answered_as_alone(self, kind, manager, alone, tmp_path):
        noted = lived(SCRIPTS, True, tmp_path, kind, 3, manager=manager)
        assert_as_alone(noted.searches, [alone(script, kind, True) for script in SCRIPTS], least=10)
        sizes = {len(batch) for batch in noted.batches}
        assert max(sizes) == 4
        if kind != 'segments':  # there, only processes that are still busy are left out
            assert min(sizes) == 1
        # Episodes have ended in the middle of all this, and others had a predecessor.
        for searches in noted.searches.values():
            timesteps = [search.timestep for search in searches]
            assert kind == 'segments' or timesteps.count(0) > 1
        assert 0 < noted.followed < sum(map(len, noted.searches.values()))

    def test_with_learned_positions(self, alone, tmp_path):
        noted = lived(SCRIPTS, True, tmp_path, 'segments', 3, rotary=False)
        assert_as_alone(noted.searches, [alone(script, 'segments', False) for script in SCRIPTS], least=10)

    @KINDS
    def test_the_original_answers_each_of_them_otherwise(self, kind, alone, tmp_path):
        searches = lived(SCRIPTS, False, tmp_path, kind, 3).searches
        for script in SCRIPTS:
            assert difference(searches[script], alone(script, kind, True)).value > WRONG


def contexts(life: Life, env_id: int) -> Any:
    """All that collection goes on from in one environment: tokens of its newest root, last observation and action."""
    tables, counts = life.cache._current['collect'].find([env_id])
    step = life.policy._environments._steps['collect'].get(env_id, ())
    return life.cache.store.slab.data[tables[0][:counts[0]]].tolist(), [np.array(part).tolist() for part in step]


class TestOneTouchesNoOther:

    @POSITIONS
    def test_an_evaluation_between_two_collections(self, rotary, alone, tmp_path):
        """Episodes go on over it, and all that they go on from is as it was."""
        life = Life(SCRIPTS, True, tmp_path, timesteps=False, rotary=rotary, segment=SEGMENT)
        collector, evaluator = life.worker(COLLECTORS['segments']), life.worker(MuZeroEvaluator)
        for number in range(4):
            life.collect(collector)
            before = [contexts(life, env_id) for env_id in range(4)]
            life.evaluate(evaluator, train_iter=number, n_episode=4)
            assert [contexts(life, env_id) for env_id in range(4)] == before
            assert sum(bool(tokens) for tokens, _ in before) > 1
        life.close()
        audit(life.cache)
        right = [alone(script, 'segments', rotary) for script in SCRIPTS]
        assert_as_alone(collector.noted.searches, right, least=10)

    @ROTARY_SEGMENTS
    def test_the_original_goes_on_otherwise_after_an_evaluation(self, tmp_path):
        """Whatever its answers are, they are others than without evaluations."""

        def collected(evaluations: bool) -> Dict[int, List[Search]]:
            life = Life(SCRIPTS, False, tmp_path, timesteps=False, segment=SEGMENT)
            collector, evaluator = life.worker(COLLECTORS['segments']), life.worker(MuZeroEvaluator)
            for number in range(4):
                life.collect(collector)
                if evaluations:
                    life.evaluate(evaluator, train_iter=number, n_episode=4)
            life.close()
            return collector.noted.searches

        disturbed, undisturbed = collected(True), collected(False)
        assert max(difference(disturbed[env_id], undisturbed[env_id]).value for env_id in range(4)) > WRONG

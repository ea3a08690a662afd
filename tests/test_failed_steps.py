"""Steps that die or are abandoned: their environments go on as if these had not been."""
import gc
from unittest import mock

import numpy as np
import pytest
from builders import audit, roots
from disturbed import (
    SIMULATIONS,
    Broken,
    abandoned,
    as_garbage,
    assert_undisturbed,
    lived,
    model_of,
    trace_of,
    undisturbed,
)
from players import ByNode


def failed(model, events):
    """A step that dies in the middle of its search."""
    other = ByNode(model)
    with pytest.raises(Broken), other._open:
        for event in events:
            other.play(event)
        raise Broken


@pytest.mark.parametrize('fail', [failed, as_garbage])
@pytest.mark.parametrize('done', [1, 5])
def test_a_step_that_failed_is_no_step(fail, done):
    """Its environments go on from the roots that they had, or begin if it was their first."""
    trace, model = trace_of(), model_of()
    answers = []
    for number in range(0, len(trace.events), SIMULATIONS + 1):
        events = trace.events[number:number + SIMULATIONS + 1]
        fail(model, events[:done])
        player = ByNode(model)
        answers += [player.play(event) for event in events]
        player.close()
    assert_undisturbed(answers, undisturbed(ByNode))
    audit(model.world_model.kv_cache_manager)


@pytest.mark.parametrize('fail', [failed, as_garbage])
def test_a_step_that_failed_leaves_what_was_stored_by_key(fail):
    """By hand, for one of its environments."""
    model = model_of()
    manager = model.world_model.kv_cache_manager
    with manager.lease() as lease:
        rows = np.zeros((1, manager.context_pages), np.int64), np.ones(1, np.int64)
        rows[0][0, 0] = lease.allocate(1)
        manager.store_init('collect', [0], ['mine'], rows)
    fail(model, trace_of().events[:2])
    model.world_model.inference.open.end_abandoned()
    assert manager.find_init('collect', [0], ['mine'])[1].tolist() == [1]
    assert roots(manager) == [1, 0, 0, 0]
    audit(manager)


@pytest.mark.parametrize('kept', [1, 2])
def test_a_step_that_is_abandoned_and_collected_late(kept):
    """By then its environments have moved on: nothing of theirs is put back."""
    trace, model = trace_of(), model_of()
    expected = undisturbed(ByNode)
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
    assert_undisturbed(lived(ByNode(model), trace), undisturbed(ByNode))
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

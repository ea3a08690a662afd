"""A policy's open step: what fails at any point of it leaves nothing behind, and roots are found by environment."""
import contextlib
from unittest import mock

import numpy as np
import pytest
import seeded_search
from builders import Worker, assert_same_outputs, audit, cache_of, policy_of
from oracle import Batch, Root, random_trace
from small_models import Case

from lzero_kvcache import KVCacheManager
from lzero_kvcache.cache.base import CURRENT
from lzero_kvcache.cache.nodes import NodeTable
from lzero_kvcache.search import inference
from lzero_kvcache.search import roots as root_inference


class Broken(Exception):
    """What a step may die of."""


#: Where a step may fail, and the ways of searching that pass there.
POINTS = {
    'taking pages': (lambda policy: (cache_of(policy), 'take'), 'both'),
    'the slab': (lambda policy: (cache_of(policy).store, 'ready'), 'both'),
    'contexts begun anew': (lambda policy: (policy._model.world_model.inference.engine, 'begin'), 'both'),
    'first observations': (lambda policy: (policy._model.world_model.inference.engine, 'first'), 'both'),
    'a step': (lambda policy: (policy._model.world_model.inference.engine, 'step'), 'both'),
    'writing pages': (lambda policy: (cache_of(policy).store.slab, 'write'), 'both'),
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
def breaking(owner, name, at):
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
        with breaking(owner, name, at) as calls, contextlib.suppress(Broken):
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


class TestByEnvironment:

    @pytest.mark.parametrize('mode', ['collect', 'eval'])
    def test_an_open_step_hashes_nothing_and_copies_no_latent(self, mode, monkeypatch):
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
        trace = random_trace(np.random.default_rng(11), Case(), 2, root_steps=1, simulations=1)
        Batch(policy._model).play(Root(*(field[:2] for field in trace.events[0]))._replace(
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

"""Weights that change: contexts made under older ones are not used, whoever changed them."""
import contextlib
import gc
import io

import pytest
import torch
from builders import Worker, assert_same_outputs, audit, differs, make_policy, roots
from scripted import COLLECTORS, Life, quiet
from seeded_search import seeded_search

from lzero_kvcache.search import compiled_search

LINE = 'contexts made under older ones are dropped, now and from now on'


pytestmark = pytest.mark.usefixtures('at_the_root')


def contexts(policy):
    """Root contexts that are stored in each environment."""
    return roots(policy._model.world_model.kv_cache_manager)


def lost(policy):
    """Rows of root inferences whose contexts were gone, and how many could have had one."""
    counted = policy._model.world_model.kv_cache_manager.counters()['init']
    return counted['misses'], counted['queries']


def told(lines):
    return [message for level, message in lines() if level == 'INFO' and LINE in message]


class Training:
    """A policy whose environments are in the middle of episodes, and a batch to train on."""

    def __init__(self, new, folder):
        self.life = life = Life((0, 1, 2), new, folder, max_blocks=10, max_tokens=20, segment=3)
        self.policy, buffer = life.policy, life.buffer()
        self.collector = life.worker(COLLECTORS['segments'])
        for _ in range(3):
            life.fill(buffer, self.collector)
        with quiet(), seeded_search():
            self.data = buffer.sample(2, self.policy)

    def update(self):
        with contextlib.redirect_stdout(io.StringIO()), seeded_search():
            self.policy.learn_mode.forward([*self.data, 0])


def test_a_learner_step(tmp_path, lines):
    """Without anybody clearing anything, and told once however many there are."""
    training = Training(True, tmp_path)
    policy = training.policy
    assert sum(contexts(policy)) > 0  # sampling, which moves the target model about, has cleared nothing
    assert told(lines) == []
    for _ in range(2):
        training.update()
        assert contexts(policy) == [0, 0, 0]
        training.life.collect(training.collector)
    assert 'Weights changed (learner step)' in told(lines)[0]
    assert len(told(lines)) == 2  # one for each model
    assert sum('learner step' in message for message in told(lines)) == 1
    audit(policy._model.world_model.kv_cache_manager)
    training.life.close()


def test_the_target_model_of_an_update(tmp_path):
    """Whoever searches with it finds no context of its older weights."""
    training = Training(True, tmp_path)
    target = training.policy._target_model.world_model
    with torch.no_grad(), target.open_step('collect', [0, 1]):
        target.forward_initial_inference(dict(obs=torch.zeros(2, 4), action=[-1, -1], current_obs=torch.ones(2, 4)))
    assert roots(target.kv_cache_manager) == [1, 1, 0]
    training.update()
    assert roots(target.kv_cache_manager) == [0, 0, 0]
    training.life.close()


def test_the_original_goes_on_with_contexts_of_older_weights(tmp_path):
    """Or else the tests above would show nothing."""
    training = Training(False, tmp_path)
    pools = training.policy._model.world_model.past_kv_cache_init_infer_envs
    before = [dict(pool) for pool in pools]
    assert sum(map(len, before)) > 2
    training.update()
    assert [dict(pool) for pool in pools] == before
    training.life.close()


def moved(policy):
    """As the target model's update does it: new storage, and nobody is told."""
    for parameter in policy._model.parameters():
        parameter.data = parameter.data * 1.05


def loaded(policy):
    policy._model.load_state_dict({name: value * 1.05 if value.is_floating_point() else value
                                   for name, value in policy._model.state_dict().items()})


@pytest.mark.parametrize(('change', 'reason'), [(moved, 'their storage moved'), (loaded, 'checkpoint loaded')])
def test_answers_are_those_of_the_new_weights(change, reason, lines):
    """Those of a policy that had them when its episodes were at this step, and has nothing stored."""
    policy, other = make_policy(True), make_policy(True)
    before = len(told(lines))
    worker, expected = Worker(policy), Worker(other)
    for _ in range(2):
        worker.step([0, 1, 2])
        expected.step([0, 1, 2])
    change(other)
    other._model.world_model.clear_caches()
    change(policy)
    output, right = worker.step([0, 1, 2]), expected.step([0, 1, 2])
    assert_same_outputs(output, right, [0, 1, 2])
    assert lost(policy) == (3, 6)
    assert any(reason in message for message in told(lines)[before:]) or reason == 'checkpoint loaded'
    for _ in range(2):
        assert_same_outputs(worker.step([0, 1, 2]), expected.step([0, 1, 2]), [0, 1, 2])


def test_contexts_of_older_weights_would_show(monkeypatch):
    """Or else the test above would show nothing: with the old contexts, the answers are others."""
    policy, other = make_policy(True), make_policy(True)
    worker, expected = Worker(policy), Worker(other)
    for _ in range(2):
        worker.step([0, 1, 2])
        expected.step([0, 1, 2])
    moved(other)
    monkeypatch.setattr(policy._model.world_model, 'forget', lambda *args: None)
    moved(policy)
    assert differs(worker.step([0, 1, 2]), expected.step([0, 1, 2]), [0, 1, 2])
    assert lost(policy) == (0, 6)


def test_weights_that_move_inside_of_a_search_stay_until_it_has_ended(monkeypatch):
    """A search in arrays reads them at their addresses, and another search of the model may look for them meanwhile."""
    policy, other = (make_policy(True, kv_cache_cfg=dict(search='device')) for _ in range(2))
    worker, expected, search_rows, taken = Worker(policy), Worker(other), compiled_search.search_rows, []

    def disturbed(*args):
        if args[-1] == 0:  # it is only compiled
            return
        moved(policy)
        policy._model.world_model.inference._cpu_search._model.network_at(())
        gc.collect()
        taken.extend(torch.full_like(parameter, float('nan')) for parameter in policy._model.parameters())
        search_rows(*args)

    right = expected.step([0, 1, 2])
    with monkeypatch.context() as patched:
        patched.setattr(compiled_search, 'search_rows', disturbed)
        assert_same_outputs(worker.step([0, 1, 2]), right, [0, 1, 2])
    assert taken
    moved(other)
    assert_same_outputs(worker.step([0, 1, 2]), expected.step([0, 1, 2]), [0, 1, 2])


def test_the_same_weights_elsewhere_are_no_change():
    """``to`` and ``eval``, which LightZero's buffer calls at every sample, and a step of evaluation."""
    policy = make_policy(True)
    worker = Worker(policy)
    worker.step([0, 1, 2])
    policy._model.to('cpu')
    policy._model.eval()
    Worker(policy, 'eval').step([0])
    worker.step([0, 1, 2])
    assert lost(policy) == (0, 3)

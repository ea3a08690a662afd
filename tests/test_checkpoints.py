"""Checkpoints: saved whole, kept, read without running what is in them; those of other models in one line."""
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from fake_runs import a_watch, checkpoint
from torch import nn
from trainings import train as main

from lzero_kvcache import ConfigError
from lzero_kvcache.host.states import fault_of_state
from lzero_kvcache.training.checkpoints import STATE, abandon_later, prune, read_checkpoint, save_atomically
from lzero_kvcache.training.past import Past


def test_a_failing_save_leaves_the_old_checkpoint(tmp_path):
    path = str(tmp_path / 'c.pth.tar')
    save_atomically({'a': 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomically({'a': 2, 'unsaveable': lambda: None}, path)
    assert torch.load(path) == {'a': 1}
    assert os.listdir(tmp_path) == ['c.pth.tar']


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    running, flushed = a_watch(keep_checkpoints=2), []
    writer = SimpleNamespace(flush=lambda: flushed.append(len(os.listdir(tmp_path))))
    running.learner = SimpleNamespace(tb_logger=writer)
    save = running.save
    for name, iteration in (('iteration_0', 0), ('ckpt_best', 0), ('iteration_9', 9), ('iteration_10', 10),
                            ('iteration_100', 100)):
        save(str(tmp_path / f'{name}.pth.tar'), {**dict.fromkeys(STATE, {}), 'last_iter': iteration})
    assert sorted(os.listdir(tmp_path)) == ['ckpt_best.pth.tar', 'iteration_10.pth.tar', 'iteration_100.pth.tar']
    assert flushed == [1, 2, 3, 4, 4]  # a training that is killed goes on from a checkpoint and the points before it


def test_the_furthest_are_kept_and_none_that_was_abandoned(tmp_path):
    """Whatever the times of the files are."""
    paths = [checkpoint(tmp_path / f'iteration_{step}.pth.tar', step) for step in (20, 50, 100)]
    for age, path in enumerate(paths):
        os.utime(path, (1e9 - age, 1e9 - age))
    prune(str(tmp_path), 2)
    assert not os.path.exists(paths[0]) and os.path.exists(paths[2])
    abandon_later(paths[1], 5, 50)
    prune(str(tmp_path), 1)
    assert [name for name in os.listdir(tmp_path) if name.endswith('.tar')] == ['iteration_50.pth.tar']


def test_a_checkpoint_is_not_saved_anew_where_a_run_goes_on_from_it(tmp_path, monkeypatch):
    """But for the best one, if there is a better one."""
    monkeypatch.chdir(tmp_path)
    running = a_watch()
    running.learner = SimpleNamespace(tb_logger=SimpleNamespace(flush=lambda: None))
    save = running.save
    for name in ('iteration_5', 'ckpt_best'):
        save(f'./{name}.pth.tar', dict(last_iter=5, weights=1))
        running.past = Past((str(tmp_path / f'{name}.pth.tar'), 5))
        save(f'./{name}.pth.tar', dict(last_iter=5, weights=2))
        assert torch.load(f'{name}.pth.tar')['weights'] == 1
        save(f'./{name}.pth.tar', dict(last_iter=6, weights=3))
        assert torch.load(f'{name}.pth.tar')['weights'] == 3


# ---- what is none, or another model's --------------------------------------------------------------------------------

class Payload:
    """Runs a command when it is unpickled carelessly."""

    def __reduce__(self):
        return os.mkdir, ('marker', )


@pytest.mark.parametrize('option', [
    ['--resume'], ['--eval'], ['--set', 'policy.model_path='],
    ['--set', 'policy.learn.learner.hook.load_ckpt_before_run='],
])
def test_a_checkpoint_runs_nothing_whichever_way_it_comes_in(option, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Payload(), 'target_model': {}, 'optimizer_world_model': {}}, 'c.pth.tar')
    arguments = option + ['c.pth.tar'] if len(option) == 1 else ['--set', option[1] + 'c.pth.tar']
    assert main(['--config', 'config_new', *arguments]) == 2
    assert 'holds more than weights' in capfd.readouterr().err
    assert os.listdir(tmp_path) == ['c.pth.tar']


@pytest.mark.parametrize(('content', 'cut', 'message'), [
    ({'model': {}}, 0, 'no checkpoint of a UniZero training'),
    ([1, 2], 0, 'no checkpoint of a UniZero training'),
    ({'model': {}, 'target_model': {}, 'optimizer_world_model': {}}, 40, 'torn'),
])
def test_a_file_that_is_no_checkpoint(content, cut, message, tmp_path):
    path = tmp_path / 'c.pth.tar'
    torch.save(content, str(path))
    with open(path, 'r+b') as file:
        file.truncate(path.stat().st_size - cut)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(str(path))


@pytest.mark.parametrize('way', ['--eval {}', '--resume {}', '--set +policy.model_path={}',
                                 '--set +policy.learn.learner.hook.load_ckpt_before_run={}'])
def test_a_checkpoint_of_another_model_is_named_with_its_option(way, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model={}, target_model={}, optimizer_world_model={}), 'other')
    assert main(['--config', 'config_new', *way.format('other').split()]) == 2
    error = capfd.readouterr().err
    source = way.format('other').replace('--set +', '')
    assert error.startswith(f'lzero-kvcache: error: {source}: the checkpoint is of another model: ')
    assert error.count('\n') == 1 and os.listdir() == ['other']


@pytest.mark.parametrize(('saved', 'said'), [
    ([nn.Linear(2, 4), nn.Linear(4, 4)], ': 0.weight is [4, 2] in it, not [4, 3];'),
    ([nn.Linear(2, 5), nn.Linear(5, 4)], ': 0.weight is [5, 2] in it, not [4, 3], and 2 more;'),
    ([nn.Linear(3, 4), nn.ReLU()], ': 1.weight is not in it, and 1 more;'),
    ([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], ': 2.weight is only in it;'),
])
def test_a_checkpoint_of_another_model_says_the_first_difference(saved, said):
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).load_state_dict(nn.Sequential(*saved).state_dict())
    assert fault_of_state(caught.value) == (
        f'the checkpoint is of another model{said} use the config that it was trained with')


def test_a_compiled_model_is_told_of_by_the_names_of_its_parameters():
    with pytest.raises(RuntimeError) as caught:
        torch.compile(nn.Linear(3, 4)).load_state_dict(torch.compile(nn.Linear(2, 4)).state_dict())
    assert ': weight is [4, 2] in it, not [4, 3];' in fault_of_state(caught.value)


def test_an_optimizer_of_another_model():
    parameters = list(nn.Linear(3, 4).parameters())
    with pytest.raises(ValueError) as caught:
        torch.optim.Adam(parameters).load_state_dict(torch.optim.Adam(parameters[:1]).state_dict())
    assert fault_of_state(caught.value) == (
        'the checkpoint is of another model; use the config that it was trained with')

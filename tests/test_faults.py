"""Trainings that are interrupted or killed at any moment, and weights that turn to nan in the middle of one."""
import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from builders import Worker, audit, make_policy, roots
from forks import DIED
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from trainings import import_what_trainings_import, short_episodes, summary_of, trained, when

from lzero_kvcache.cache.base import CURRENT
from lzero_kvcache.host import policies
from lzero_kvcache.training.checkpoints import read_checkpoint

SMALL = ['--threads', '1', '--device', 'cpu', '--config', 'config_new', '--exp-name', 'run', '--set',
         'policy.num_simulations=3', 'policy.batch_size=8', 'env.collector_env_num=2', 'env.evaluator_env_num=1',
         'policy.eval_freq=10', 'policy.learn.learner.hook.save_ckpt_after_iter=5']


def in_a_fork(folder, *arguments, prepare=short_episodes):
    """The exit code of a training, or that it died, and what it printed."""
    import_what_trainings_import()
    (code, said), = trained(folder, [*SMALL, *arguments], prepare)
    return code, said


def checkpoints(folder):
    path = folder / 'run' / 'ckpt'
    return [name for name in os.listdir(str(path)) if name.endswith('.pth.tar')] if path.is_dir() else []


def events(folder):
    """Every event that can be read; a record that a kill has cut off ends the file."""
    serial = folder / 'run' / 'log' / 'serial'
    return [
        event for name in os.listdir(str(serial)) for event in EventFileLoader(str(serial / name)).Load()
        if event.HasField('summary')
    ]


def assert_whole(folder):
    """All that is on the disk can be read; the last iterations of the checkpoints and of the event files."""
    saved = [read_checkpoint(str(folder / 'run' / 'ckpt' / name)) for name in checkpoints(folder)]
    assert saved
    for checkpoint in saved:
        assert all(torch.isfinite(value).all() for value in checkpoint.state['model'].values())
    points = events(folder)
    assert points
    return max(checkpoint.train_iter for checkpoint in saved), max(event.step for event in points)


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_at_any_moment(signum, tmp_path):
    """After the first checkpoint of the training itself; the signal goes to the processes of environments as well."""
    moment = random.SystemRandom().uniform(0, 3)

    def prepare():
        short_episodes()
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = open('errors', 'w', buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        when(lambda: any(name.startswith('iteration_') for name in checkpoints(tmp_path)),
             lambda: (time.sleep(moment), os.killpg(os.getpid(), signum)))

    code, said = in_a_fork(tmp_path, prepare=prepare)
    iteration, _ = assert_whole(tmp_path)
    if signum == signal.SIGKILL:
        assert code == DIED, said
        assert not (tmp_path / 'run' / 'summary.json').exists()
        return
    errors = (tmp_path / 'errors').read_text()
    assert code == 128 + signum, errors
    assert errors == ''
    summary = summary_of(tmp_path / 'run')
    assert summary['outcome'] == f'interrupted by {signal.Signals(signum).name}'
    assert summary['train_iter'] == iteration
    assert not [name for name in os.listdir(str(tmp_path / 'run' / 'ckpt')) if name.endswith('.tmp')]


@pytest.mark.slow
def test_killed_while_saving_and_gone_on(tmp_path):
    """The kill comes in the middle of a save; a second run goes on from what is there."""

    def prepare():
        short_episodes()
        os.setsid()
        save, saves = torch.save, []

        def killed(data, file):
            saves.append(0)
            save(data, file)
            if len(saves) > 3:
                file.truncate(file.tell() // 2)
                file.flush()
                os.killpg(os.getpid(), signal.SIGKILL)

        torch.save = killed

    code, said = in_a_fork(tmp_path, prepare=prepare)
    assert code == DIED, said
    assert [name for name in os.listdir(str(tmp_path / 'run' / 'ckpt')) if name.endswith('.tmp')]
    iteration, _ = assert_whole(tmp_path)
    checkpoint = tmp_path / 'run' / 'ckpt' / f'iteration_{iteration}.pth.tar'
    code, said = in_a_fork(tmp_path, '--resume', str(checkpoint), '--max-train-iter', str(iteration + 1))
    assert code == 0, said


# ---------------------------------------------------------------------------------------------------- nan


def poison(policy):
    """Weights that turn to nan between two searches, as after an update that diverged."""
    policy._model.world_model.weights_changed('test')
    with torch.no_grad():
        policy._model.world_model.transformer.blocks[0].attn.value.weight.fill_(float('nan'))


def blind(worker, env_id=1):
    """From now on an environment's observations are nan."""
    observe = worker._observe
    worker._observe = lambda each: observe(each) * (float('nan') if each == env_id else 1)


def test_nan_in_the_weights_is_an_error_that_says_where():
    policy = make_policy(True)
    worker = Worker(policy)
    for _ in range(3):
        worker.step([0, 1, 2])
    poison(policy)
    with pytest.raises(FloatingPointError) as caught:
        worker.step([0, 1, 2])
    message = str(caught.value)
    assert 'in collect, environment 0, step 3:' in message
    assert "on_nan='skip'" in message
    audit(policy._model.world_model.kv_cache_manager)


def test_nan_in_one_environment_names_it_and_leaves_the_others(lines):
    policy = make_policy(True, kv_cache_cfg=dict(on_nan='skip'))
    worker = Worker(policy)
    worker.step([0, 1, 2])
    blind(worker)
    manager = policy._model.world_model.kv_cache_manager
    output = worker.step([0, 1, 2])
    assert sorted(output) == [0, 1, 2]
    assert roots(manager) == [1, 0, 1]
    assert manager.counters()['skipped'] > 0
    warnings = [message for level, message in lines() if level == 'WARNING']
    assert len(warnings) == 1
    assert 'environment 1, step 1' in warnings[0]
    audit(manager)


def test_a_root_that_is_skipped_leaves_what_was_stored_by_key():
    """By hand, for the same environment."""
    policy = make_policy(True, kv_cache_cfg=dict(on_nan='skip'))
    worker = Worker(policy)
    worker.step([0, 1, 2])
    manager = policy._model.world_model.kv_cache_manager
    rows = manager.find_init('collect', [1], [CURRENT])
    manager.store_init('collect', [1], ['mine'], rows)
    blind(worker)
    worker.step([0, 1, 2])
    assert [manager.find_init('collect', [1], [key])[1].tolist() for key in (CURRENT, 'mine')] == [[0], [1]]
    audit(manager)


def test_a_search_by_key_gets_zeros_for_what_is_skipped():
    policy = make_policy(True, kv_cache_cfg=dict(on_nan='skip'))
    Worker(policy).step([0, 1, 2])
    world_model = policy._model.world_model
    with torch.no_grad():
        for parameter in world_model.head_rewards.parameters():
            parameter.fill_(float('nan'))
    latent = np.random.default_rng(0).random((3, 1, world_model.embed_dim), dtype=np.float32)
    output = policy._model.recurrent_inference([(latent, torch.zeros(3, dtype=torch.long))], 0, [0] * 3, [0] * 3)
    assert not output.reward.any()
    assert output.value.isfinite().all() and output.value.any()
    assert len(world_model.kv_cache_manager.recur_pool) == 0


def test_after_a_root_that_was_skipped_its_environment_starts_afresh():
    """Its observation was nan, which is no context for the next one."""
    fresh, skipped = (Worker(make_policy(True, kv_cache_cfg=dict(on_nan='skip'))) for _ in range(2))
    fresh.step([0, 2])
    skipped.step([0, 1, 2])
    blind(skipped)
    skipped.step([0, 1, 2])
    values = []
    for worker in (fresh, skipped):
        worker._observe = lambda env_id: np.full(4, 0.1 * (env_id + 1), dtype=np.float32)
        values.append(worker.step([0, 1, 2])[1]['predicted_value'])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_values_that_overflow_float16_are_told_from_weights_that_diverged(dtype):
    policy = make_policy(True, kv_cache_cfg=dict(dtype=dtype))
    attn = policy._model.world_model.transformer.blocks[0].attn
    with torch.no_grad():  # large values, and back to what they were
        attn.value.weight.mul_(1e6)
        attn.value.bias.mul_(1e6)
        attn.proj.weight.mul_(1e-6)
    worker = Worker(policy)
    if dtype == 'float16':
        with pytest.raises(FloatingPointError, match="or keys and values overflow .*'float16' .'bfloat16' holds them"):
            worker.step([0, 1, 2])
    else:
        worker.step([0, 1, 2])


@pytest.mark.parametrize('on_nan', ['raise', 'skip'])
def test_keys_and_values_with_nan_are_not_stored(on_nan):
    """A sound encoder before an attention that has diverged: the latent states tell nothing of it."""
    policy = make_policy(True, kv_cache_cfg=dict(on_nan=on_nan))
    worker = Worker(policy)
    worker.step([0, 1, 2])
    manager = policy._model.world_model.kv_cache_manager
    weight = policy._model.world_model.transformer.blocks[0].attn.value.weight
    sound = weight.detach().clone()
    weight.data.fill_(float('nan'))
    if on_nan == 'raise':
        with pytest.raises(FloatingPointError, match='value or policy .* environment 0, step 1'):
            worker.step([0, 1, 2])
        return
    skipped = manager.counters()['skipped']
    output = worker.step([0, 1, 2])
    assert all(np.isfinite(row['searched_value']) for row in output.values())
    assert roots(manager) == [0, 0, 0]
    assert manager.counters()['skipped'] >= skipped + 3
    weight.data.copy_(sound)
    skipped = manager.counters()['skipped']
    for _ in range(2):
        worker.step([0, 1, 2])
    assert manager.counters()['skipped'] == skipped
    assert roots(manager) == [1, 1, 1]
    audit(manager)


def poisoned_for_a_while():
    """Weights are not finite for some collect steps, and well again before LightZero trains with them."""
    short_episodes()
    forward, steps = policies.UniZeroPolicy._forward_collect, []

    def forward_and_poison(policy, *args, **kwargs):
        steps.append(0)
        weight = policy._model.world_model.transformer.blocks[0].attn.value.weight
        well = weight.detach().clone()
        if 30 <= len(steps) < 40:
            with torch.no_grad():
                weight.fill_(float('nan'))
        output = forward(policy, *args, **kwargs)
        with torch.no_grad():
            weight.copy_(well)
        return output

    policies.UniZeroPolicy._forward_collect = forward_and_poison


@pytest.mark.slow
def test_skipping_through_train(tmp_path):
    skip = 'policy.model.world_model_cfg.kv_cache_cfg.on_nan=skip'
    code, said = in_a_fork(tmp_path, '--max-env-step', '200', '--set', skip, prepare=poisoned_for_a_while)
    assert code == 0, said
    warnings = [line for line in said.splitlines() if 'nan or inf' in line and 'WARNING' in line]
    assert len(warnings) == 1
    assert 'in collect, environment' in warnings[0]
    # Counted, and shown in the table, in the summary and in tensorboard.
    summary = summary_of(tmp_path / 'run')
    skipped = summary['counters']['skipped']
    assert skipped >= 10
    assert re.search(rf'skipped for nan or inf\s+│ {skipped:,} rows', said)
    points = {event.step: value.simple_value or value.tensor.float_val[0] for event in events(tmp_path)
              for value in event.summary.value if value.tag == 'kv_cache_iter/skipped' and event.step > 0}
    assert points[max(points)] == skipped
    iteration, _ = assert_whole(tmp_path)
    assert iteration == summary['train_iter'] > 0

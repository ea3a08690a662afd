"""Lock files: who holds one, who is told of, what dies with its process, and file systems that have no locks."""
import errno
import fcntl
import logging
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from forks import environment
from trainings import PROJECT_ROOT

from lzero_kvcache import ConfigError, lock_files
from lzero_kvcache.lock_files import check_not_trained_in, held, tell_holders, training_in

# Holds a folder, and has a worker that outlives it, as an environment that hangs does.
HOLDER = """
import multiprocessing, os, sys, time
from lzero_kvcache.lock_files import training_in
with training_in('.', '.'):
    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600, ))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(600)
"""


def test_it_is_free_again_when_the_training_ends_however_it_ends(tmp_path):
    for _ in range(2):
        with training_in(str(tmp_path), 'a'):
            with pytest.raises(ConfigError, match=f'^a is being trained by process {os.getpid()}; wait for it'):
                check_not_trained_in(str(tmp_path), 'a')
            with pytest.raises(ConfigError, match='^a is being trained'), training_in(str(tmp_path), 'a'):
                pass
        check_not_trained_in(str(tmp_path), 'a')
    with pytest.raises(KeyError), training_in(str(tmp_path), 'a'):
        {}['a failure']
    check_not_trained_in(str(tmp_path), 'a')


def test_nothing_is_written_by_looking(tmp_path):
    check_not_trained_in(str(tmp_path), 'a')
    check_not_trained_in(str(tmp_path / 'none'), 'a')
    assert os.listdir(tmp_path) == []


def test_who_only_looks_keeps_no_training_from_beginning(tmp_path):
    with training_in(str(tmp_path), 'a'):
        pass
    looking = open(tmp_path / 'train.lock')
    fcntl.flock(looking, fcntl.LOCK_SH)
    done = threading.Timer(0.1, looking.close)
    done.start()
    with training_in(str(tmp_path), 'a'):
        done.join()


def test_the_folder_of_a_killed_training_is_free_even_if_its_environments_live_on(tmp_path):
    process = subprocess.Popen([sys.executable, '-c', HOLDER], cwd=str(tmp_path), stdout=subprocess.PIPE,
                               encoding='utf-8', env=environment(PROJECT_ROOT))
    worker = int(process.stdout.readline())
    try:
        time.sleep(0.5)  # the worker forgets the file as it begins
        with pytest.raises(ConfigError, match=f'process {process.pid};'):
            check_not_trained_in(str(tmp_path), 'a')
        process.kill()
        process.wait()
        os.kill(worker, 0)
        check_not_trained_in(str(tmp_path), 'a')
        with training_in(str(tmp_path), 'a'):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_end_of_an_environment_frees_nothing(tmp_path):
    with training_in(str(tmp_path), 'a'):
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(0, ))
        worker.start()
        worker.join()
        with pytest.raises(ConfigError, match='is being trained'):
            check_not_trained_in(str(tmp_path), 'a')


@pytest.mark.parametrize(('written', 'said'), [
    ('{here} {this}', 'process {this}'), ('{here} {this} {above} {none}', 'processes {this}, {above}'),
    ('elsewhere 12 13', 'processes 12, 13 on elsewhere'), ('{here} {none}', 'another process'), ('', 'another process'),
])
def test_who_is_told_of(written, said, tmp_path):
    """The processes that still run, as far as can be seen from here."""
    known = dict(here=socket.gethostname(), this=os.getpid(), above=os.getppid(), none=999999999)
    path = tmp_path / 'lock'
    with held(str(path), ''):
        path.write_text(written.format(**known))
        with pytest.raises(ConfigError) as caught, held(str(path), 'by {who}.'):
            pass
    assert str(caught.value) == f'by {said}.'.format(**known)


def test_a_folder_may_have_braces_in_its_name(tmp_path):
    folder = str(tmp_path / 'run{x}')
    os.mkdir(folder)
    with training_in(folder, folder), pytest.raises(ConfigError, match=rf'run{{x}} is being .* {os.getpid()};'):
        check_not_trained_in(folder, folder)


def test_holders_replace_each_other(tmp_path):
    with held(str(tmp_path / 'lock'), '') as file:
        for processes in ([1, 2, 3], [4]):
            tell_holders(file, processes)
            held_by = (tmp_path / 'lock').read_text().split()
            assert held_by == [socket.gethostname(), *map(str, processes)]


def test_a_file_system_without_locks_is_told_of_and_trained_on(tmp_path, monkeypatch, caplog):

    def flock(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', flock)
    caplog.set_level(logging.WARNING, lock_files.__name__)
    check_not_trained_in(str(tmp_path), 'a')
    with training_in(str(tmp_path), 'a'):
        check_not_trained_in(str(tmp_path), 'a')
    assert [record.getMessage() for record in caplog.records] == [
        f'{tmp_path} cannot be locked (No locks available): see to it that nothing else writes there']


def test_on_a_full_disk_it_is_held_and_nobody_is_told_of(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with training_in(str(tmp_path), 'a'):
            assert os.path.getsize(tmp_path / 'train.lock') == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'train.lock').mkdir()
    with pytest.raises(ConfigError, match='train.lock cannot be written'), training_in(str(tmp_path), 'a'):
        pass

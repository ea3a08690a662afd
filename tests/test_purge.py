"""Event files are cut off at the checkpoint from which a training goes on."""
import pytest
from event_runs import BEGAN, write_events
from torch.utils.tensorboard import SummaryWriter
from trainings import events_in

from lzero_kvcache.run_files import purge
from lzero_kvcache.run_hooks import read_events
from lzero_kvcache.summary import Evaluation


def cut(folder, train_iter, env_step, evaluated=True):
    return purge(str(folder), train_iter, env_step, evaluated, lambda path, event: None)


def test_points_after_the_checkpoint_are_cut_off(tmp_path):
    """Tags of both kinds of steps, in several files, one of which is torn."""
    def write(steps, suffix):
        writer = SummaryWriter(str(tmp_path), filename_suffix=suffix)
        for step in steps:
            for tag, at in (('learner_iter/loss', step), ('kv_cache_step/hits', 30 * step)):
                writer.add_scalar(tag, step, at)
        writer.close()

    write(range(3), '.0')
    write(range(3, 9), '.1')
    torn = max(tmp_path.iterdir(), key=lambda path: path.name[-1])
    torn.write_bytes(torn.read_bytes()[:-5])
    assert cut(tmp_path, 5, 150) == 2 * 4 - 1
    write(range(5, 7), '.2')
    events = events_in(tmp_path)
    assert [point.step for point in events.Scalars('learner_iter/loss')] == list(range(7))
    assert [point.step for point in events.Scalars('kv_cache_step/hits')] == [30 * step for step in range(7)]
    assert cut(tmp_path / 'none', 5, 150) == 0


@pytest.mark.parametrize(('env_step', 'evaluated', 'evaluations', 'collections'), [
    (45, False, [4], [4]), (45, True, [4, 5], [4]), (49, False, [4, 5], [4]), (50, False, [4, 5], [4, 5]),
    (50, True, [4, 5], [4, 5])])
def test_what_the_checkpoint_comes_after_is_not_cut_off(env_step, evaluated, evaluations, collections, tmp_path):
    """A collection whose steps it counts, and an evaluation before that, which is not made again. Of an evaluation of
    the same steps, somebody must know that it came before."""
    written = dict(evaluator=5, collector=0, learner=0)
    writer = SummaryWriter(str(tmp_path))
    for step in range(4, 7):
        for name, before in written.items():
            for what in ('of', 'more'):
                writer.add_scalar(f'{name}_iter/{what}', step, step)
                writer.add_scalar(f'{name}_step/{what}', step, 10 * step - before)
    writer.close()
    left = dict(evaluator=evaluations, collector=collections, learner=[4])
    assert cut(tmp_path, 5, env_step, evaluated) == 4 * (9 - sum(map(len, left.values())))
    events = events_in(tmp_path)
    for name, steps in left.items():
        for what in ('of', 'more'):
            assert [point.step for point in events.Scalars(f'{name}_iter/{what}')] == steps
            assert [point.step for point in events.Scalars(f'{name}_step/{what}')] == [
                10 * step - written[name] for step in steps]


def test_an_evaluation_that_stands_in_several_files_is_kept_once(tmp_path):
    for number in range(3):
        write_events(tmp_path, [(0, at, f'evaluator_{axis}/reward_mean', 1.)
                                for axis, at in (('iter', 5), ('step', 50))], BEGAN + number)
    assert cut(tmp_path, 5, 50) == 4
    assert read_events(str(tmp_path)).evaluations == [Evaluation(50, 5, 1.)]


@pytest.mark.parametrize('torn', [3, 9, 30])
def test_a_torn_record_is_cut_off_where_nothing_follows_the_checkpoint(torn, tmp_path):
    """Or else the run would count as damaged for good."""
    path = write_events(tmp_path, [(0, 4, 'learner_iter/loss', 1.)])
    whole = path.read_bytes()
    write_events(tmp_path, [(0, 4, 'learner_iter/loss', 1.), (0, 5, 'learner_iter/loss', 1.)])
    path.write_bytes(path.read_bytes()[:len(whole) + torn])
    assert cut(tmp_path, 5, 50) == 0
    assert path.read_bytes() == whole


def test_nothing_but_what_is_torn_of_an_event_file_is_cut_off(tmp_path):
    """Neither a file of another kind nor what comes after a damaged record."""
    path = write_events(tmp_path, [(0, step, 'learner_iter/loss', 1.) for step in range(4)])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xff
    path.write_bytes(damaged)
    (tmp_path / 'notes.txt').write_text('mine')
    assert cut(tmp_path, 5, 50) == 0
    assert path.read_bytes() == damaged and (tmp_path / 'notes.txt').read_text() == 'mine'


def test_a_collection_of_which_one_point_was_written_is_cut_off(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar('collector_step/of', 1, 40)
    writer.add_scalar('collector_iter/of', 1, 5)
    writer.close()
    assert cut(tmp_path, 5, 50) == 1

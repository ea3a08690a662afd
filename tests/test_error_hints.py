"""Errors that a user can mend with one command say which."""
import pytest
from trainings import SMALL as IN_A_FORK
from trainings import short_episodes, trained

from lzero_kvcache.training.error_hints import hint


@pytest.mark.parametrize(('error', 'command'), [
    (ModuleNotFoundError("No module named 'cv2'", name='cv2'), "pip install 'opencv-python-headless<4.11'"),
    (ModuleNotFoundError("No module named 'Box2D.b2'", name='Box2D.b2'), 'pip install Box2D==2.3.10'),
    (ModuleNotFoundError("No module named 'xyz'", name='xyz'), "'xyz': put its folder on PYTHONPATH"),
    (AttributeError("module 'collections' has no attribute 'Mapping'"), 'pycolab 1.2 is older than Python 3.10'),
    (Exception('We\'re Unable to find the game "Pong". Note: Gym no longer distributes ROMs.'), 'ale-import-roms'),
])
def test_what_is_missing_comes_with_the_command_that_installs_it(error, command):
    assert command in hint(error)


def test_other_errors_are_not_explained_away():
    assert hint(ValueError('the ROM of my heart')) is None


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['old', 'new'])
def test_segments_that_are_too_short_for_their_targets(cache, tmp_path):
    arguments = ['policy.game_segment_length=3', '--config', 'config_new', '--cache', cache]
    (code, said), = trained(tmp_path, [*IN_A_FORK, *arguments], short_episodes)
    assert code == 2 and said.endswith(
        'error: policy.game_segment_length=3 is too short, since an episode had more than twice as many steps: it must '
        'be at least policy.num_unroll_steps + policy.td_steps=10\n'), said

"""The benchmarks, as far as they say what their user must change."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'arguments', 'said'), [
    ('collect_step', '--config nothing_like_it', '--config nothing_like_it: there is no such file'),
    ('training_time', '--config nothing_like_it', '--config nothing_like_it: there is no such file'),  # in its worker
    ('matmul_agreement', '', '--device cpu: a CPU multiplies in float32 alone; use cuda'),
    pytest.param('recurrent_step', '--device cuda', 'argument --device: torch finds no GPU here; use cpu',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')),
])
def test_what_is_wrong_is_told_in_one_line(name, arguments, said, tmp_path):
    ended = subprocess.run([sys.executable, str(BENCHMARKS / f'{name}.py'), *arguments.split()], cwd=str(tmp_path),
                           stderr=subprocess.PIPE, encoding='utf-8')
    [line] = [line for line in ended.stderr.splitlines() if 'error: ' in line]
    assert ended.returncode == 2 and 'Traceback' not in ended.stderr
    assert said in line

"""The wheel: it holds configs and zoo, and trains from an empty folder."""
import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import lzero
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_trains_from_an_empty_folder(tmp_path):
    sources = tmp_path / 'sources'
    sources.mkdir()
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'lzero_kvcache_options.py', 'lzero_kvcache', 'configs',
                 'zoo_configs'):
        (sources / name).symlink_to(ROOT / name)
    build = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--wheel-dir', str(tmp_path), str(sources)]
    subprocess.run(build, check=True, timeout=300)
    [wheel] = tmp_path.glob('*.whl')
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith('.py')}
    for folder in ('configs', 'zoo_configs'):
        assert {f'lzero_kvcache/{folder}/{path.name}' for path in (ROOT / folder).glob('*.py')} <= held
    # A fresh environment: this one may have the sources in place. What LightZero needs is where this one has it.
    venv.create(tmp_path / 'environment', with_pip=False)
    python = tmp_path / 'environment' / 'bin' / 'python'
    [site] = (tmp_path / 'environment' / 'lib').glob('python3*/site-packages')
    # Without --ignore-installed pip would uninstall the package from the environment that runs the tests.
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--no-deps', '--ignore-installed', '--prefix',
                    str(tmp_path / 'environment'), str(wheel)], check=True, timeout=300)
    assert metadata.version('lzero_kvcache')
    (site / 'others.pth').write_text('\n'.join(str(Path(other.__file__).parent.parent) for other in (lzero, torch)))
    empty = tmp_path / 'empty'
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    environment.update(OMP_NUM_THREADS='1')

    def command(*arguments):
        program = tmp_path / 'environment' / 'bin' / 'lzero-kvcache'
        return subprocess.run([str(python), str(program), *arguments], cwd=str(empty), env=environment, timeout=500,
                              capture_output=True, text=True, check=False)

    trained = command('train', '--config', 'cartpole_unizero_config', '--exp-name', 'run', '--max-env-step', '30',
                      '--threads', '1', '--device', 'cpu', '--set', 'create_config.env_manager.type=base',
                      'policy.num_simulations=2', 'policy.batch_size=4')
    assert trained.returncode == 0, trained.stderr
    used = site / 'lzero_kvcache' / 'zoo_configs' / 'cartpole_unizero_config.py'
    assert trained.stdout.splitlines()[0] == f'Config: {used}'
    assert json.loads((empty / 'run' / 'summary.json').read_text())['cache'] == 'new'
    assert command('compare', 'run').returncode == 0
    listed = command('zoo').stdout
    assert '│ memory_unizero_config ' in listed
    assert '│ lightzero:cartpole_unizero_config ' in listed

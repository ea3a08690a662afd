"""Installs lzero_kvcache: ``pip install -e .``; extras have what environments (``zoo``) and tests (``test``) need."""
import re
import sys

# The interpreters that LightZero 0.2.0 has wheels for. Nothing in this file may need a newer one to be parsed.
if not (3, 8) <= sys.version_info[:2] <= (3, 11):
    sys.exit('lzero_kvcache needs Python 3.8 to 3.11, as LightZero does; this is ' + sys.version.split()[0])

from pathlib import Path

from setuptools import find_packages, setup

# gymnasium[atari], which LightZero needs, brings ale-py 0.8.1. The ROM files are the user's to add.
ATARI = ['opencv-python-headless<4.11']
# Of box2d-py, which gymnasium's own extra asks for, there are no wheels; gymnasium imports pygame along with it.
BOX2D = ['Box2D==2.3.10', 'pygame>=2.1.3']
MEMORY = ['pycolab==1.2', 'six']
ZOO = ATARI + BOX2D + MEMORY
CONFIGS = {f'lzero_kvcache.{folder}': folder for folder in ('configs', 'zoo_configs')}

HERE = Path(__file__).resolve().parent
README = HERE / 'README.md'


def version():
    """What the package calls itself, read without importing it (and torch)."""
    source = (HERE / 'lzero_kvcache' / '__init__.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'$", source, re.MULTILINE).group(1)


setup(
    name='lzero_kvcache',
    version=version(),
    description="A paged key-value cache for LightZero's UniZero, picked by one flag.",
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Operating System :: MacOS',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.8',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    # Configs and zoo stand at the top level of the repository, and inside of the package in a wheel.
    packages=[*find_packages(include=['lzero_kvcache', 'lzero_kvcache.*']), *CONFIGS],
    package_dir=CONFIGS,
    py_modules=['lzero_kvcache_options'],
    package_data={'lzero_kvcache': ['py.typed', 'comparison/page.html']},
    entry_points={'console_scripts': ['lzero-kvcache = lzero_kvcache_options:main']},
    zip_safe=False,
    python_requires='>=3.8,<3.12',
    install_requires=[
        # torch 2.13 needs setuptools>=77, DI-engine setuptools<=66.1.1: unbounded, pip downloads several torch wheels
        # of 500 MB each before it finds one that fits.
        'torch>=2.1,<2.13',
        'DI-engine>=0.5.3',
        'LightZero>=0.2.0',
        'numpy<2',
        # Compiles searches on the CPU. 0.58 is the last that Python 3.8 can install.
        'numba>=0.58',
        # DI-engine needs wandb<=0.19.0, which needs protobuf<6; tensorboard 2.21 needs protobuf>=6. Unbounded, pip goes
        # back to a wandb of 2022 that cannot be imported.
        'tensorboard<2.21',
        'protobuf<6',
        'tensorboardX>=2.6',
        'easydict',
        'xxhash>=2',
        'matplotlib>=3.6',
        'rich>=12.2',
        'scipy',
    ],
    extras_require={
        'atari': ATARI,
        'box2d': BOX2D,
        'docs': ['mkdocs>=1.6,<2', 'mkdocstrings[python]'],
        'memory': MEMORY,
        'zoo': ZOO,
        'test': ZOO + ['pytest>=8', 'pytest-timeout', 'pytest-xdist>=3.2', 'hypothesis', 'ruff', 'mypy'],
    },
)

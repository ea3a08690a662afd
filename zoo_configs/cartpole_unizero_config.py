"""
CartPole, discrete actions, UniZero: LightZero's cartpole_unizero_config.py with the new KV cache.

Install:  pip install -e .
Cost:     200,000 environment steps; solved (reward 200) after some 10,000. About 25 steps/s on two CPU cores.
Entry:    train_unizero
Run:      python train.py --config cartpole_unizero_config.py [--cache old]
"""
from zoo.classic_control.cartpole.config.cartpole_unizero_config import create_config, main_config, max_env_step  # noqa: F401

from lzero_kvcache import enable

entry = 'train_unizero'
seed = 0

enable(main_config, create_config)

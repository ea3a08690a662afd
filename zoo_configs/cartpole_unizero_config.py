"""
CartPole, discrete actions, UniZero: LightZero's cartpole_unizero_config.py with the new KV cache.

Install:  pip install -e .
Cost:     up to 200,000 environment steps, in batches of 256. configs/config_new.py is this training for a laptop;
          here, --threads 1 helps where cores are shared.
Entry:    train_unizero
Run:      python train.py --config cartpole_unizero_config.py [--cache old]
"""
import copy

from zoo.classic_control.cartpole.config import cartpole_unizero_config as lightzero

from lzero_kvcache import enable

entry = 'train_unizero'
seed = 0
max_env_step = lightzero.max_env_step

main_config, create_config = copy.deepcopy(lightzero.main_config), copy.deepcopy(lightzero.create_config)
enable(main_config, create_config)

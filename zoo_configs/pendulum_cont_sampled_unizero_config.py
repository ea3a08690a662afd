"""
Pendulum, continuous torque, Sampled UniZero: LightZero's pendulum_cont_sampled_unizero_config.py with the new KV cache.

Install:  pip install -e .
Cost:     up to 500,000 environment steps, in batches of 64, for a GPU. On a CPU shrink it, to about 85 s (new) or 125
          s (old) on one core:
          --max-env-step 2000 --set policy.batch_size=32 policy.model.world_model_cfg.embed_dim=64
Entry:    train_unizero
Run:      python train.py --config pendulum_cont_sampled_unizero_config.py [--cache old]
"""
import copy

from zoo.classic_control.pendulum.config import pendulum_cont_sampled_unizero_config as lightzero

from lzero_kvcache import enable

entry = 'train_unizero'
seed = 0
max_env_step = lightzero.max_env_step

main_config, create_config = copy.deepcopy(lightzero.main_config), copy.deepcopy(lightzero.create_config)
enable(main_config, create_config)

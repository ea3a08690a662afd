"""
Memory, visual match (see a colour, wait 60 steps, choose it), UniZero with contexts of 162 tokens: LightZero's
memory_unizero_config.py with the new KV cache.

Install:  pip install -e ".[memory]"
Cost:     up to 1,000,000 environment steps, whole episodes in batches of 64, for a GPU. On a CPU shrink it, to about
          35 s (new) or 60 s (old) on one core:
          --max-env-step 2000 --set policy.batch_size=8 policy.update_per_collect=5 policy.num_simulations=10
          policy.model.world_model_cfg.embed_dim=64
Entry:    train_unizero
Run:      python train.py --config memory_unizero_config.py [--cache old]
"""
import copy

import _pycolab  # noqa: F401  (mends the environment's library)
from zoo.memory.config import memory_unizero_config as lightzero

from lzero_kvcache import enable

entry = 'train_unizero'
seed = 0
max_env_step = lightzero.max_env_step

main_config, create_config = copy.deepcopy(lightzero.main_config), copy.deepcopy(lightzero.create_config)
enable(main_config, create_config)

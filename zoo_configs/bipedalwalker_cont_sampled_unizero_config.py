"""
BipedalWalker, four continuous joints, Sampled UniZero: LightZero's bipedalwalker_cont_sampled_unizero_config.py
with the new KV cache.

Install:  pip install -e ".[box2d]"
Cost:     up to 1,000,000 environment steps, in batches of 64, for a GPU. On a CPU shrink it, to about 40 s (new) or
          65 s (old) on one core:
          --max-env-step 1000 --set policy.batch_size=32 policy.num_simulations=10 policy.update_per_collect=100
          policy.model.world_model_cfg.embed_dim=64 env.collector_env_num=2 env.evaluator_env_num=1
Entry:    train_unizero
Run:      python train.py --config bipedalwalker_cont_sampled_unizero_config.py [--cache old]
"""
import copy

from zoo.box2d.bipedalwalker.config import bipedalwalker_cont_sampled_unizero_config as lightzero

from lzero_kvcache import enable

entry = 'train_unizero'
seed = 0
max_env_step = lightzero.max_env_step

main_config, create_config = copy.deepcopy(lightzero.main_config), copy.deepcopy(lightzero.create_config)
enable(main_config, create_config)

"""
CartPole with UniZero and the NEW KV cache: config_old.py with the flag on, and nothing else.

    python train.py --config config_new.py
"""
from config_old import create_config, entry, main_config, max_env_step, seed, threads  # noqa: F401

main_config.exp_name = 'data_unizero/cartpole_new_seed0'
main_config.policy.model.world_model_cfg.use_new_cache_manager = True

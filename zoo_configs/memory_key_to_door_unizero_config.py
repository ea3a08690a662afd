"""
Memory, key to door (fetch a key, wait 60 steps, open the door), UniZero with contexts of 190 tokens: LightZero's
memory_unizero_config.py, with the values that its comments give for this game and the new KV cache.

Install:  pip install -e ".[memory]"
Cost:     up to 1,000,000 environment steps, whole episodes in batches of 64, for a GPU. On a CPU shrink it, to about
          35 s (new) or 65 s (old) on one core:
          --max-env-step 2000 --set policy.batch_size=8 policy.update_per_collect=5 policy.num_simulations=10
          policy.model.world_model_cfg.embed_dim=64
Entry:    train_unizero
Run:      python train.py --config memory_key_to_door_unizero_config.py [--cache old]
"""
from memory_unizero_config import create_config, entry, lightzero, main_config, max_env_step, seed  # noqa: F401

_steps = 30 + lightzero.memory_length
_blocks = _steps + 5
main_config.env.env_id = 'key_to_door'
main_config.env.max_frames.explore = 15
main_config.policy.update(num_unroll_steps=_steps, game_segment_length=_steps, td_steps=_steps)
main_config.policy.model.world_model_cfg.update(max_blocks=_blocks, max_tokens=2 * _blocks, context_length=2 * _blocks)

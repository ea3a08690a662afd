"""
Atari Pong, UniZero with segment collection and buffer reanalysis: LightZero's atari_unizero_segment_config.py with the
new KV cache.

Games:    --set env.env_id=BreakoutNoFrameskip-v4 (experiment name and number of actions follow), for the 26 games in
          LightZero's atari_env_action_space_map; for any other, policy.model.action_space_size=N as well.
Install:  pip install -e ".[atari]", and the games' ROM files once:
          pip install --target atari_roms --no-deps ale-py==0.10.1 && ale-import-roms atari_roms/ale_py/roms
Cost:     500,000 environment steps, on a GPU. On a CPU shrink it, to about 90 s on one core:
          --max-env-step 400 --set policy.model.world_model_cfg.embed_dim=64 policy.num_simulations=8
          policy.batch_size=8
Entry:    train_unizero_segment
Run:      python train.py --config atari_unizero_segment_config.py [--cache old]
"""
from zoo.atari.config.atari_unizero_segment_config import main

from lzero_kvcache import enable
from lzero_kvcache.training import capture_entry_call

# LightZero builds this config inside main(), which ends in a training: the call is caught, and nothing is trained.
_call = capture_entry_call(main, env_id='PongNoFrameskip-v4', seed=0)
main_config, create_config = _call['main_config'], _call['create_config']
entry, seed, max_env_step = _call['entry'], _call['seed'], _call['max_env_step']

enable(main_config, create_config)

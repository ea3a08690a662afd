"""
Atari Pong from four stacked grey frames, UniZero, collected by episodes: LightZero's atari_unizero_stack4_config.py
with the new KV cache.

Games:    --set env.env_id=BreakoutNoFrameskip-v4 (experiment name and number of actions follow), for the 26 games in
          LightZero's atari_env_action_space_map; for any other, policy.model.action_space_size=N as well.
Install:  pip install -e ".[atari]", and the games' ROM files once:
          pip install --target atari_roms --no-deps ale-py==0.10.1 && ale-import-roms atari_roms/ale_py/roms
Cost:     500,000 environment steps, on a GPU. On a CPU shrink it, to about 110 s on one core:
          --max-env-step 400 --set policy.model.world_model_cfg.embed_dim=64 policy.num_simulations=8
          policy.batch_size=8 policy.train_start_after_envsteps=0 env.collect_max_episode_steps=50
          env.eval_max_episode_steps=50
Entry:    train_unizero
Run:      python train.py --config atari_unizero_stack4_config.py [--cache old]
"""
import copy
from unittest import mock

from zoo.atari.config import atari_unizero_config

from lzero_kvcache import enable
from lzero_kvcache.training import capture_entry_call

# LightZero's file imports two configs that its Atari file builds inside main(): alone, it ends in an ImportError.
_call = capture_entry_call(atari_unizero_config.main)
with mock.patch.multiple(atari_unizero_config, create=True, atari_unizero_config=_call['main_config'],
                         atari_unizero_create_config=_call['create_config']):
    from zoo.atari.config import atari_unizero_stack4_config as lightzero

entry = 'train_unizero'
seed = 0
max_env_step = lightzero.max_env_step

main_config, create_config = copy.deepcopy(lightzero.main_config), copy.deepcopy(lightzero.create_config)
enable(main_config, create_config)

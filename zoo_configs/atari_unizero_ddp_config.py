"""
Atari Pong, UniZero, collected by episodes on two GPUs: LightZero's atari_unizero_ddp_config.py with the new KV cache.

Games:    --set env.env_id=BreakoutNoFrameskip-v4 (experiment name and number of actions follow), for the 26 games in
          LightZero's atari_env_action_space_map; for any other, policy.model.action_space_size=N as well.
Install:  pip install -e ".[atari]", and the games' ROM files once:
          pip install --target atari_roms --no-deps ale-py==0.10.1 && ale-import-roms atari_roms/ale_py/roms
Cost:     200,000 environment steps, on two GPUs; --device cpu has two processes train on a CPU, shrunk as in
          atari_unizero_config.py with policy.update_per_collect=40 as well, to about 80 s on one core. One process:
          --set policy.multi_gpu=False.
Entry:    train_unizero
Run:      torchrun --nproc_per_node=2 train.py --config atari_unizero_ddp_config.py [--cache old]
"""
import copy

from zoo.atari.config import atari_unizero_ddp_config as lightzero

from lzero_kvcache import enable

entry = 'train_unizero'
seed = lightzero.seed
max_env_step = lightzero.max_env_step

main_config, create_config = copy.deepcopy(lightzero.main_config), copy.deepcopy(lightzero.create_config)
enable(main_config, create_config)

"""
CartPole with UniZero and the OLD KV cache: LightZero's own config, sized for a laptop without a GPU.

    python train.py --config config_old.py

Learns to balance the pole: within 8,000 environment steps three seeds of three reached 200, the best there is
(docs/experiment); the 5,000 of this config take some five minutes on two CPU cores. Needs nothing but this package.
config_new.py is the same training with the flag on.
"""
import copy

from zoo.classic_control.cartpole.config import cartpole_unizero_config as lightzero

entry = 'train_unizero'
max_env_step = 5000
seed = 0
# A model this small gains nothing from a second thread, and waits for it whenever the core is busy.
threads = 1

main_config = copy.deepcopy(lightzero.main_config)
create_config = copy.deepcopy(lightzero.create_config)

main_config.exp_name = 'data_unizero/cartpole_old_seed0'
main_config.policy.update(
    num_simulations=25,
    # LightZero's main branch has a number for each, of which it would evaluate with 50.
    collect_num_simulations=25,
    eval_num_simulations=25,
    batch_size=64,
    # Evaluations cost no training steps, and show how the reward grows.
    eval_freq=250,
)
main_config.policy.model.world_model_cfg.update(
    num_simulations=25,
    env_num=8,
    game_segment_length=50,
    use_new_cache_manager=False,  # the old system, which is the default
)
# With environments this small, processes of their own cost more than they save.
create_config.env_manager.type = 'base'
create_config.policy.import_names = ['lzero.policy.unizero', 'lzero_kvcache']

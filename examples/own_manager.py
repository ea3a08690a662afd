"""
A cache manager of one's own on CartPole: it knows how often each environment had lost its root context.

    python train.py --config examples/own_manager.py --max-env-step 2000
"""
import copy
from collections import Counter

from zoo.classic_control.cartpole.config import cartpole_unizero_config as lightzero

from lzero_kvcache import KV_CACHE_REGISTRY, KVCacheManager, enable


@KV_CACHE_REGISTRY.register('lost_roots', force_overwrite=True)
class LostRootsManager(KVCacheManager):

    def __init__(self, config, env_num=None, enable_stats=None):
        super().__init__(config, env_num, enable_stats)
        self.lost = Counter()

    def find_init(self, mode, env_ids, keys):
        tables, counts = super().find_init(mode, env_ids, keys)
        self.lost.update(f'{mode} {env_id}' for env_id, count in zip(env_ids, counts) if count == 0)
        return tables, counts

    def get_stats_summary(self):
        return {**super().get_stats_summary(), 'lost_roots': dict(self.lost)}


entry, seed, max_env_step = 'train_unizero', 0, lightzero.max_env_step
main_config, create_config = copy.deepcopy(lightzero.main_config), copy.deepcopy(lightzero.create_config)
main_config.exp_name = 'data_unizero/cartpole_lost_roots_seed0'
enable(main_config, create_config, type='lost_roots', eviction='lru')

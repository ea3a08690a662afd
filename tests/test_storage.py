"""What storage does when it runs out: of its limit, and of the device's memory."""
import logging

import numpy as np
import pytest
import torch
from builders import Worker, audit, make_policy

from lzero_kvcache.slab import Slab


def grown_by(policy, monkeypatch, fails):
    """Use every page up, so that the next step must grow."""
    manager = policy._model.world_model.kv_cache_manager
    if fails:
        def ensure(self, pages, device):
            if self.data is not None and pages > self.data.shape[0]:
                raise RuntimeError('CUDA out of memory. Tried to allocate 1.00 GiB')
            return whole(self, pages, device)

        whole = Slab.ensure
        monkeypatch.setattr(Slab, 'ensure', ensure)
    manager.hold(manager.take(manager._pages.free))
    return manager


@pytest.fixture
def policy():
    return make_policy(True)


def test_growth_keeps_what_is_stored(policy, monkeypatch, caplog):
    worker, reference = Worker(policy), Worker(make_policy(True))
    worker.step([0, 1, 2]), reference.step([0, 1, 2])
    manager = grown_by(policy, monkeypatch, fails=False)
    before = manager.page_capacity
    with caplog.at_level(logging.INFO, 'lzero_kvcache'):
        grown, right = worker.step([0, 1, 2]), reference.step([0, 1, 2])
    assert manager.page_capacity > before
    assert sum('Grew the page storage' in line for line in caplog.messages) == 1
    for env_id in right:
        np.testing.assert_allclose(grown[env_id]['predicted_value'], right[env_id]['predicted_value'], rtol=1e-4)


def test_out_of_memory_while_growing(policy, monkeypatch, caplog):
    worker = Worker(policy)
    for _ in range(3):
        worker.step([0, 1, 2])
    manager = grown_by(policy, monkeypatch, fails=True)
    data, capacity = manager.storage.slab.data, manager.page_capacity
    manager._lease.clear()  # what the test holds is nobody's from here on
    with caplog.at_level(logging.WARNING, 'lzero_kvcache'), pytest.raises(RuntimeError, match='max_memory_mb'):
        worker.step([0, 1, 2])
    assert manager.storage.slab.data is data and manager.page_capacity == capacity
    assert sum('Out of memory while the page storage grew' in line for line in caplog.messages) == 1


def test_half_precision_is_close(policy):
    half = make_policy(True, kv_cache_cfg=dict(dtype='bfloat16'))
    half._model.load_state_dict(policy._model.state_dict())
    workers = Worker(policy), Worker(half)
    for _ in range(4):
        right, close = (worker.step([0, 1, 2]) for worker in workers)
    assert half._model.world_model.kv_cache_manager.storage.slab.data.dtype is torch.bfloat16
    for env_id in right:
        np.testing.assert_allclose(close[env_id]['predicted_value'], right[env_id]['predicted_value'],
                                   rtol=0.1, atol=0.05)
    audit(half._model.world_model.kv_cache_manager)

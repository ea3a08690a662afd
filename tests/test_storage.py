"""What storage does when it runs out: of its limit, and of the device's memory."""
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import Worker, assert_same_outputs, audit, cache_cfg, in_threads, make_policy, roots
from oracle import Batch, play, random_trace
from small_models import Case, cached_model

from lzero_kvcache import KVCacheManager
from lzero_kvcache.cache.pages import OutOfPages, extend
from lzero_kvcache.engine import slab
from lzero_kvcache.engine.step import Engine
from lzero_kvcache.engine.store import PageStore
from lzero_kvcache.engine.weights import Geometry

OUT_OF_MEMORY = {
    'a GPU': torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 1.00 GiB'),
    'a CPU': RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried "
                          'to allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)'),
}


def allocation_fails(monkeypatch, error):
    """From here on memory has run out; how often it was asked for."""
    asked = []

    def zeros(*args, **kwargs):
        asked.append(args)
        raise error

    monkeypatch.setattr(slab, 'torch', SimpleNamespace(**{**vars(torch), 'zeros': zeros}))
    return asked


def test_a_window_takes_the_memory_of_the_last_one():
    pages, engine = slab.Slab(layers=2, heads=1, head_dim=4), Engine(Geometry(2, 1, 4, 2, 1, False, 0))
    pages.ensure(6, torch.device('cpu'))
    pages.data.copy_(torch.arange(6.).view(6, 1, 1, 1, 1, 1).expand_as(pages.data))
    with engine._room(pages, 4) as [room]:
        first = pages.read(torch.tensor([[1, 2], [3, 4]]), room)
    assert first.shape == (2, 4, 2, 2, 4)
    assert engine.windows.memory_mb == 4 * pages.page_bytes / 2 ** 20
    first.zero_()  # a step writes on its window, and the pages stay as they are
    with engine._room(pages, 2) as [room]:
        second = pages.read(torch.tensor([[5, 3]]), room)
    assert second.data_ptr() == first.data_ptr()
    assert second[0, :, 0, 0, 0].tolist() == [5, 5, 3, 3]
    assert pages.read(torch.tensor([[5, 3]])).data_ptr() != first.data_ptr()


def test_windows_of_all_threads_count():
    """Whichever thread asks."""
    trace = random_trace(np.random.default_rng(0), Case(), 2, root_steps=2, simulations=2)
    models = [cached_model(Case(), 2, 0) for _ in range(2)]
    play(Batch(models[0]), trace)
    in_threads(lambda: play(Batch(models[1]), trace))
    here, there = (model.world_model.kv_cache_manager.memory_mb for model in models)
    assert here == there > models[0].world_model.kv_cache_manager.store.slab.memory_mb


def use_up(policy):
    """Take every free page, so that the next step must grow or evict."""
    manager = policy._model.world_model.kv_cache_manager
    return manager, manager.take(manager._pages.free)


def store(manager, key):
    """A root of one page in each environment."""
    with manager.lease() as lease:
        contexts = extend((np.zeros((3, manager.context_pages), np.int64), np.zeros(3, np.int64)), lease.allocate(3))
        manager.store_init('collect', [0, 1, 2], [key] * 3, contexts)


@pytest.fixture
def policy():
    return make_policy(True)


def test_growth_keeps_what_is_stored(policy, caplog):
    worker, reference = Worker(policy), Worker(make_policy(True))
    worker.step([0, 1, 2]), reference.step([0, 1, 2])
    manager, taken = use_up(policy)
    before = manager.page_capacity
    with caplog.at_level(logging.INFO, 'lzero_kvcache'):
        assert_same_outputs(worker.step([0, 1, 2]), reference.step([0, 1, 2]), [0, 1, 2])
    assert manager.page_capacity > before
    assert sum('Grew the page storage' in line for line in caplog.messages) == 1
    manager._pages.release(taken)
    audit(manager)


@pytest.mark.parametrize('error', list(OUT_OF_MEMORY.values()), ids=list(OUT_OF_MEMORY))
def test_out_of_memory_while_growing(error, policy, monkeypatch, lines):
    """The slab stays as it was, older roots make room, one line says so, and every answer is as with memory left."""
    worker, reference = Worker(policy), Worker(make_policy(True))
    for _ in range(12):
        worker.step([0, 1, 2]), reference.step([0, 1, 2])
    manager = policy._model.world_model.kv_cache_manager
    for key in range(8):  # somebody's own, found by key
        store(manager, key)
    manager, taken = use_up(policy)
    asked = allocation_fails(monkeypatch, error)
    data, contents, capacity = manager.store.slab.data, manager.store.slab.data.clone(), manager.page_capacity
    with pytest.raises(OutOfPages):
        manager.take(capacity)  # more than there can be
    assert manager.store.slab.data is data and torch.equal(data, contents)
    assert manager.page_capacity == capacity
    assert roots(manager) == [2, 2, 2]  # the current root of each is kept, and the newest that was stored by key
    assert manager.counters()['init']['evictions'] == 21
    for _ in range(4):
        assert_same_outputs(worker.step([0, 1, 2]), reference.step([0, 1, 2]), [0, 1, 2])
    assert manager.store.slab.data is data and manager.page_capacity == capacity
    assert len(asked) == 1
    warnings = [message for level, message in lines(logging.WARNING) if 'Out of memory' in message]
    assert warnings == [
        f'Out of memory while the page storage grew from {capacity} to {2 * capacity} pages: '
        'it stays as it was, and older root contexts are evicted from now on'
    ]
    manager._pages.release(taken)
    audit(manager)


def test_the_newest_root_by_key_is_kept_where_a_later_one_was_forgotten(policy, monkeypatch):
    """As those of a search by key are at its end."""
    Worker(policy).step([0, 1, 2])
    manager = policy._model.world_model.kv_cache_manager
    for key in ('older', 'newest', 'searched'):
        store(manager, key)
    manager.forget_init('collect', [0, 1, 2], ['searched'] * 3)
    manager, taken = use_up(policy)
    allocation_fails(monkeypatch, OUT_OF_MEMORY['a CPU'])
    with pytest.raises(OutOfPages):
        manager.take(manager.page_capacity)
    counts = [manager.find_init('collect', [0, 1, 2], [key] * 3)[1].tolist() for key in ('older', 'newest')]
    assert counts == [[0, 0, 0], [1, 1, 1]]
    manager._pages.release(taken)
    audit(manager)


def test_out_of_memory_with_nothing_to_evict(policy, monkeypatch):
    """What is left is an error that says what to do; where memory is free again, the step can be done again."""
    worker, reference = Worker(policy), Worker(make_policy(True))
    worker.step([0, 1, 2]), reference.step([0, 1, 2])
    manager, taken = use_up(policy)
    allocation_fails(monkeypatch, OUT_OF_MEMORY['a GPU'])
    with pytest.raises(OutOfPages, match='memory has run out: .*num_simulations'):
        worker.step([0, 1, 2])
    manager._pages.release(taken)
    audit(manager)
    assert_same_outputs(worker.step([0, 1, 2]), reference.step([0, 1, 2]), [0, 1, 2])


@pytest.mark.parametrize('error', list(OUT_OF_MEMORY.values()), ids=list(OUT_OF_MEMORY))
def test_out_of_memory_at_the_first_allocation(error, policy, monkeypatch):
    """What to lower is said; where memory is free again, the step can be done again."""
    worker, reference = Worker(policy), Worker(make_policy(True))
    manager = policy._model.world_model.kv_cache_manager
    with monkeypatch.context() as full:
        allocation_fails(full, error)
        with pytest.raises(OutOfPages, match=f'no memory on cpu for {manager.page_capacity} pages, .* MiB: '
                                             f'lower kv_cache_cfg.init_pool_size={manager.config.init_pool_size}'):
            worker.step([0, 1, 2])
    audit(manager)
    assert_same_outputs(worker.step([0, 1, 2]), reference.step([0, 1, 2]), [0, 1, 2])


def test_another_error_while_growing_is_not_hidden(policy, monkeypatch):
    worker = Worker(policy)
    worker.step([0, 1, 2])
    manager, taken = use_up(policy)
    allocation_fails(monkeypatch, RuntimeError('device-side assert triggered'))
    with pytest.raises(RuntimeError, match='device-side assert'):
        worker.step([0, 1, 2])
    manager._pages.release(taken)
    audit(manager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_a_device_that_is_full(lines):
    """Its memory is really used up; what lies in the slab stays there, and is found."""
    manager = KVCacheManager(cache_cfg(num_simulations=8, kv_cache_cfg=dict(init_pool_size=300)))
    manager.use_store(PageStore(slab.Slab(layers=8, heads=8, head_dim=128), 'lower init_pool_size'))
    cuda = torch.device('cuda')
    content = {}
    for step in range(300):  # an episode of two environments, found by key
        with manager.lease() as lease:
            pages = lease.allocate(2)
            storage = manager.store.ready(manager.page_capacity, cuda)
            token = torch.randn((2, *storage.page_shape), device=cuda)
            storage.write(torch.from_numpy(pages).to(cuda), token)
            contexts = extend(manager.find_init('collect', [0, 1], [step - 1] * 2), pages)
            manager.store_init('collect', [0, 1], [step] * 2, contexts)
        content.update(zip(pages.tolist(), token.cpu()))
    audit(manager)
    data, capacity = storage.data, manager.page_capacity
    filler, size = [], 1 << 30
    while size >= 1 << 20:
        try:
            filler.append(torch.empty(size, dtype=torch.uint8, device=cuda))
        except torch.cuda.OutOfMemoryError:
            size //= 2
    held = torch.cuda.memory_allocated()
    with manager.lease() as lease:
        lease.allocate(manager._pages.free + 100)
        assert storage.data is data and manager.page_capacity == capacity
        assert torch.cuda.memory_allocated() == held
        told = [message for _, message in lines(logging.WARNING) if 'Out of memory while the page storage' in message]
        assert len(told) == 1
        assert manager.counters()['init']['evictions'] >= 100
    audit(manager)
    tables, counts = manager.find_init('collect', [0, 1], [299] * 2)
    assert counts.tolist() == [manager.context_pages] * 2
    for page in tables.ravel().tolist():
        assert torch.equal(data[page].cpu(), content[page])
    filler.clear()
    torch.cuda.empty_cache()

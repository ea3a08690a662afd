"""Choices that LightZero's C++ tree made where it runs, replayed by the kernels of a GPU, there and interpreted, and by
the compiled trees."""
import importlib.util
import types
from typing import Any

import numpy as np
import pytest
import torch
from recorded_choices import COUNT, Choices, chosen_by_compiled, make_rules, record, recorded
from small_models import ON_MAIN

from lzero_kvcache.engine.slab import Slab
from lzero_kvcache.engine.weights import Geometry
from lzero_kvcache.search import gpu_search
from lzero_kvcache.search.array_search import Problem
from lzero_kvcache.search.gpu_memory import GpuMemory

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


class Replayed(GpuMemory):
    """A search whose model answers what was recorded."""

    def __init__(self, choices: Choices, place: torch.device) -> None:
        rows, slots = choices.logits.shape
        *numbers, two_players = choices.rules.tolist()
        legal = choices.legal_lists
        rules = make_rules(*numbers, bool(two_players), draws_ties=False)
        noises = [row[:len(actions) or slots].tolist() for row, actions in zip(choices.noise, legal)]
        problem = Problem(
            rules, 0, 0, len(choices.answers), slots, 0, [0.] * rows, choices.logits.tolist(), legal, noises,
            float(choices.weight)
        )
        engine: Any = types.SimpleNamespace(geometry=Geometry(1, 1, 2, 2, slots, False, 0))
        source: Any = types.SimpleNamespace(device=lambda: place, read=lambda captured: None)
        super().__init__(engine, source, Slab(1, 1, 2), 1, problem, rows, 'float32')
        self._answers = torch.from_numpy(choices.answers).to(place)
        gpu_search._give(self, problem, np.zeros(rows, np.int64))

    def _run_simulation(self) -> None:
        self._select()
        self.predicted.copy_(self._answers.index_select(0, self._simulation[:1].long())[0])
        self._backup()


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')
@pytest.mark.parametrize('place', ['cpu', pytest.param('cuda', marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize('number', range(COUNT))
def test_it_chooses_what_lightzeros_tree_chose(number: int, place: str) -> None:
    if place == 'cpu' and torch.cuda.is_available():
        pytest.skip('where there is a GPU, kernels are compiled')
    choices = recorded()[number]
    memory = Replayed(choices, torch.device(place))
    if place == 'cuda':
        memory.capture()
    memory.begin()
    for chosen in zip(choices.parents, choices.actions, choices.depths):
        memory.simulate()
        for part, right in zip((memory.parents, memory.actions, memory.depths), chosen):
            assert part.tolist() == right.tolist()
    visits, values, _, broken = memory.found(len(choices.values))
    assert np.where(choices.visits < 0, -1, visits).tolist() == choices.visits.tolist()
    np.testing.assert_allclose(values, choices.values, rtol=1e-6, atol=1e-6)
    assert not broken.any()


def test_the_compiled_trees_choose_it_too() -> None:
    for choices in recorded():
        *chosen, visits, values = chosen_by_compiled(choices)
        for name, part in zip(('parents', 'actions', 'depths', 'visits'), (*chosen, visits)):
            np.testing.assert_array_equal(part, getattr(choices, name), err_msg=name)
        np.testing.assert_allclose(values, choices.values, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not ON_MAIN, reason="LightZero's released tree always draws among equal scores")
def test_it_was_recorded_of_the_installed_lightzero() -> None:
    for choices, again in zip(recorded(), record()):
        for name, part in again._asdict().items():
            np.testing.assert_array_equal(part, getattr(choices, name), err_msg=name)

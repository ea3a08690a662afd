"""A whole search by the kernels for GPUs, against the one for CPUs: by Triton's interpreter, or on a GPU."""
from typing import Dict

import numpy as np
import pytest
from oracle import Case
from test_compiled_search import ROWS, Root, root, search_by_steps  # noqa: F401  (root is a fixture)

from lzero_kvcache.search.tree import root_values, root_visits

pytest.importorskip('triton')

CASES = pytest.mark.parametrize('case, rules', [
    (Case(rotary=True), {}),
    (Case(), {}),
    (Case(context_length=6, num_layers=1, num_heads=4), dict(two_players=True)),
], ids=['rotary', 'learned', 'two players'])


@CASES
def test_it_finds_what_the_search_by_steps_finds(root: Root, rules: Dict[str, bool]) -> None:  # noqa: F811
    root = root._replace(problem=root.problem._replace(simulations=4))  # interpreted kernels are slow
    visits, values = root.world_model.search_on_gpu(root.problem)
    other = search_by_steps(root)
    assert visits == root_visits(other)
    np.testing.assert_allclose(values, root_values(other), atol=3e-4)
    assert len(visits) == ROWS and len({tuple(row) for row in visits}) > 3

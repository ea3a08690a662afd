"""Page ids and reference counts, against a model that is a plain dict."""
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from lzero_kvcache.cache.pages import NULL_PAGE, RESERVED_PAGES, OutOfPages, PageAllocator, extend


class AllocatorMachine(RuleBasedStateMachine):
    """
    Owners hold tables of pages, alone or shared. Whatever happens, a page has as many references as owners, and is
    free exactly when it has none.
    """

    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(RESERVED_PAGES + 11)
        self.capacity = RESERVED_PAGES + 11
        self.model = {}  # page -> references

    owners = Bundle('owners')

    @rule(target=owners, count=st.integers(0, 15))
    def allocate(self, count):
        free = self.capacity - RESERVED_PAGES - len(self.model)
        if count > free:
            with pytest.raises(OutOfPages):
                self.pages.allocate(count)
            return multiple()
        pages = self.pages.allocate(count)
        assert len(set(pages.tolist())) == count
        assert not set(pages.tolist()) & set(self.model)
        assert all(RESERVED_PAGES <= page < self.capacity for page in pages)
        self.model.update(dict.fromkeys(pages.tolist(), 1))
        return pages

    @rule(target=owners, pages=owners, padding=st.integers(0, 2))
    def share(self, pages, padding):
        table = np.concatenate([pages, np.zeros(padding, np.int64)])
        self.pages.retain(table)
        for page in pages.tolist():
            self.model[page] += 1
        return pages

    @rule(pages=consumes(owners))
    def release(self, pages):
        self.pages.release(np.append(pages, NULL_PAGE))
        self._forget(pages)

    @rule(first=consumes(owners), second=consumes(owners))
    def release_together(self, first, second):
        """As a cleared pool does: one call, in which shared pages are named more than once."""
        self.pages.release(np.concatenate([first, second]))
        self._forget(first)
        self._forget(second)

    @rule(more=st.integers(1, 5))
    def grow(self, more):
        self.capacity += more
        self.pages.grow(self.capacity)

    def _forget(self, pages):
        for page in pages.tolist():
            self.model[page] -= 1
            if not self.model[page]:
                del self.model[page]

    @invariant()
    def agrees(self):
        references = self.pages.references
        assert {page: int(references[page]) for page in np.flatnonzero(references)[RESERVED_PAGES:]} == self.model
        assert references[:RESERVED_PAGES].tolist() == [1] * RESERVED_PAGES
        assert self.pages.capacity == self.capacity
        assert self.pages.used == len(self.model)
        assert self.pages.free == self.capacity - RESERVED_PAGES - len(self.model)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_every_page_can_be_had_once():
    pages = PageAllocator(RESERVED_PAGES + 8)
    assert sorted(pages.allocate(8).tolist()) == list(range(RESERVED_PAGES, RESERVED_PAGES + 8))
    with pytest.raises(OutOfPages, match='1 pages wanted, 0 of'):
        pages.allocate(1)


def test_a_refused_allocation_takes_nothing():
    pages = PageAllocator(RESERVED_PAGES + 3)
    with pytest.raises(OutOfPages):
        pages.allocate(4)
    assert (pages.free, pages.used) == (3, 0)
    assert len(pages.allocate(3)) == 3


def test_growing_keeps_what_there_is():
    pages = PageAllocator(RESERVED_PAGES + 2)
    held = pages.allocate(2)
    pages.grow(RESERVED_PAGES + 5)
    assert pages.references[held].tolist() == [1, 1]
    assert sorted(pages.allocate(3).tolist()) == [RESERVED_PAGES + 2, RESERVED_PAGES + 3, RESERVED_PAGES + 4]


def test_tables_of_a_search_tree():
    """The drawn example: context_length 8, so that a stored context has three pages at the most."""
    pages = PageAllocator(RESERVED_PAGES + 5)
    p0, p1, p2, p3, p4 = pages.allocate(5)
    nothing = np.zeros((1, 3), np.int64), np.zeros(1, np.int64)
    root_0 = extend(nothing, np.array([p0]))
    root_1 = extend(root_0, np.array([p1]))
    node_1, node_2 = (extend(root_1, np.array([page])) for page in (p2, p3))
    node_3 = extend(node_1, np.array([p4]))
    tables = [context[0][0].tolist() for context in (root_0, root_1, node_1, node_2, node_3)]
    assert tables == [[p0, 0, 0], [p0, p1, 0], [p0, p1, p2], [p0, p1, p3], [p1, p2, p4]]
    assert [int(context[1][0]) for context in (root_0, root_1, node_1, node_2, node_3)] == [1, 2, 3, 3, 3]


def test_extend_leaves_its_argument_alone():
    tables, counts = np.array([[1, 2, 3], [4, 0, 0]]), np.array([3, 1])
    children, sizes = extend((tables, counts), np.array([5, 6]))
    assert children.tolist() == [[2, 3, 5], [4, 6, 0]]
    assert sizes.tolist() == [3, 2]
    assert tables.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert counts.tolist() == [3, 1]


def test_extend_of_the_shortest_context():
    """With context_length 4 a stored context is one page, and every step replaces it."""
    children, sizes = extend((np.array([[1]]), np.array([1])), np.array([2]))
    assert (children.tolist(), sizes.tolist()) == ([[2]], [1])

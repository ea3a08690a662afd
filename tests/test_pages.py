"""Page ids, reference counts and leases, against a model that is a plain dict."""
import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from failing import failing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from lzero_kvcache.cache.pages import NULL_PAGE, RESERVED_PAGES, OutOfPages, PageAllocator, extend

POINTS = st.one_of([st.none()] * 3 + [st.integers(1, 12)])


class PagesMachine(RuleBasedStateMachine):
    """
    Owners hold tables of pages, alone or shared, by hand or by leases. Whatever happens and wherever it fails, a page
    has as many references as owners, and is free exactly when it has none.
    """

    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(RESERVED_PAGES + 11)
        self.capacity = RESERVED_PAGES + 11
        self.model = {}  # page -> references

    owners = Bundle('owners')
    leases = Bundle('leases')

    def has(self, table):
        for page in table.ravel().tolist():
            if page != NULL_PAGE:
                self.model[page] = self.model.get(page, 0) + 1

    def loses(self, table):
        for page in table.ravel().tolist():
            if page != NULL_PAGE:
                self.model[page] -= 1
                if not self.model[page]:
                    del self.model[page]

    def taken(self, allocate, count, point):
        """New pages, or None where that failed or fewer are free."""
        with failing(point):
            try:
                pages = allocate(count)
            except OutOfPages:
                assert count > self.capacity - RESERVED_PAGES - len(self.model)
                return None
            assert len(set(pages.tolist())) == len(pages) == count
            assert not set(pages.tolist()) & set(self.model)
            assert all(RESERVED_PAGES <= page < self.capacity for page in pages)
            self.has(pages)
            return pages
        return None

    @rule(target=owners, count=st.integers(0, 15), point=POINTS)
    def allocate(self, count, point):
        pages = self.taken(self.pages.allocate, count, point)
        return multiple() if pages is None else pages

    @rule(target=owners, pages=owners, padding=st.integers(0, 2), point=POINTS)
    def share(self, pages, padding, point):
        with failing(point):
            self.pages.retain(np.concatenate([pages, np.zeros(padding, np.int64)]))
            self.has(pages)
            return pages
        return multiple()

    @rule(tables=st.lists(consumes(owners), min_size=1, max_size=2), point=POINTS)
    def release(self, tables, point):
        """As a cleared pool does: one call, in which shared pages are named more than once."""
        table = np.concatenate([*tables, [NULL_PAGE]])
        with failing(point) as failed:
            self.pages.release(table)
        if failed:
            self.agrees()
            self.pages.release(table)
        self.loses(table)

    @rule(more=st.integers(1, 5), point=POINTS)
    def grow(self, more, point):
        with failing(point):
            self.pages.grow(self.capacity + more)
            self.capacity += more

    @rule(target=leases)
    def open(self):
        """A lease and the tables that it should hold; searches are open beside each other and end in any order."""
        return self.pages.lease(), []

    @rule(opened=leases, count=st.integers(0, 4), point=POINTS)
    def lease(self, opened, count, point):
        pages = self.taken(opened[0].allocate, count, point)
        if pages is not None:
            opened[1].append(pages)

    @rule(opened=leases, table=owners, padding=st.integers(0, 2), point=POINTS)
    def hold(self, opened, table, padding, point):
        table = np.concatenate([table, np.zeros(padding, np.int64)])
        with failing(point):
            opened[0].hold(table)
            opened[1].append(table.copy())
            self.has(table)
        table.fill(NULL_PAGE)  # its owner may write to it

    @rule(opened=leases, point=POINTS)
    def end(self, opened, point):
        """By ``release``, at the latest the second time, however often a search is ended."""
        with failing(point):
            opened[0].release()
        opened[0].release()
        for table in opened[1]:
            self.loses(table)
        opened[1].clear()

    @rule(count=st.integers(0, 4), point=POINTS)
    def abandon(self, count, point):
        """Nobody ends it: an exception, or a search that is left in the middle."""
        if count <= self.capacity - RESERVED_PAGES - len(self.model):
            with failing(point):
                lease = self.pages.lease()
                lease.hold(lease.allocate(count))

    @invariant()
    def agrees(self):
        references = self.pages.references
        assert self.pages.used == len(self.model)
        assert self.pages.free == self.capacity - RESERVED_PAGES - len(self.model)
        assert {page: int(references[page]) for page in np.flatnonzero(references)[RESERVED_PAGES:]} == self.model
        assert references[:RESERVED_PAGES].tolist() == [1] * RESERVED_PAGES
        assert self.pages.capacity == self.capacity

    def teardown(self):
        free = self.pages.free
        assert sorted([*self.pages.allocate(free).tolist(), *self.model]) == list(range(RESERVED_PAGES, self.capacity))


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_lease_takes_pages_where_it_is_told_to():
    """A manager grows or evicts first; what that needs, other leases among it, is not the lease's."""
    pages = PageAllocator(RESERVED_PAGES)

    def take(count):
        with pages.lease() as other:
            other.allocate(0)
            pages.grow(pages.capacity + count)
        return pages.allocate(count)

    with pages.lease(take) as lease:
        assert len(lease.allocate(3)) == pages.used == 3
    assert pages.used == 0


def test_a_copied_lease_ends_by_itself():
    pages = PageAllocator(RESERVED_PAGES + 3)
    lease = pages.lease()
    lease.allocate(2)
    copied_pages, copied = copy.deepcopy((pages, lease))
    lease.release()
    assert (pages.used, copied_pages.used) == (0, 2)
    del copied
    assert copied_pages.used == 0


def test_extend_leaves_its_argument_alone():
    tables, counts = np.array([[1, 2, 3], [4, 0, 0]]), np.array([3, 1])
    children, sizes = extend((tables, counts), np.array([5, 6]))
    assert (children.tolist(), sizes.tolist()) == ([[2, 3, 5], [4, 6, 0]], [3, 2])
    assert (tables.tolist(), counts.tolist()) == ([[1, 2, 3], [4, 0, 0]], [3, 1])


def test_extend_of_the_shortest_context():
    """With context_length 4 a stored context is one page, and every step replaces it."""
    children, sizes = extend((np.array([[1]]), np.array([1])), np.array([2]))
    assert (children.tolist(), sizes.tolist()) == ([[2]], [1])


def test_threads_take_pages_and_give_them_back():
    """Switched as often as can be; a copy of an allocator has a lock of its own."""
    allocator, interval = copy.deepcopy(PageAllocator(400)), sys.getswitchinterval()

    def run(_):
        for _ in range(1000):
            with allocator.lease() as lease:
                lease.hold(lease.allocate(37)[:5])

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(run, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert allocator.used == 0

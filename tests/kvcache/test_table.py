"""The page table against a plain model: every lease reads its own tokens, whatever was shared, copied or evicted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kvcache.table import NULL_PAGE, PageTable


class Contents:
    """A page table together with what a device would hold: the token of each slot."""

    def __init__(self, num_pages, page_size):
        self.table = PageTable(num_pages, page_size)
        self.pages = [[None] * page_size for _ in range(num_pages)]
        self.tokens = {}  # lease -> the tokens it should read

    def allocate(self, ids, limit=None, salt=None):
        lease = self.table.allocate(ids, limit, salt)
        self.tokens[lease] = list(ids[: lease.length])
        return lease

    def append(self, lease, ids):
        copies = self.table.append(lease, len(ids))
        read = [list(self.pages[src]) for src, _ in copies]
        for (_, dst), content in zip(copies, read, strict=True):
            self.pages[dst] = content
        size, known = self.table.page_size, self.tokens[lease]
        for token in ids:
            self.pages[lease.pages[len(known) // size]][len(known) % size] = token
            known.append(token)

    def fork(self, lease, length=None):
        other = self.table.fork(lease, length)
        self.tokens[other] = self.tokens[lease][: other.length]
        return other

    def commit(self, lease):
        self.table.commit(lease, self.tokens[lease], len(self.tokens[lease]))

    def free(self, lease):
        self.table.free(lease)
        del self.tokens[lease]

    def check(self):
        self.table.check_integrity()
        size = self.table.page_size
        for lease, expected in self.tokens.items():
            assert lease.length == len(expected)
            assert [self.pages[lease.pages[t // size]][t % size] for t in range(lease.length)] == expected
        assert self.pages[NULL_PAGE] == [None] * size


OPERATION = st.tuples(
    st.sampled_from(["open", "open", "append", "append", "fork", "commit", "commit", "free", "forget"]),
    st.integers(0, 7),
    st.integers(0, 11),
    st.integers(0, 1),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.lists(OPERATION, max_size=60))
def test_any_sequence_of_operations_keeps_every_lease_readable(num_pages, page_size, operations):
    world, leases = Contents(num_pages, page_size), []
    for kind, which, amount, salt in operations:
        lease = leases[which % len(leases)] if leases else None
        if kind == "open":
            ids = [(which >> (t % 3)) & 1 for t in range(amount)]  # few different prompts, so that prefixes meet
            leases.append(world.allocate(ids, limit=None if which % 2 else max(0, amount - 1), salt=salt))
        elif lease is None:
            continue
        elif kind == "append":
            if world.table.can_append(lease, amount):
                world.append(lease, [(which + t) & 1 for t in range(amount)])
        elif kind == "fork":
            leases.append(world.fork(lease, None if amount % 2 else lease.length * amount // 12))
        elif kind == "commit":
            world.commit(lease)
        elif kind == "free":
            leases.remove(lease)
            world.free(lease)
        else:
            world.table.forget()
        world.check()
    for lease in leases:
        world.free(lease)
    world.check()
    assert world.table.num_used == 0 and world.table.num_available == num_pages - 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(OPERATION, max_size=40), st.data())
def test_admission_counts_exactly_the_pages_it_takes(page_size, operations, data):
    """``num_new_pages`` promises that a lease of that many pages can be grown to its length."""
    world, leases = Contents(12, page_size), []
    for kind, which, amount, _ in operations:
        if kind in ("open", "append"):
            ids = [(which >> (t % 3)) & 1 for t in range(amount + 1)]
            if world.table.num_new_pages(ids, amount) <= world.table.num_available:
                lease = world.allocate(ids, limit=amount)
                assert world.table.can_append(lease, len(ids) - lease.length)
                world.append(lease, ids[lease.length :])
                world.commit(lease)
                leases.append(lease)
        elif leases and kind == "free":
            world.free(leases.pop(which % len(leases)))
        world.check()


def filled(table, ids, salt=None):
    lease = table.allocate(ids, salt=salt)
    table.append(lease, len(ids) - lease.length)
    table.commit(lease, ids, len(ids))
    return lease


def test_prefix_is_reused_by_whole_pages_across_requests():
    table = PageTable(16, 4)
    first = filled(table, list(range(10)))
    table.free(first)
    assert table.num_cached == 2 and table.num_used == 0
    again = table.allocate(list(range(10)))
    assert again.length == 8 and table.num_cached == 0
    assert table.allocate([9, 9, 9, 9]).length == 0
    assert table.allocate(list(range(10)), salt="other").length == 0
    assert table.allocate([9] + list(range(1, 10))).length == 0  # equal tokens behind other tokens
    table.check_integrity()


def test_limit_inside_a_page_shares_it_and_copies_before_writing():
    table = PageTable(8, 4)
    first = filled(table, list(range(8)))
    second = table.allocate(list(range(8)), limit=7)
    assert second.length == 7 and second.pages == first.pages
    copies = table.append(second, 1)
    assert copies == [(first.pages[1], second.pages[1])] and first.pages[1] != second.pages[1]
    assert second.pages[0] == first.pages[0]
    table.check_integrity()


def test_sole_holder_of_a_cached_page_copies_it_when_there_is_room_and_takes_it_otherwise():
    for num_pages, copied in ((4, True), (3, False)):
        table = PageTable(num_pages, 4)
        table.free(filled(table, list(range(8))))
        lease = table.allocate(list(range(8)), limit=7)
        assert table.can_append(lease, 1)
        assert bool(table.append(lease, 1)) is copied
        assert len(table.match(list(range(8)))) == (2 if copied else 1)
        table.check_integrity()


def test_fork_copies_on_write_once_and_the_last_holder_keeps_the_page():
    table = PageTable(16, 4)
    parent = table.allocate()
    table.append(parent, 6)
    children = [table.fork(parent) for _ in range(2)]
    assert table.num_used == 2
    assert len(table.append(parent, 1)) == 1
    assert len(table.append(children[0], 1)) == 1
    assert table.append(children[1], 1) == []
    assert table.num_used == 4
    table.check_integrity()


def test_fork_midway_leaves_the_parent_alone():
    table = PageTable(16, 4)
    parent = filled(table, list(range(11)))
    child = table.fork(parent, 5)
    assert child.length == 5 and child.pages == parent.pages[:2]
    assert table.append(child, 1) == [(parent.pages[1], child.pages[1])]
    assert table.append(parent, 1) == []
    table.check_integrity()


def test_longest_unused_goes_first_and_leaves_before_roots():
    table = PageTable(5, 2)
    old, new = [1, 1, 2, 2], [3, 3, 4, 4]
    table.free(filled(table, old))
    table.free(filled(table, new))
    lease = table.allocate()
    table.append(lease, 2)
    assert len(table.match(old)) == 1 and len(table.match(new)) == 2
    table.append(lease, 2)
    assert len(table.match(old)) == 0 and len(table.match(new)) == 2
    table.check_integrity()


def test_equal_pages_of_two_leases_survive_the_loss_of_one():
    """The second lease's pages hang on the first one's; when that is given away, nothing may dangle."""
    table = PageTable(8, 2)
    first, second = table.allocate(), table.allocate()
    for lease, ids in ((first, [1, 1]), (second, [1, 1, 2, 2])):
        table.append(lease, len(ids))
        table.commit(lease, ids, len(ids))
    table.free(first)
    filler = table.allocate()
    table.append(filler, 2 * table.num_available)
    table.check_integrity()
    assert table.match([1, 1]) == []
    table.free(filler)
    table.append(second, 2)
    table.commit(second, [1, 1, 2, 2, 3, 3], 6)
    table.check_integrity()
    assert table.match([1, 1, 2, 2, 3, 3]) == second.pages


def test_page_table_refuses_and_asserts():
    with pytest.raises(ValueError, match="null page"):
        PageTable(1, 4)
    table = PageTable(3, 4)
    lease = table.allocate()
    assert table.can_append(lease, 8) and not table.can_append(lease, 9)
    with pytest.raises(AssertionError):
        table.append(lease, 9)
    table.free(lease)
    with pytest.raises(AssertionError):
        table.free(lease)
    with pytest.raises(AssertionError):
        table.append(lease, 1)


def test_reuse_can_be_switched_off():
    table = PageTable(8, 2, reuse=False)
    table.free(filled(table, [1, 2, 3, 4]))
    assert table.num_cached == 0 and table.allocate([1, 2, 3, 4]).length == 0


@pytest.mark.parametrize("damage", ["count", "free twice", "lost", "null", "tree"])
def test_integrity_check_can_fail(damage):
    table = PageTable(8, 2)
    lease = filled(table, [1, 2, 3])
    if damage == "count":
        table._holders[lease.pages[0]] += 1
    elif damage == "free twice":
        table._free.append(table._free[0])
    elif damage == "lost":
        table._free.popleft()
    elif damage == "null":
        lease.pages[0] = NULL_PAGE
    else:
        table._children.clear()
    with pytest.raises((AssertionError, KeyError)):
        table.check_integrity()

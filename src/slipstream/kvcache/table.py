"""Which pages hold which tokens: allocation, sharing, copy-on-write, reuse of prefixes. Pure Python, no tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

NULL_PAGE = 0

Copies = list[tuple[int, int]]
_NO_COPIES: Copies = []
_Key = tuple[Hashable, tuple[int, ...]]


@dataclass(eq=False)
class Lease:
    """The pages that one chain holds.

    pages: in logical order; token ``t`` is in ``pages[t // S]``. length: tokens that have a slot.
    nodes: for each leading page whose content is known, its node in the prefix tree (see :class:`PageTable`).
    room: slots behind ``length`` that may be written without asking again.
    """

    salt: Hashable = None
    pages: list[int] = field(default_factory=list)
    length: int = 0
    nodes: list[int] = field(default_factory=list)
    room: int = 0


class PageTable:
    """Hands out pages ``1 .. num_pages - 1`` to leases; page 0 is the null page and belongs to nobody.

    Sharing: a page counts its holders. Only the sole holder of a page writes to it, and only while it is not part of
    the prefix tree; everybody else gets a copy first (:meth:`append` returns the page pairs to copy).

    Prefix tree: a full page whose tokens are known is a node, found by its parent node and its token ids (the root's
    parent is the salt). The ids are compared, not only hashed, and a node's number is never used twice, so a match is
    always the same tokens behind the same tokens. A page in the tree that nobody holds is kept, the longest unused is
    given away first; a lease lets go of its last page first, so the leaves of the tree go before what they hang on.
    """

    def __init__(self, num_pages: int, page_size: int, *, reuse: bool = True) -> None:
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"need a page beside the null page and a slot in it, got {num_pages} pages of {page_size}")
        self.num_pages, self.page_size, self.reuse = num_pages, page_size, reuse
        self._free = deque(range(1, num_pages))
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the tree and held by nobody, longest unused first
        self._holders = [0] * num_pages
        self._leases: set[Lease] = set()
        self._page_of: dict[_Key, int] = {}
        self._node_of: dict[int, int] = {}  # page -> node
        self._key_of: dict[int, _Key] = {}  # node -> key
        self._children: dict[int, set[int]] = {}  # node -> nodes
        self._next_node = 0

    # -- what there is

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds, kept for their content."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that some lease holds."""
        return self.num_pages - 1 - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # -- prefixes

    def match(self, token_ids: Sequence[int], limit: int | None = None, salt: Hashable = None) -> list[int]:
        """The cached pages that start with these tokens: whole pages, as few as cover the first ``limit`` tokens."""
        return [page for _, page in self._walk(token_ids, limit, salt)]

    def _walk(self, token_ids: Sequence[int], limit: int | None, salt: Hashable) -> list[tuple[int, int]]:
        size = self.page_size
        limit = len(token_ids) if limit is None else min(limit, len(token_ids))
        found: list[tuple[int, int]] = []
        parent: Hashable = ("salt", salt)
        for start in range(0, limit if self.reuse else 0, size):
            page = self._page_of.get((parent, tuple(token_ids[start : start + size])))
            if page is None:
                break
            parent = node = self._node_of[page]
            found.append((node, page))
        return found

    def num_new_pages(
        self, token_ids: Sequence[int], limit: int | None = None, salt: Hashable = None, length: int | None = None
    ) -> int:
        """How many of the available pages :meth:`allocate` and growth to ``length`` tokens take up together."""
        pages = self.match(token_ids, limit, salt)
        others = [self._holders[page] > 0 for page in pages]
        to_copy = limit is not None and limit < len(pages) * self.page_size and others[-1]
        return self.pages_for(len(token_ids) if length is None else length) - sum(others) + to_copy

    # -- leases

    def allocate(self, token_ids: Sequence[int] = (), limit: int | None = None, salt: Hashable = None) -> Lease:
        """A lease that starts with what the cache has of ``token_ids``, at most ``limit`` tokens of it.

        ``lease.length`` says how many tokens that is. A limit inside a page shares that page up to the limit.
        """
        lease = Lease(salt)
        for node, page in self._walk(token_ids, limit, salt):
            self._hold(page)
            lease.pages.append(page)
            lease.nodes.append(node)
        lease.length = len(lease.pages) * self.page_size
        if limit is not None and lease.length > limit:
            self._cut(lease, limit)
        self._leases.add(lease)
        return lease

    def can_append(self, lease: Lease, num_tokens: int) -> bool:
        return num_tokens <= lease.room or self._num_missing(lease, num_tokens) <= self.num_available

    def append(self, lease: Lease, num_tokens: int) -> Copies:
        """Give ``num_tokens`` more tokens a slot. Returns (source, destination) pages to copy before writing there."""
        if num_tokens <= lease.room:
            lease.room -= num_tokens
            lease.length += num_tokens
            return _NO_COPIES
        assert lease in self._leases and self.can_append(lease, num_tokens), "ask can_append, of a live lease, first"
        copies = self._own_last_page(lease, num_tokens)
        lease.length += num_tokens
        while len(lease.pages) * self.page_size < lease.length:
            lease.pages.append(self._take())
        lease.room = len(lease.pages) * self.page_size - lease.length
        return copies

    def fork(self, lease: Lease, length: int | None = None) -> Lease:
        """A second lease of the first ``length`` tokens (default: all). Nothing is copied until one of them writes."""
        assert lease in self._leases, "fork of a live lease"
        length = lease.length if length is None else length
        assert 0 <= length <= lease.length, f"cannot fork {lease.length} tokens at {length}"
        pages = lease.pages[: self.pages_for(length)]
        for page in pages:
            self._hold(page)
        other = Lease(lease.salt, pages, length, lease.nodes[: len(pages)])
        self._cut(other, length)
        lease.room = 0  # its last page may be shared from now on
        self._leases.add(other)
        return other

    def commit(self, lease: Lease, token_ids: Sequence[int], num_tokens: int) -> None:
        """The first ``num_tokens`` tokens of this lease are ``token_ids`` and their KV is written: share full pages.

        Costs nothing while no further page is full.
        """
        size = self.page_size
        assert num_tokens <= min(lease.length, len(token_ids)), "only what is known and stored can be committed"
        if not self.reuse or num_tokens // size <= len(lease.nodes):
            return
        if lease.nodes and lease.nodes[-1] not in self._key_of:
            lease.nodes.clear()  # another lease's copy of these tokens was given away; start again with our own
        for index in range(len(lease.nodes), num_tokens // size):
            parent: Hashable = lease.nodes[-1] if lease.nodes else ("salt", lease.salt)
            key = (parent, tuple(token_ids[index * size : (index + 1) * size]))
            page = self._page_of.get(key)
            lease.nodes.append(self._node_of[page] if page is not None else self._plant(key, lease.pages[index]))

    def free(self, lease: Lease) -> None:
        """Give all pages back. Those in the prefix tree stay until their room is needed."""
        assert lease in self._leases, "free of a live lease"
        self._leases.remove(lease)
        for page in reversed(lease.pages):
            self._release(page)
        lease.pages, lease.nodes, lease.length, lease.room = [], [], 0, 0

    def forget(self) -> None:
        """Empty the prefix cache; what leases hold stays theirs."""
        for page in list(self._node_of):
            self._uproot(page)

    # -- pages

    def _is_shared(self, lease: Lease) -> bool:
        """Whether the next token goes to a page that others read."""
        return lease.length % self.page_size > 0 and self._holders[lease.pages[-1]] > 1

    def _num_missing(self, lease: Lease, num_tokens: int) -> int:
        return self.pages_for(lease.length + num_tokens) - len(lease.pages) + self._is_shared(lease)

    def _own_last_page(self, lease: Lease, num_tokens: int) -> Copies:
        if lease.length % self.page_size == 0:
            return []
        page = lease.pages[-1]
        cached = page in self._node_of
        if self._is_shared(lease) or (cached and self._num_missing(lease, num_tokens) < self.num_available):
            lease.pages[-1] = self._take()
            self._release(page)
            return [(page, lease.pages[-1])]
        self._uproot(page)  # no page to spare: what is cut and written anew no longer is what the tree says
        return []

    def _cut(self, lease: Lease, length: int) -> None:
        lease.length, lease.room = length, 0
        del lease.nodes[length // self.page_size :]

    def _hold(self, page: int) -> None:
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1

    def _take(self) -> int:
        if not self._free:
            self._uproot(next(iter(self._idle)))
        page = self._free.popleft()
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._node_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    # -- the prefix tree

    def _plant(self, key: _Key, page: int) -> int:
        node = self._next_node
        self._next_node += 1
        # A page that is in the tree under other tokens cannot be: its content was known, and nobody else writes it.
        assert page not in self._node_of, "one page, one content"
        self._page_of[key], self._node_of[page], self._key_of[node] = page, node, key
        self._children[node] = set()
        if isinstance(key[0], int):
            self._children[key[0]].add(node)
        return node

    def _uproot(self, page: int) -> None:
        """Take a page and all that hangs on it out of the tree; those that nobody holds become free."""
        if page not in self._node_of:
            return
        parent = self._key_of[self._node_of[page]][0]
        if isinstance(parent, int):
            self._children[parent].discard(self._node_of[page])
        nodes = [self._node_of[page]]
        while nodes:
            node = nodes.pop()
            nodes += self._children.pop(node)
            page = self._page_of.pop(self._key_of.pop(node))
            del self._node_of[page]
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    # -- invariants

    def check_integrity(self) -> None:
        """Assert every invariant: meant for tests, and cheap enough to call at each step of one."""
        held: Counter[int] = Counter()
        for lease in self._leases:
            assert len(set(lease.pages)) == len(lease.pages), "a lease holds a page twice"
            assert len(lease.pages) == self.pages_for(lease.length), "pages do not fit the length"
            assert len(lease.nodes) <= lease.length // self.page_size, "only full pages are nodes"
            assert 0 <= lease.room <= len(lease.pages) * self.page_size - lease.length, "room beyond the last page"
            if lease.room:
                last = lease.pages[-1]
                assert self._holders[last] == 1 and last not in self._node_of, "room in a page that is not ours alone"
            held.update(lease.pages)
        free, idle = set(self._free), set(self._idle)
        assert NULL_PAGE not in held and NULL_PAGE not in free | idle, "the null page belongs to nobody"
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & idle and not (free | idle) & set(held), "a page is free and held"
        assert len(free) + len(idle) + len(held) == self.num_pages - 1, "a page is lost"
        assert all(self._holders[page] == held[page] for page in range(self.num_pages)), "holders are miscounted"
        assert idle <= set(self._node_of) and not free & set(self._node_of), "the tree and the free pages disagree"
        self._check_tree()

    def _check_tree(self) -> None:
        assert {node: page for page, node in self._node_of.items()} == {
            node: self._page_of[key] for node, key in self._key_of.items()
        }, "the maps of the tree disagree"
        assert len(self._page_of) == len(self._key_of) == len(self._children), "the maps of the tree disagree"
        for node, (parent, ids) in self._key_of.items():
            assert len(ids) == self.page_size, "only full pages are nodes"
            assert not isinstance(parent, int) or node in self._children[parent], "a node hangs on nothing"
        assert sum(map(len, self._children.values())) == sum(
            isinstance(parent, int) for parent, _ in self._key_of.values()
        ), "a parent names a child that is gone"

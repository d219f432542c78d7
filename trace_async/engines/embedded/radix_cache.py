"""Keep track of which prefixes have their KV in the pool, and where.

This is a radix tree over token ids, after SGLang (arXiv 2312.07104). It knows no tensors: it hands out indices
("slots") into a pool of `capacity` tokens, and its owner copies KV between the pool and the batch. A running request
works on its own copy. So no node is ever locked, and to evict a node is only to forget it.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np

# Eviction frees at least this share of the pool, because it scans all leaves and should be rare.
EVICT_SHARE = 1 / 16
TOKEN_BYTES = np.dtype(np.int64).itemsize


@dataclass(slots=True, eq=False)
class RadixNode:
    """An edge of the tree."""

    raw: bytes
    """Its tokens as int64 bytes, which compare faster than arrays."""
    slots: np.ndarray
    """The pool slots that hold the KV of its tokens."""
    parent: "RadixNode | None"
    last_used: int = 0
    """The count of lookups at its last use."""
    pending: bool = False
    """Whether its KV is not written yet."""
    children: dict[bytes, "RadixNode"] = field(default_factory=dict)
    """By the bytes of their first token."""

    @property
    def first(self) -> bytes:
        return self.raw[:TOKEN_BYTES]


@dataclass(frozen=True, slots=True)
class Match:
    """The cached prefix of a request."""

    slots: np.ndarray
    """The slots of the longest prefix whose KV is ready."""
    num_promised: int
    """The length of the prefix if pending nodes count too."""


class RadixCache:
    """Finds the longest cached prefix, inserts new tokens, and evicts the least recently used leaves.

    Example: "a b c d" is cached and "a b x" is inserted. The edge "a b c d" is split into "a b" and "c d", and "x"
    becomes a second child of "a b".
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything. Every slot is free again."""
        self._root = RadixNode(b"", np.empty(0, np.int64), None)
        self._free = np.arange(self.capacity)
        self._num_free = self.capacity
        self._pending: list[RadixNode] = []
        self._clock = 0

    @property
    def num_cached(self) -> int:
        """Tokens in the tree."""
        return self.capacity - self._num_free

    def match(self, tokens: np.ndarray) -> Match:
        """Find the longest cached prefix of `tokens` (int64, one dimension)."""
        ready: list[np.ndarray] = []
        still_ready = True
        depth = 0
        for node, shared in self._walk(tokens):
            still_ready = still_ready and not node.pending
            if still_ready:
                ready.append(node.slots[:shared])
            depth += shared
        return Match(np.concatenate(ready) if ready else np.empty(0, np.int64), depth)

    def insert(self, tokens: np.ndarray) -> tuple[int, np.ndarray]:
        """Make room for the part of `tokens` that is not in the tree. Returns (where that part starts, its slots).

        The slots are pending: nobody is served from them until the caller has written their KV and called `settle`.
        There are fewer slots than tokens when the pool cannot hold more.
        """
        node, depth = self._root, 0
        for child, shared in self._walk(tokens):
            node = child if shared == len(child.slots) else self._split(child, shared)
            depth += shared
        # The new leaf will hang below `node`, so eviction must spare it.
        slots = self._allocate(len(tokens) - depth, keep=node)
        if len(slots):
            raw = tokens[depth : depth + len(slots)].tobytes()
            leaf = RadixNode(raw, slots, node, self._clock, pending=True)
            node.children[leaf.first] = leaf
            self._pending.append(leaf)
        return depth, slots

    def settle(self) -> None:
        """Mark all pending slots as ready, because their KV has been written."""
        for node in self._pending:
            node.pending = False
        self._pending.clear()

    def _walk(self, tokens: np.ndarray) -> list[tuple[RadixNode, int]]:
        """Return the nodes along `tokens` with how many tokens of each agree, and mark them as just used."""
        self._clock += 1
        path: list[tuple[RadixNode, int]] = []
        node, depth, num_tokens, size = self._root, 0, len(tokens), TOKEN_BYTES
        # Edges are compared as bytes, because most agree as a whole and numpy costs microseconds for each.
        raw = tokens.tobytes()
        while depth < num_tokens:
            child = node.children.get(raw[depth * size : (depth + 1) * size])
            if child is None:
                break
            child.last_used = self._clock
            length = len(child.slots)
            if raw[depth * size : (depth + length) * size] != child.raw:
                rest = tokens[depth : depth + length]
                differs = np.frombuffer(child.raw, tokens.dtype)[: len(rest)] != rest
                path.append((child, int(differs.argmax()) if differs.any() else len(rest)))
                break
            path.append((child, length))
            depth += length
            node = child
        return path

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        """Put a new parent with the first `at` tokens above `node`, which keeps the other tokens."""
        assert node.parent is not None
        assert 0 < at < len(node.slots)
        border = at * TOKEN_BYTES
        head = RadixNode(node.raw[:border], node.slots[:at], node.parent, node.last_used, node.pending)
        node.parent.children[head.first] = head
        node.raw, node.slots, node.parent = node.raw[border:], node.slots[at:], head
        head.children[node.first] = node
        if head.pending:
            self._pending.append(head)
        return head

    def _allocate(self, num: int, keep: RadixNode) -> np.ndarray:
        if num > self._num_free:
            self._evict(max(num - self._num_free, int(self.capacity * EVICT_SHARE)), keep)
        num = min(num, self._num_free)
        self._num_free -= num
        return self._free[self._num_free : self._num_free + num].copy()

    def _evict(self, num: int, keep: RadixNode) -> None:
        """Free at least `num` slots, oldest leaves first. Pending nodes, `keep` and those above it stay."""
        leaves = [(node.last_used, id(node), node) for node in self._leaves() if node is not keep and not node.pending]
        heapq.heapify(leaves)
        while num > 0 and leaves:
            _, _, leaf = heapq.heappop(leaves)
            assert leaf.parent is not None
            self._free[self._num_free : self._num_free + len(leaf.slots)] = leaf.slots
            self._num_free += len(leaf.slots)
            num -= len(leaf.slots)
            parent = leaf.parent
            del parent.children[leaf.first]
            if parent is not self._root and not parent.children and parent is not keep and not parent.pending:
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))

    def _leaves(self) -> list[RadixNode]:
        stack, leaves = list(self._root.children.values()), []
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.children:
                leaves.append(node)
        return leaves

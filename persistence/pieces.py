"""States cut into pieces that can be stored once and used by many checkpoints.

A state is cut at its structure: a list into runs of its items, a dict into
runs of its members, a long text or bytes into slices. Small neighbours share a
piece; what is larger than a piece should be is cut again. Where the cuts lie
depends on what stands before them and on nothing after, so a state that grows
at its end has the pieces it had before and a few new ones.

What remains is the *skeleton*, a JSON array that says how to put the pieces
together again. It names them by number, a run of them by its first and last:

====================  ==========================================================
``["v", value]``      the value itself, of a state too small to be cut
``["l", part, …]``    a list; likewise ``t`` a tuple, ``s`` a set, ``d`` a dict,
                      ``m`` a dict with keys that are no text (its items are pairs),
                      ``x`` a text, ``b`` bytes; ``o`` the one item of a piece
====================  ==========================================================

and a part is

====================  ==========================================================
``7``                 a piece: a few items as a list, a few members as a dict,
                      a slice of a text or of bytes
``[1, 1000]``         a run of pieces
``{"i": [1, 2]}``     the same as a piece holds, right here: too little for a piece
``{"n": […]}``        one item that is a skeleton of its own; of a dict with its key ``k``
====================  ==========================================================

``V`` and ``I`` in place of ``v`` and ``i``: the value holds tags (`persistence.codec`).
A piece is stored as any value is (`persistence.store`).
"""

from __future__ import annotations

import copy
import marshal
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from hashlib import blake2b
from itertools import chain, groupby, repeat
from math import isfinite
from operator import itemgetter
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw

from persistence import codec
from persistence.driver import MAX_VALUE_BYTES
from persistence.errors import InvalidValueError
from persistence.store import MAX_BYTES

__all__ = [
    "Cut",
    "Node",
    "Span",
    "assemble",
    "count",
    "covered",
    "cut",
    "digest",
    "runs",
    "spans_of",
    "subtract",
    "union",
]

_MOST_PIECES = 1 << 20
"""Of a state: fifty times as many as the largest one is cut into. Whoever reads counts them one by one."""
Span = tuple[int, int]
"""First and last of a run of numbers."""


class _Grain(NamedTuple):
    """How finely a state is cut, by its size: a number of pieces that can be handled either way."""

    state: int  # bytes of JSON up to which this holds
    group: int  # a piece is full at about this many
    leaf: int  # a member of more is cut itself
    item: int  # an item of a list of more: it seldom changes, and each that is cut takes room in the skeleton
    slice: int  # characters of a text, bytes of bytes


_GRAINS: Final = (
    _Grain(4 << 20, 256, 8 << 10, 32 << 10, 4 << 10),
    _Grain(MAX_BYTES, 16 << 10, 128 << 10, 128 << 10, 128 << 10),
)

_INLINE = 512  # of what is too little for a piece, this much stays in the skeleton
_UPPER_LEVELS = 4  # dicts within dicts, this deep, are cut however small: they hold the lists that grow
_UPPER_MEMBERS = 32  # but no more than so many of their members, which may be records that are kept by id
_DEEPEST = 400  # nodes in nodes: a skeleton nests twice as deep, in a head that is to be readable anywhere
_LONG_KEY = 128  # characters: longer ones are stored in pieces, not in the skeleton
_INT64 = 1 << 63
_MANY = 64  # numbers that are not looked at one by one
_NUMBER = 10  # about the bytes of one
_MEMO_ITEMS = 16_000
_FORMAT = b'{"f":1,"v":%b}'
_FRAME = len(_FORMAT % b"") + 1  # what a stored run of items has and the state has not; 1: "[…]" less ","
_MARSHAL_VERSION = 2  # later ones write the same value in ways that depend on who else refers to it
_FORMAT_TAGGED = b'{"f":1,"t":true,"v":%b}'

_encode = msgspec.json.Encoder().encode
_marshalled = marshal.dumps


class Node:
    """A container that is cut: its kind, and its parts in order.

    A part is the index of a piece, a text that stays in the skeleton, or a
    node (of a dict, with its key).
    """

    __slots__ = ("depth", "kind", "parts")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.depth = 1
        self.parts: list[int | Raw | tuple[Any, Node]] = []

    def add(self, key: Any, child: Node) -> None:
        """Add a node as a part."""
        self.parts.append((key, child))
        self.depth = max(self.depth, child.depth + 1)
        if self.depth > _DEEPEST:
            raise RecursionError

    def pieces(self) -> list[int]:
        """Return the indexes of its own pieces, in order."""
        return [part for part in self.parts if type(part) is int]

    def nodes(self) -> Iterator[Node]:
        """Yield this node and all below it, in order."""
        yield self
        for part in self.parts:
            if type(part) is tuple:
                yield from part[1].nodes()


class Remembered(msgspec.Struct, frozen=True):
    """What came of an item, or a run of them: about its bytes; of a piece also its stored form and digest."""

    size: int
    text: bytes = b""
    digest: bytes = b""


Memo = dict[bytes | tuple[bytes, ...], Remembered]
"""By copies of the items that `marshal` made, which are equal for equal items and for no others.

`marshal` tells all types apart that JSON has, refuses subclasses, and writes
nothing else as it writes those. Nothing is ever loaded from it. A string may
be written in two ways, so an item may be missed.
"""


class Cut(NamedTuple):
    """A state in pieces: the stored form of each, and its digest; the bytes of the whole as JSON."""

    root: Node
    texts: list[bytes]
    digests: list[bytes]
    size: int
    memo: Memo
    """What to give to `cut` with the state that follows: its unchanged items cost a third then."""

    def skeleton(self, numbers: Sequence[int]) -> bytes:
        """Return the skeleton, with the numbers that the pieces got."""
        return _encode(_drawn(self.root, numbers))


def digest(text: bytes) -> bytes:
    """Return what tells the stored form of a piece from every other."""
    return blake2b(text, digest_size=16).digest()


def cut(state: Any, memo: Memo | None = None) -> Cut:
    """Cut a state. Raises `InvalidValueError` for what cannot be stored exactly, or is too large.

    It does not wait for anything, so the state cannot change meanwhile.
    """
    for grain in _GRAINS:
        cutter = _Cutter(grain, memo or {})
        try:
            return cutter.cut(state)
        except _TooLargeError:
            continue
        except InvalidValueError:
            codec.encode(state)  # names the place within the whole
            raise
        except RecursionError:
            return _uncut(state)
    message = f"the state has more than {MAX_BYTES:,} bytes as JSON, which is the limit"
    raise InvalidValueError(message)


def _uncut(state: Any) -> Cut:
    """Make one piece of a state that has no parts, or is nested deeper than can be walked."""
    text, tagged = codec.encode([state])
    piece = (_FORMAT_TAGGED if tagged else _FORMAT) % text
    try:
        msgspec.json.decode(b"[%b]" % piece)  # what cannot be read back is refused
    except RecursionError as error:
        message = "the value is nested too deeply"
        raise InvalidValueError(message) from error
    if len(piece) > MAX_VALUE_BYTES:
        message = f"the state has {len(piece):,} bytes and cannot be cut"
        raise InvalidValueError(message)
    root = Node("o")
    root.parts.append(0)
    return Cut(root, [piece], [digest(piece)], len(text) - 2, {})


class _TooLargeError(Exception):
    """The state is too large for this grain."""


class _Cutter:
    """Cuts one state. Every value in it is looked at once and encoded once."""

    def __init__(self, grain: _Grain, memo: Memo) -> None:
        self.grain = grain
        self.leaf = grain.leaf
        self.memo = memo
        self.learnt: Memo = {}
        self.texts: list[bytes] = []
        self.digests: list[bytes] = []
        self.inline = _INLINE
        self.size = 0
        self.exotic = False  # something since it was reset is not plain JSON

    def cut(self, state: Any) -> Cut:
        found = self._visit(state, self.grain.group, _UPPER_LEVELS)
        if not isinstance(found, Node):
            text, tagged = self._encoded(state, self.exotic)
            if len(text) > self.leaf:  # a single Decimal, say, of very many digits
                return _uncut(state)
            root = Node("V" if tagged else "v")
            root.parts.append(Raw(text))
            return Cut(root, [], [], len(text), {})
        return Cut(found, self.texts, self.digests, self.size, self.learnt)

    # ---- looking: returns about how many bytes a value has, or the node that it was cut into

    def _visit(self, value: Any, limit: int, levels: int) -> int | Node:
        kind = type(value)
        if kind is str:
            return len(value) + 2 if len(value) <= self.leaf else self._sliced("x", value)
        if kind is dict:
            return self._members(value, limit, levels)
        if kind is list:
            return self._items("l", value, value, limit)
        if value is None or kind is bool:
            return 4
        if kind is int:
            if not -_INT64 <= value < 2 * _INT64:
                self.exotic = True
                return int(value).bit_length() // 4
            return 8
        if kind is float:
            if not isfinite(value):
                self.exotic = True
            return 12
        return self._exotic(value, limit, levels)

    def _exotic(self, value: Any, limit: int, levels: int) -> int | Node:
        found = self._visit_exotic(value, limit, levels)
        self.exotic = not isinstance(found, Node)
        return found

    def _visit_exotic(self, value: Any, limit: int, levels: int) -> int | Node:
        # Subclasses too: the codec gives them back as the type itself.
        match value:
            case str():
                if len(value) <= self.leaf:
                    return len(value) + 2
                return self._sliced("x", str.__str__(value))  # a subclass may show itself otherwise
            case bytes():
                return len(value) * 4 // 3 if len(value) <= self.leaf else self._sliced("b", value)
            case dict():
                return self._members(value, limit, levels)
            case list():
                return self._items("l", value, list(value), limit)
            case tuple():
                return self._items("t", value, list(value), limit)
            case set():
                return self._items("s", value, list(value), limit)
            case Decimal():
                return len(value.as_tuple().digits) + 64
        return 64

    def _members(self, value: dict[Any, Any], limit: int, levels: int) -> int | Node:
        leaf = self.leaf
        exotic = self.exotic
        if value:
            if not set(map(type, value)) <= {str}:
                if not all(isinstance(key, str) for key in value):
                    return self._pairs(value, limit)
                exotic = True
            if max(map(len, value)) > _LONG_KEY:
                return self._pairs(value, limit)
        small = 8 * self.grain.group if levels > 0 else leaf
        total = 2
        sizes: list[int | Node] = []
        exotics: list[bool] = []
        cut = False
        for place, (key, item) in enumerate(value.items()):
            self.exotic = exotic
            if type(item) is str and len(item) <= leaf:
                size: int | Node = len(item) + 2
            else:
                size = self._visit(item, small if place < _UPPER_MEMBERS else leaf, levels - 1)
            sizes.append(size)
            exotics.append(self.exotic)
            if type(size) is int:
                total += size + len(key) + 4
            else:
                cut = True
        if not cut and total <= limit:
            self.exotic = exotic or True in exotics
            return total
        self.exotic = exotic
        return self._cut_members(value, sizes, exotics)

    def _pairs(self, value: dict[Any, Any], limit: int) -> int | Node:
        pairs = [list(pair) for pair in value.items()]
        found = self._items("m", value, pairs, limit)
        if not isinstance(found, Node):
            self.exotic = True
        return found

    def _items(self, kind: str, value: Any, items: list[Any], limit: int) -> int | Node:
        if len(items) > _MANY and _numbers(items):
            return self._cut_numbers(kind, items, limit)
        outside, self.leaf = self.leaf, self.grain.item
        exotic = self.exotic
        total = 2
        sizes: list[int | Node] = []
        exotics = bytearray()
        cut = False
        copies = self._copies(items) if limit < self.grain.leaf and len(items) <= _MEMO_ITEMS else None
        known = None if copies is None else list(map(self.memo.get, copies))
        for item, old in zip(items, known or repeat(None), strict=False):
            if old is not None:
                sizes.append(old.size)
                exotics.append(False)
                total += old.size + 1
                continue
            self.exotic = False
            size = self._visit(item, self.leaf, 0)
            sizes.append(size)
            exotics.append(self.exotic)
            if type(size) is int:
                total += size + 1
            else:
                cut = True
        self.leaf = outside
        if not cut and total <= limit:
            self.exotic = exotic or 1 in exotics
            return total
        self.exotic = exotic
        if copies is not None and known is not None:
            for copied, old, size, exotic_item in zip(copies, known, sizes, exotics, strict=True):
                if old is not None:
                    self.learnt[copied] = old
                elif type(size) is int and not exotic_item:
                    self.learnt[copied] = Remembered(size)
        return self._cut_items(kind, items, sizes, exotics, copies)

    def _copies(self, items: list[Any]) -> list[bytes] | None:
        try:
            return list(map(_marshalled, items, repeat(_MARSHAL_VERSION)))
        except ValueError:  # there is something that JSON has not
            return None

    def _cut_numbers(self, kind: str, items: list[Any], limit: int) -> int | Node:
        """Do what `_items` does, for very many numbers without looking at each."""
        if 2 + len(items) * _NUMBER <= limit:
            return 2 + len(items) * _NUMBER
        if 2 * len(items) > self.grain.state:
            raise _TooLargeError
        node = Node(kind)
        self._add(1)
        step = self.grain.group // _NUMBER
        for at in range(0, len(items), step):
            batch = items[at : at + step]
            self._store(node, batch, len(batch) * _NUMBER, False)
        return node

    # ---- cutting

    def _cut_items(
        self,
        kind: str,
        items: list[Any],
        sizes: list[int | Node],
        exotics: bytearray,
        copies: list[bytes] | None,
    ) -> Node:
        node = Node(kind)
        full = self.grain.group
        self._add(1)  # two brackets, less the comma that follows no last item
        first = weight = 0
        exotic = False
        for at, size in enumerate(sizes):
            if type(size) is int:
                weight += size + 1
                if exotics[at]:
                    exotic = True
                if weight < full:
                    continue
                last = at + 1
            else:
                last = at
            if first < last:
                run = None if copies is None or exotic or weight < full else tuple(copies[first:last])
                if run is None:
                    self._store(node, items[first:last], weight, exotic)
                elif (old := self.memo.get(run)) is not None:
                    self._append(node, old.text, old.digest)
                    self._add(len(old.text) - _FRAME)
                    self.learnt[run] = old
                else:
                    self._store(node, items[first:last], weight, exotic)
                    self.learnt[run] = Remembered(weight, self.texts[-1], self.digests[-1])
            if last == at:
                self._add(1)
                node.add(None, sizes[at])  # type: ignore[arg-type]  # a Node
            first, weight, exotic = at + 1, 0, False
        if first < len(items):
            self._store(node, items[first:], weight, exotic)
        return node

    def _cut_members(self, value: dict[Any, Any], sizes: list[int | Node], exotics: list[bool]) -> Node:
        node = Node("d")
        full = self.grain.group
        self._add(1)
        batch: dict[Any, Any] = {}
        weight = 0
        exotic = False
        for (key, item), size, exotic_item in zip(value.items(), sizes, exotics, strict=True):
            if isinstance(size, Node):
                if batch:
                    self._store(node, batch, weight, exotic)
                    batch, weight, exotic = {}, 0, False
                # Encoded for the sake of the check: half a surrogate pair.
                text = str.__str__(key)  # a subclass may show itself otherwise
                self._add(len(self._encoded(text, exotic_item)[0]) + 2)
                node.add(text, size)
                continue
            batch[key] = item
            weight += size + len(key) + 4
            exotic = exotic or exotic_item
            if weight >= full:
                self._store(node, batch, weight, exotic)
                batch, weight, exotic = {}, 0, False
        if batch:
            self._store(node, batch, weight, exotic)
        return node

    def _sliced(self, kind: str, value: str | bytes) -> Node:
        node = Node(kind)
        self._add(2)
        step = self.grain.slice
        for at in range(0, len(value), step):
            self._store(node, value[at : at + step], step, kind == "b")
            self._add(-1)
        return node

    def _store(self, node: Node, batch: Any, weight: int, exotic: bool) -> None:
        """Make a piece of `batch`, or leave it in the skeleton."""
        text, tagged = self._encoded(batch, exotic)
        self._add(len(text) - 1)  # without its brackets, with a comma
        if weight < self.grain.group and len(text) <= self.inline:
            self.inline -= len(text)
            node.parts.append(Raw(b'{"%b":%b}' % (b"I" if tagged else b"i", text)))
            return
        text = (_FORMAT_TAGGED if tagged else _FORMAT) % text
        if len(text) > MAX_VALUE_BYTES:
            message = f"a single value has {len(text):,} bytes and cannot be cut"
            raise InvalidValueError(message)
        self._append(node, text, digest(text))

    def _append(self, node: Node, text: bytes, digest: bytes) -> None:
        node.parts.append(len(self.texts))
        self.texts.append(text)
        self.digests.append(digest)

    def _encoded(self, batch: Any, exotic: bool) -> tuple[bytes, bool]:
        if not exotic:
            # All of exactly the types that JSON has: nothing can be lost, so nothing is compared.
            try:
                return _encode(batch), False
            except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
                pass  # the codec names the place
        return codec.encode(batch)

    def _add(self, size: int) -> None:
        self.size += size
        if self.size > self.grain.state:
            raise _TooLargeError


def _numbers(items: list[Any]) -> bool:
    """Tell whether all items are plain numbers: finite, integers of 64 bits at most."""
    kinds = set(map(type, items))
    if not kinds <= {int, float}:
        return False
    try:
        if not all(map(isfinite, items)):
            return False
        return int not in kinds or (min(items) >= -_INT64 and max(items) < 2 * _INT64)
    except OverflowError:
        return False


def _drawn(node: Node, numbers: Sequence[int]) -> list[Any]:
    drawn: list[Any] = [node.kind]
    own: list[int] = []  # numbers of pieces that stand next to each other
    for is_piece, parts in groupby(node.parts, key=_is_piece):
        if is_piece:
            own = list(map(numbers.__getitem__, parts))  # type: ignore[arg-type]  # they are indexes
            if own == list(range(own[0], own[0] + len(own))):  # most often
                drawn.append(own[0] if len(own) == 1 else [own[0], own[-1]])
            else:
                drawn += _in_runs(own)
            continue
        for part in parts:
            if isinstance(part, Raw):
                drawn.append(part)
            else:
                key, child = part  # type: ignore[misc]
                below = _drawn(child, numbers)
                drawn.append({"n": below} if key is None else {"k": key, "n": below})
    return drawn


def _is_piece(part: Any) -> bool:
    return type(part) is int


def _in_runs(numbers: Sequence[int]) -> list[Any]:
    """Return numbers in their order, those that follow each other as runs."""
    found: list[Any] = []
    first = last = numbers[0]
    for number in (*numbers[1:], None):
        if number == last + 1:
            last += 1
            continue
        found.append(first if first == last else [first, last])
        if number is not None:
            first = last = number
    return found


# ---- putting together


def spans_of(skeleton: Sequence[Any]) -> list[Span]:
    """Return the numbers of all pieces that a skeleton names: sorted, apart from each other."""
    found: list[Span] = []
    _collect(skeleton, found)
    spans = union(found)
    if (pieces := count(spans)) > _MOST_PIECES:
        message = f"it names {pieces:,} pieces"
        raise ValueError(message)
    return spans


def _collect(skeleton: Sequence[Any], found: list[Span]) -> None:
    for part in skeleton[1:] if skeleton[0] not in ("v", "V") else ():
        if type(part) is int:
            found.append((part, part))
        elif type(part) is list:
            first, last = part
            if not (type(first) is type(last) is int and first <= last):
                message = f"a run from {first} to {last}"
                raise ValueError(message)
            found.append((first, last))
        elif "n" in part:
            _collect(part["n"], found)


def assemble(skeleton: Sequence[Any], values: Mapping[int, Any]) -> Any:
    """Return the state of a skeleton. Raises KeyError for a piece that is not among `values`.

    What the pieces hold becomes part of the state.
    """
    return _Assembler(values).value(skeleton)


class _Assembler:
    def __init__(self, values: Mapping[int, Any]) -> None:
        self.values = values
        self.used: set[int] = set()

    def value(self, skeleton: Sequence[Any]) -> Any:
        kind = skeleton[0]
        if kind in ("v", "V"):
            return skeleton[1] if kind == "v" else _untagged(skeleton[1])
        if kind == "d":
            members: dict[Any, Any] = {}

            def fill(pieces: Iterable[Any]) -> None:
                for piece in pieces:
                    members.update(piece)

            self._fill(skeleton, fill, lambda part, value: members.update({part["k"]: value}))
            return members
        if kind in ("x", "b"):
            slices: list[Any] = []
            self._fill(skeleton, slices.extend, _no_node)
            return "".join(slices) if kind == "x" else b"".join(slices)
        items: list[Any] = []
        self._fill(
            skeleton,
            lambda pieces: items.extend(chain.from_iterable(pieces)),
            lambda _, value: items.append(value),
        )
        return _CONTAINERS[kind](items)

    def _fill(
        self,
        skeleton: Sequence[Any],
        add: Callable[[list[Any]], object],
        add_node: Callable[[Any, Any], object],
    ) -> None:
        for part in skeleton[1:]:
            if type(part) is int:
                add(self._pieces(part, part))
            elif type(part) is list:
                add(self._pieces(part[0], part[1]))
            elif "n" in part:
                add_node(part, self.value(part["n"]))
            else:
                add([part["i"] if "i" in part else _untagged(part["I"])])

    def _pieces(self, first: int, last: int) -> list[Any]:
        numbers = range(first, last + 1)
        found = list(map(self.values.__getitem__, numbers))
        if not self.used.isdisjoint(numbers):  # equal parts of a state are one piece, but not one object
            found = [
                copy.deepcopy(piece) if number in self.used else piece
                for number, piece in zip(numbers, found, strict=True)
            ]
        self.used.update(numbers)
        return found


def _list(items: list[Any]) -> list[Any]:
    return items


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


_CONTAINERS: Final[dict[str, Callable[[list[Any]], Any]]] = {
    "l": _list,
    "t": tuple,
    "s": set,
    "m": dict,
    "o": _only,
}


def _no_node(part: Any, value: Any) -> None:
    message = "a slice is no container"
    raise ValueError(message)


def _untagged(value: Any) -> Any:
    return codec.decode(_encode(value), True)


# ---- runs of numbers


def runs(numbers: Iterable[int]) -> list[Span]:
    """Return numbers as runs, sorted."""
    return union((number, number) for number in numbers)


def union(spans: Iterable[Span]) -> list[Span]:
    """Return the numbers that are in any of `spans`, as runs that are sorted and apart."""
    joined: list[Span] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1] + 1:
            if last > joined[-1][1]:
                joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def subtract(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return the numbers in `spans` that are not in `others`; both are sorted and apart."""
    left: list[Span] = []
    for first, last in spans:
        at = bisect_left(others, first, key=itemgetter(1))
        while at < len(others) and others[at][0] <= last:
            if others[at][0] > first:
                left.append((first, others[at][0] - 1))
            first = others[at][1] + 1
            at += 1
        if first <= last:
            left.append((first, last))
    return left


def count(spans: Iterable[Span]) -> int:
    """Return how many numbers there are in `spans`."""
    return sum(last - first + 1 for first, last in spans)


def covered(number: int, spans: Sequence[Span]) -> bool:
    """Tell whether `number` is in `spans` (sorted and apart)."""
    at = bisect_left(spans, number, key=itemgetter(1))
    return at < len(spans) and spans[at][0] <= number

"""Values as JSON, exactly: what comes out equals what went in, type by type, or it is refused.

Plain JSON values are written as they are, at C speed: encode, decode,
compare. Only where that loses something the value is walked and the closed
set of types below is *tagged*: an object with one member, whose name starts
with ``$``.

========================  ==============================================
``{"$bytes": "aGk="}``    bytes
``{"$tuple": [1, 2]}``    tuple
``{"$set": [1, 2]}``      set
``{"$datetime": [...]}``  datetime: ISO text, fold, name of the time zone
``{"$date": "..."}``      date
``{"$uuid": "..."}``      UUID
``{"$decimal": "1.50"}``  Decimal
``{"$float": "nan"}``     NaN, inf, -inf
``{"$int": "0x1f"}``      integers past 64 bits
``{"$map": [[k, v]]}``    a dict with keys that are no text, or that looks tagged
========================  ==============================================

The caller keeps the flag that says whether a text holds tags; without it
nothing is untagged, so that a user's own ``{"$bytes": …}`` stays itself.

Subclasses of these types come back as the type itself (a namedtuple as a
tuple, an IntEnum member as an int); time zones that are neither UTC, a fixed
offset nor a ZoneInfo come back as their offset.

A value may be nested 500 deep, 200 where it holds tags, so that every version
of Python can read it, on a stack that is somewhat deeper too.
"""

from __future__ import annotations

import base64
import binascii
import math
import uuid
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from persistence.errors import InvalidValueError

__all__ = ["decode", "encode"]

_encode_json = msgspec.json.Encoder().encode
_decode_json = msgspec.json.Decoder().decode

_TEXT = frozenset({str})
_EXACT = frozenset({str, bool, type(None)})  # what can be encoded of these comes back as it is
_CONTAINERS = frozenset({dict, list})
_INT64 = 1 << 63
_TOO_DEEP = "the value is nested too deeply, or holds itself"
_MAX_DEPTH = 500  # what 3.11 can read has to share its limit of 1,000 with the reader's stack
_MAX_TAGGED_DEPTH = 200  # taking tags off needs up to three frames a level


def encode(value: Any) -> tuple[bytes, bool]:
    """Return `value` as JSON, and whether the text holds tags.

    Raises `InvalidValueError`, naming the place, for what cannot come back as it is.
    """
    try:
        text = _encode_json(value)
        if (
            type(value) is dict
            and _EXACT.issuperset(map(type, value.values()))
            and _TEXT.issuperset(map(type, value))
        ):
            return text, False  # most messages: half the time
        # == is exact here: True and 1 and 1.0 are equal to each other, but JSON
        # tells them apart, so what is read back never has the one where `value` has the other.
        found = _decode_json(text)
        if value == found:
            if _may_be_deep(text) and _is_deep(found):
                raise InvalidValueError(_TOO_DEEP)
            return text, False
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
        pass  # told apart below, with the place of the culprit
    except RecursionError as error:
        raise InvalidValueError(_TOO_DEEP) from error
    try:
        return _encode_json(_tagged(value, "", 0)), True
    except RecursionError as error:
        raise InvalidValueError(_TOO_DEEP) from error


def decode(text: bytes | msgspec.Raw, tagged: bool) -> Any:
    """Return the value of a text that `encode` made; raise ValueError if it is none."""
    try:
        value = _decode_json(text)
        return _untagged(value) if tagged else value
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        message = f"malformed tag: {error}"
        raise ValueError(message) from error


def _may_be_deep(text: bytes) -> bool:
    """Tell whether a text has more brackets than one nested as deeply as is allowed."""
    if len(text) <= 2 * _MAX_DEPTH:
        return False
    # Unlike count(), replace() skips from hit to hit, and stops: a fifth of the time.
    lists, objects = (len(text) - len(text.replace(sign, b"", _MAX_DEPTH + 1)) for sign in (b"[", b"{"))
    return lists + objects > _MAX_DEPTH


def _is_deep(value: Any) -> bool:
    """Tell whether plain JSON is nested too deeply. It goes level by level: it may be too deep to go down."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _CONTAINERS
        ]
        if not level:
            return False
    return True


def _tagged(value: Any, place: str, depth: int) -> Any:
    if depth > _MAX_TAGGED_DEPTH:
        raise InvalidValueError(_TOO_DEEP)
    depth += 1
    # Subclasses may show themselves otherwise (a member of a `str, Enum` as
    # "Color.RED"): the base type's own methods tell what is stored.
    match value:
        case None | bool():
            return value
        case str():
            return _text(value, place)
        case int():
            number = int.__int__(value)
            return number if -_INT64 <= number < 2 * _INT64 else {"$int": hex(number)}
        case float():
            real = float.__float__(value)
            return real if math.isfinite(real) else {"$float": repr(real)}
        case dict():
            return _tagged_dict(value, place, depth)
        case list():
            return [_tagged(item, f"{place}[{index}]", depth) for index, item in enumerate(value)]
        case tuple():
            return {"$tuple": [_tagged(item, f"{place}[{index}]", depth) for index, item in enumerate(value)]}
        case set():
            return {"$set": [_tagged(item, f"{place}{{…}}", depth) for item in value]}
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case datetime():
            zone = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else None
            return {"$datetime": [datetime.isoformat(value), value.fold, zone]}
        case date():
            return {"$date": date.isoformat(value)}
        case uuid.UUID():
            return {"$uuid": str(value)}
        case Decimal():
            return {"$decimal": Decimal.__str__(value)}
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    message = f"a value of type {kind}{f' at {place}' if place else ''} cannot be stored exactly"
    raise InvalidValueError(message)


def _tagged_dict(value: dict[Any, Any], place: str, depth: int) -> dict[str, Any]:
    if all(isinstance(key, str) for key in value) and not _looks_tagged(value):
        return {_text(key, place): _tagged(item, f"{place}.{key}", depth) for key, item in value.items()}
    pairs = []
    for key, item in value.items():
        shown = _shown(key)
        pairs.append([_tagged(key, f"{place} key {shown}", depth), _tagged(item, f"{place}[{shown}]", depth)])
    return {"$map": pairs}


def _shown(key: Any) -> str:
    try:
        return f"{key!r:.80}"
    except ValueError:  # a number of too many digits to be written out
        return f"({type(key).__name__})"


def _looks_tagged(value: dict[Any, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


def _text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text{f' at {place}' if place else ''} holds half a surrogate pair: no valid Unicode"
        raise InvalidValueError(message) from error
    return str.__str__(text)


def _untagged(value: Any) -> Any:
    if type(value) is list:
        return [_untagged(item) for item in value]
    if type(value) is not dict:
        return value
    if not _looks_tagged(value):
        return {key: _untagged(item) for key, item in value.items()}
    ((tag, content),) = value.items()
    return _UNTAG[tag](content)


def _datetime(content: Any) -> datetime:
    text, fold, zone = content
    moment = datetime.fromisoformat(text)
    if zone is not None:
        try:
            # The text has the offset too; the zone alone decides, as it did before.
            moment = moment.replace(tzinfo=ZoneInfo(zone))
        except (ZoneInfoNotFoundError, OSError):
            return moment.replace(fold=fold)  # a machine without this zone: the same instant, by its offset
    return moment.replace(fold=fold)


def _bytes(content: Any) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def _list(content: Any) -> list[Any]:
    if type(content) is not list:
        message = "its content is no list"
        raise TypeError(message)
    return content


def _decimal(content: Any) -> Decimal:
    try:
        return Decimal(content)
    except InvalidOperation as error:
        message = f"no decimal number: {content!r:.80}"
        raise ValueError(message) from error


_UNTAG: dict[str, Callable[[Any], Any]] = {
    "$bytes": _bytes,
    "$date": date.fromisoformat,
    "$datetime": _datetime,
    "$decimal": _decimal,
    "$float": float,
    "$int": lambda content: int(content, 16),
    "$map": lambda content: {_untagged(key): _untagged(item) for key, item in _list(content)},
    "$set": lambda content: {_untagged(item) for item in _list(content)},
    "$tuple": lambda content: tuple(_untagged(item) for item in _list(content)),
    "$uuid": uuid.UUID,
}

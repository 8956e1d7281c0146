"""The records that the repositories keep. Times are integers, Unix milliseconds.

A field that this library does not know is kept in `extra` and given back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import msgspec

from persistence.driver import ABSENT
from persistence.errors import InvalidValueError
from persistence.ids import now_ms

__all__ = [
    "ContainerRecord",
    "ImageRecord",
    "LLMProviderRecord",
    "PrototypeRecord",
    "Record",
    "SessionRecord",
]

_MASK = "***"


class Record(msgspec.Struct, kw_only=True, eq=False, forbid_unknown_fields=True):
    """What all records have.

    `version` is what the store knows the record by: give it as
    ``expected_version=`` when you save to be told if somebody else was faster.
    It is 0 in a record that was not read from a store, and takes no part in
    comparisons. `created_at` and `updated_at` are Unix milliseconds.
    """

    secret: ClassVar[frozenset[str]] = frozenset()
    """Fields whose content is never shown."""

    created_at: int = msgspec.field(default_factory=now_ms)
    updated_at: int = msgspec.field(default_factory=now_ms)
    # Neither is stored. A stored field of such a name goes to `extra`: the limits are there so that a
    # decoder refuses one that could not be told from the default.
    extra: Annotated[dict[str, Any], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=dict)
    version: Annotated[int, msgspec.Meta(ge=1)] = ABSENT

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> Self:
        """Return the record of these fields; raise `InvalidValueError` for a missing or mistyped one."""
        stored = cls._stored_fields()
        known = {name: value for name, value in fields.items() if name in stored}
        try:
            record = msgspec.convert(known, cls)
        # The last two: half a surrogate pair where a number is wanted; something unlike a mapping.
        except (msgspec.ValidationError, UnicodeError, AttributeError) as error:
            message = f"{cls.__name__}: {error}"
            raise InvalidValueError(message) from error
        record.extra = {name: value for name, value in fields.items() if name not in known}
        return record

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields to store, those of `extra` included, those that are None left out."""
        if not isinstance(self.extra, Mapping):
            message = f"{type(self).__name__}: extra must be a mapping, not {type(self.extra).__name__}"
            raise InvalidValueError(message)
        fields = {name: getattr(self, name) for name in self._stored_fields()}
        return {**self.extra, **{name: value for name, value in fields.items() if value is not None}}

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Record):
            return NotImplemented
        return self.to_mapping() == other.to_mapping()

    def __ne__(self, other: object) -> bool:
        # Struct brings a comparison of its own, which would not ask __eq__.
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # a record can be changed

    def __rich_repr__(self) -> Any:
        for name in (*self._stored_fields(), "version"):
            value = getattr(self, name)
            if value is not None:
                yield name, _shown(name, value, self.secret)
        if self.extra:
            yield "extra", _masked(self.extra)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"

    @classmethod
    @functools.cache
    def _stored_fields(cls) -> tuple[str, ...]:
        return tuple(name for name in cls.__struct_fields__ if name not in ("extra", "version"))


class ContainerRecord(Record):
    """A container: the tenant, workspace or project that images and sessions belong to."""

    container_id: str
    config: dict[str, Any] | None = None


class ImageRecord(Record):
    """An image: a configured agent."""

    image_id: str
    container_id: str
    session_id: str
    name: str
    description: str | None = None
    system_prompt: str | None = None
    parent_image_id: str | None = None
    mcp_servers: dict[str, dict[str, Any]] | None = None
    metadata: dict[str, Any] | None = None
    role_id: str | None = None
    os_id: str | None = None
    model: str | None = None
    prototype_id: str | None = None
    thinking: str | None = None
    provider_options: dict[str, Any] | None = None
    custom_data: dict[str, Any] | None = None


class SessionRecord(Record):
    """A session: one conversation of an image.

    A fork names its source in `parent_session_id`, and in `parent_seq` the
    number of the last message that it took over (0: none). From the time
    `expires_at` (Unix milliseconds) on, where it is given, the session is not
    found any more.
    """

    session_id: str
    image_id: str
    container_id: str
    parent_session_id: str | None = None
    parent_seq: int | None = None
    expires_at: int | None = None


class PrototypeRecord(Record):
    """A prototype: a template that images are made from."""

    prototype_id: str
    container_id: str
    name: str
    description: str | None = None
    role_id: str | None = None
    model: str | None = None
    system_prompt: str | None = None
    mcp_servers: dict[str, dict[str, Any]] | None = None
    thinking: str | None = None
    provider_options: dict[str, Any] | None = None
    custom_data: dict[str, Any] | None = None


class LLMProviderRecord(Record):
    """An account at a provider of language models. The key is never shown, but stored as it is."""

    secret: ClassVar[frozenset[str]] = frozenset({"api_key"})

    id: str
    container_id: str
    name: str
    vendor: str
    protocol: str
    api_key: str
    base_url: str | None = None
    model: str | None = None
    is_default: bool = False


def _shown(name: str, value: Any, secret: frozenset[str]) -> Any:
    if name in secret:
        return _MASK
    if name == "mcp_servers":  # their environments and headers hold tokens
        return _masked(value)
    return value


def _masked(fields: Any) -> Any:
    return dict.fromkeys(fields, _MASK) if isinstance(fields, Mapping) else _MASK

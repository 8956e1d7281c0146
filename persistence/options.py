"""What the constructors of drivers have in common: option checks, URLs, missing clients."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from persistence.errors import ConfigurationError, PersistenceError, UnavailableError, shown

__all__ = [
    "Durability",
    "SplitURL",
    "check_address",
    "check_durability",
    "check_files",
    "check_identifier",
    "check_namespace",
    "check_pool_size",
    "check_seconds",
    "flag",
    "is_text",
    "masked_url",
    "missing_client",
    "path_text",
    "split_url",
    "take_apart",
    "unapplied",
    "untrusted",
    "url_or_address",
]

Durability: TypeAlias = Literal["power", "process"]
"""An acknowledged write survives the loss of the machine's power, or only the end of the process."""

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,63}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_MOST_CONNECTIONS = 10_000
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNTRUSTED = re.compile(r"certificate verify failed: ([^(]+)|\[(?:X509|PEM): \w+\] ([^(]+)")


def check_namespace(namespace: str) -> str:
    """Return `namespace`; raise `ConfigurationError` unless it is 1 to 63 of ``A-Za-z0-9_-``."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        message = f"namespace={shown(namespace)}: use 1 to 63 letters, digits, '_' or '-'"
        raise ConfigurationError(message)
    return namespace


def check_durability(durability: str) -> Durability:
    """Return `durability`; raise `ConfigurationError` unless it is "power" or "process"."""
    if durability not in ("power", "process"):
        message = f"durability={shown(durability)}: use 'power' or 'process'"
        raise ConfigurationError(message)
    return cast("Durability", durability)


def check_identifier(name: str, option: str) -> str:
    """Return `name` if it is a plain SQL identifier, else raise `ConfigurationError` naming `option`."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        message = f"{option}={shown(name)}: use a letter or '_', then up to 62 letters, digits or '_'"
        raise ConfigurationError(message)
    return name


def check_pool_size(pool_size: int) -> None:
    """Raise `ConfigurationError` unless `pool_size` is a whole number from 1 to 10,000."""
    if type(pool_size) is not int or not 1 <= pool_size <= _MOST_CONNECTIONS:
        message = f"pool_size={shown(pool_size)}: use a whole number from 1 to {_MOST_CONNECTIONS:,}"
        raise ConfigurationError(message)


def check_seconds(option: str, seconds: float, least: float = 0.001) -> None:
    """Raise `ConfigurationError` that names `option` unless `seconds` is from `least` to 86,400."""
    if type(seconds) not in (int, float) or not least <= seconds <= 86_400:
        message = f"{option}={shown(seconds)}: use {least} to 86400 seconds"
        raise ConfigurationError(message)


def check_address(
    driver: str,
    host: str | None,
    port: int | None,
    user: str | None,
    password: str | None,
    database: str | None,
) -> None:
    """Raise `ConfigurationError` that names the one of these that is no text, or no port, and shows none."""
    texts = {"host": host, "user": user, "password": password, "database": database}
    for option, text in texts.items():
        if text is not None and not is_text(text):
            message = f"{driver}: {option} must be a text of valid Unicode, not {type(text).__name__}"
            raise ConfigurationError(message)
    if port is not None and (type(port) is not int or not 0 < port < 1 << 16):
        message = f"{driver}: port={shown(port)}: use a whole number from 1 to 65535"
        raise ConfigurationError(message)


def is_text(value: object) -> bool:
    """Tell whether `value` is a text that can be written as UTF-8."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def path_text(path: str | os.PathLike[str]) -> str:
    """Return `path` as a text; raise `ConfigurationError` for what is no path, or no file can be called."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        message = f"path={shown(path)}: use a text or a pathlib.Path, not empty and without NUL"
        raise ConfigurationError(message)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        message = f"path={shown(path)}: no file system has such a name"
        raise ConfigurationError(message) from error
    return text


def missing_client(driver: str, module: str) -> ConfigurationError:
    """Return the error for a driver whose client library is not installed."""
    return ConfigurationError(
        f"the {driver} driver needs the package {module!r}: run  pip install 'agent-persistence[{driver}]'"
    )


async def check_files(driver: str, url: str | None, options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `ConfigurationError` if one of the options `names`, in the URL or not, is no file to be read."""
    given = {**dict(parse_qsl(urlsplit(url or "").query)), **options}
    for name in names:
        path = given.get(name)
        if path is not None and not (is_text(path) and await asyncio.to_thread(_readable, path)):
            message = f"{driver}: {name}={shown(path)} is no file that can be read"
            raise ConfigurationError(message)


def _readable(path: str) -> bool:
    return "\0" not in path and os.access(path, os.R_OK)


def untrusted(error: BaseException | None, driver: str, option: str) -> ConfigurationError | None:
    """Return the error for a certificate that was not accepted, None if `error` is any other.

    `option` is the one that names the authority to trust.
    """
    while error is not None:
        if reason := _UNTRUSTED.search(str(error)):  # not every client keeps the ssl module's own error
            message = f"{driver}: the server's certificate is not trusted: {reason[1] or reason[2]}".strip()
            return ConfigurationError(f"{message}; {option} names a file with the authority to trust")
        error = error.__cause__ or error.__context__
    return None


def unapplied(error: PersistenceError, *, certain: bool = True) -> PersistenceError:
    """Return what a `commit` raises, noting whether it is `certain` that none of its Writes was applied."""
    if isinstance(error, UnavailableError):
        error.unapplied = certain
    return error


def flag(text: str) -> bool:
    """Read a yes or no out of an URL; raise ValueError for anything else."""
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


class SplitURL(NamedTuple):
    """An URL, taken apart.

    `options` holds the query options that the driver knows, converted;
    `url` is the URL without them, with whatever is left of the query.
    """

    parts: SplitResult
    options: dict[str, Any]
    url: str

    @property
    def path(self) -> str:
        """The path, percent-decoded, without the slash that ends the authority."""
        return unquote(self.parts.path[1:], errors="strict")


def take_apart(url: str) -> SplitResult:
    """Return the parts of `url`; refuse one that would be taken apart in the middle of its password."""
    if not isinstance(url, str):
        message = f"{type(url).__name__} is no URL: pass a client or pool as client=…"
        raise ConfigurationError(message)
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = None  # not even as the cause: it quotes the password
    if parts is None or (parts.netloc and "@" in parts.path + parts.query + parts.fragment):
        message = f"{masked_url(url)!r} is no URL; percent-encode / ? # @ : % [ ] and all but ASCII"
        raise ConfigurationError(message)
    for host in parts.netloc.rpartition("@")[2].split(","):
        port = host.rpartition("]")[2].partition(":")[2]
        if port and not (port.isdecimal() and int(port) < 1 << 16):
            message = f"{masked_url(url)!r}: a port is a number up to 65535; percent-encode : in a password"
            raise ConfigurationError(message)
    return parts


def url_or_address(url: str | None, scheme: str, host: str | None, port: int | None) -> str:
    """Return `url`, or that of `host` (by default this machine) and `port`; refuse both at once."""
    if url:
        take_apart(url)
        if host is not None or port is not None:
            raise ConfigurationError(f"{scheme}: host= and port= are for a driver without an URL")
        return url
    name = "localhost" if host is None else f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}" if port is None else f"{scheme}://{name}:{port}"


def split_url(url: str, known: Mapping[str, Callable[[str], Any]], *, others: bool = False) -> SplitURL:
    """Take the options `known` (name → converter) out of the query of `url`.

    An option that is unknown (unless `others` leaves those to the client),
    given twice or not convertible raises `ConfigurationError`.
    """
    parts = take_apart(url)
    options: dict[str, Any] = {}
    rest: list[tuple[str, str]] = []
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        convert = known.get(name)
        if convert is None:
            if not others:
                message = f"{parts.scheme}:// URL: no option {name!r}; there are {', '.join(sorted(known))}"
                raise ConfigurationError(message)
            rest.append((name, text))
            continue
        if name in options:
            message = f"{parts.scheme}:// URL: option {name!r} is given twice"
            raise ConfigurationError(message)
        try:
            options[name] = convert(text)
        except ValueError as error:
            message = f"{parts.scheme}:// URL: option {name}={text!r} is no {_kind(convert)}"
            raise ConfigurationError(message) from error
    # urlunsplit would drop the empty authority of "file:///x".
    query = f"?{urlencode(rest, safe=':,')}" if rest else ""
    return SplitURL(parts, options, url.partition("?")[0] + query)


def masked_url(url: str) -> str:
    """Return `url` fit for a log: no query, no password, not even one that is badly encoded."""
    scheme, colon, rest = url.partition("://")
    if "@" in scheme or not colon:  # mistyped, or of another kind: an account may be anywhere
        return f"{re.split('[:@=]', url, maxsplit=1)[0]}***" if re.search("[@=]", url) else url
    if not rest.startswith("/") and "@" in rest:
        account, _, rest = rest.rpartition("@")
        user, mark, secret = account.partition(":")
        if re.search(r"\?.*=", secret):  # or it is a port, and the @ stands in an option
            rest = f"{user}:***"
        else:
            rest = f"{user}:***@{rest}" if mark else f"{user}@{rest}"
    return scheme + colon + re.split("[?#]", rest, maxsplit=1)[0]


def _kind(convert: Callable[[str], Any]) -> str:
    return {flag: "yes or no", int: "whole number", float: "number"}.get(convert, "valid value")

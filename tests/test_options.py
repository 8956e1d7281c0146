"""What the constructors of drivers have in common."""

from __future__ import annotations

from typing import Any

import pytest

from persistence import ConfigurationError, create_persistence
from persistence.connect import driver_from_url
from persistence.drivers import mongodb_driver, mysql_driver, postgresql_driver, redis_driver
from persistence.options import (
    check_durability,
    check_identifier,
    check_namespace,
    check_pool_size,
    flag,
    masked_url,
    missing_client,
    split_url,
)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:s3cret@h:1/0", "redis://:***@h:1/0"),
        ("mysql://u:s3cret@h/d?ssl=s3cret", "mysql://u:***@h/d"),
        ("mysql://u:s3/c@r:e?t#s3@h/d", "mysql://u:***@h/d"),
        ("redis://:s3#cret@h", "redis://:***@h"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("sqlite:///a@b:c.db?namespace=x", "sqlite:///a@b:c.db"),
        ("no url", "no url"),
        ("postgresql:/u:s3cret@h/d", "postgresql***"),
        ("u:s3cret@h:5432/d", "u***"),
        ("u:s3cret@redis://h", "u***"),
        ("host=h password=s3cret", "host***"),
        ("redis://h:1/0?password=a@s3cret", "redis://h:***"),
        ("redis://h/0?password=a@s3cret", "redis://h/0"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url: str, shown: str) -> None:
    assert masked_url(url) == shown
    assert "s3" not in masked_url(url)


@pytest.mark.parametrize(
    "url", ["redis:/u:s3cret@h", "u:s3cret@h:1/d", "u:s3cret@redis://h", "h password=s3cret"]
)
async def test_what_is_no_url_is_named_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="redis://") as caught:
        await create_persistence(url)
    assert "s3" not in str(caught.value)


@pytest.mark.parametrize(
    "secret", ["s3cr\u2100t", "s3c[ret", "s3c]ret", "12/s3cret", "12?s3cret", "12#s3cret"]
)
@pytest.mark.parametrize("make", [postgresql_driver, mysql_driver, redis_driver, mongodb_driver])
async def test_no_part_of_a_password_is_shown_that_is_not_encoded(make: Any, secret: str) -> None:
    url = f"{make.__name__.removesuffix('Driver').lower()}://u:{secret}@127.0.0.1:1/db"
    for refused in (lambda: make(url), lambda: create_persistence(url)):
        with pytest.raises(ConfigurationError, match="percent-encode") as caught:
            await refused()
        error: BaseException | None = caught.value
        while error is not None:
            assert "s3c" not in f"{error} {error!r}"
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis://h/abc", "database"),
        ("redis://h/1/2", "database"),
        ("redis://h:x/0", "port"),
        ("postgresql://h:99999/d", "port"),
        ("postgresql://h1:1,h2:70000/d", "port"),
        ("mysql://h:70000/d", "port"),
        ("mongodb://127.0.0.1:1/d?namespce=tenant", "namespce"),
        ("file:///tmp/x%00", "NUL"),
        ("memory://x", "memory"),
    ],
)
async def test_what_is_wrong_in_a_url_is_named(url: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        await create_persistence(url)


def test_options_are_taken_out_of_a_url_and_the_rest_is_left() -> None:
    split = split_url(
        "x://u:p@h/d%20e?create=no&size=3&ssl=on&t=1.5",
        {"create": flag, "size": int, "t": float},
        others=True,
    )
    assert split.options == {"create": False, "size": 3, "t": 1.5}
    assert split.url == "x://u:p@h/d%20e?ssl=on"
    assert split.path == "d e"
    for query in ("size=x", "size=1&size=2", "create=maybe", "other=1"):
        with pytest.raises(ConfigurationError, match=query.partition("=")[0]):
            split_url(f"x://h?{query}", {"create": flag, "size": int})


@pytest.mark.parametrize("bad", ["", "a b", "x" * 64, "a/b", "é", 5])
def test_a_bad_namespace_is_refused(bad: str) -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        check_namespace(bad)


@pytest.mark.parametrize("bad", ["", "1a", "a-b", 'a"b', "x" * 64])
def test_a_bad_identifier_is_refused(bad: str) -> None:
    with pytest.raises(ConfigurationError, match="table"):
        check_identifier(bad, "table")


def test_the_rest_passes_or_says_what_to_do() -> None:
    assert check_namespace("a-B_9") == "a-B_9"
    assert check_identifier("_a9", "table") == "_a9"
    assert check_durability("power") == "power"
    with pytest.raises(ConfigurationError, match="'power' or 'process'"):
        check_durability("none")
    assert "pip install 'agent-persistence[redis]'" in str(missing_client("redis", "redis"))


@pytest.mark.parametrize("url", ["redis://h", "mongodb://h", "postgresql://h/d", "mysql://h/d"])
@pytest.mark.parametrize("option", ["pool_size=0", "pool_size=-1", "timeout=0", "timeout=-1", "timeout=nan"])
def test_a_number_that_cannot_work_is_refused_by_its_name(url: str, option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option.partition('=')[0]}="):
        driver_from_url(f"{url}?{option}")


@pytest.mark.parametrize("url", ["sqlite:///%ff.db", "file:///%ff"])
def test_a_path_that_is_no_text_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="utf-8"):
        driver_from_url(url)


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", None])
def test_the_size_of_a_pool_is_a_whole_number_from_1_on(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="pool_size"):
        check_pool_size(size)

"""Servers over TLS: who they are is checked, and nothing is ever said in the clear instead."""

from __future__ import annotations

import gc
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import servers
from certificates import Certificates, make_certificates

from persistence import ConfigurationError, PersistenceError, create_persistence
from persistence.connect import driver_from_url
from persistence.drivers import postgresql_driver, redis_driver

SCHEMES = {
    "postgresql": "postgresql",
    "mysql": "mysql",
    "redis": "rediss",
    "redis_cluster": "rediss+cluster",
    "mongodb": "mongodb",
}
OPTIONS: dict[str, dict[str, str]] = {
    "postgresql": {"sslmode": "verify-full"},
    "mysql": {},
    "redis": {"connect_timeout": "1"},
    "redis_cluster": {"connect_timeout": "1"},
    "mongodb": {"connect_timeout": "1", "tls": "true"},
}
AUTHORITY = {
    "postgresql": "sslrootcert",
    "mysql": "ssl_ca",
    "redis": "ssl_ca_certs",
    "redis_cluster": "ssl_ca_certs",
    "mongodb": "tlsCAFile",
}


# pymongo leaves the socket of a handshake that failed to the garbage collector.
LEFT_TO_THE_COLLECTOR = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ENGINES = [
    pytest.param(engine, marks=[LEFT_TO_THE_COLLECTOR] if engine == "mongodb" else []) for engine in SCHEMES
]


@pytest.fixture(autouse=True)
def _collected_here() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="module", params=ENGINES)
def secured(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[tuple[str, str]]:
    """An engine, and the URL of a server of it that wants TLS."""
    server = servers.own(request.param, tls=certificates)
    yield request.param, server.url
    server.kill()


def trusting(engine: str, url: str, authority: Path | str) -> str:
    """Return the URL for who trusts that authority."""
    _, _, rest = url.partition("://")
    query = urlencode({**OPTIONS[engine], AUTHORITY[engine]: authority})
    return f"{SCHEMES[engine]}://{rest}{'&' if '?' in rest else '?'}{query}"


async def test_over_tls_all_is_as_without(secured: tuple[str, str], certificates: Certificates) -> None:
    engine, url = secured
    async with create_persistence(trusting(engine, url, certificates.authority)) as p:
        await p.sessions.add_message("s", {"role": "user", "content": "nobody else reads this"})
        meta = await p.checkpoints.put("t", {"step": 1})

        assert [message["role"] for message in await p.sessions.get_messages("s")] == ["user"]
        assert await p.checkpoints.get("t", meta.id) == {"step": 1}


async def test_a_server_whose_certificate_nobody_we_trust_has_signed_is_refused(
    secured: tuple[str, str], strangers: Certificates
) -> None:
    engine, url = secured
    with pytest.raises(ConfigurationError, match=f"not trusted: .*{AUTHORITY[engine]}"):
        await create_persistence(trusting(engine, url, strangers.authority))


@pytest.mark.parametrize("content", [None, "", "no certificate"])
async def test_a_file_without_any_authority_is_named(
    secured: tuple[str, str], tmp_path: Path, content: str | None
) -> None:
    engine, url = secured
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=AUTHORITY[engine]):
        await create_persistence(trusting(engine, url, path))


@pytest.mark.parametrize("engine", ["redis", "redis_cluster"])
@pytest.mark.parametrize("options", ["ssl_ca_certs=ca.pem", "ssl_cert_reqs=required"])
def test_options_of_tls_are_refused_where_the_scheme_asks_for_none(engine: str, options: str) -> None:
    scheme = SCHEMES[engine].replace("rediss", "redis")
    with pytest.raises(ConfigurationError, match=f"{options.partition('=')[0]}= is for TLS: use rediss://"):
        driver_from_url(f"{scheme}://h?{options}")


@pytest.mark.parametrize("cluster", [False, True])
def test_options_of_tls_are_refused_as_keywords_too(cluster: bool) -> None:
    with pytest.raises(ConfigurationError, match="is for TLS"):
        redis_driver(host="h", cluster=cluster, ssl_ca_certs="ca.pem")
    redis_driver(host="h", cluster=cluster, ssl=True, ssl_ca_certs="ca.pem")
    redis_driver("REDISS://h", cluster=cluster, ssl_ca_certs="ca.pem")


@pytest.mark.parametrize("mode", ["", "&sslmode=disable", "&sslmode=allow", "&sslmode=prefer"])
def test_an_authority_that_postgresql_would_not_ask_is_refused(mode: str) -> None:
    with pytest.raises(ConfigurationError, match="add sslmode=verify-full"):
        driver_from_url(f"postgresql://h/d?sslrootcert=ca.pem{mode}")


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_an_authority_that_postgresql_asks_is_taken(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver_from_url(f"postgresql://h/d?sslrootcert=ca.pem&sslmode={mode}")
    monkeypatch.setenv("PGSSLMODE", mode)
    driver_from_url("postgresql://h/d?sslrootcert=ca.pem")


@pytest.mark.parametrize("asked", ["require", "verify-full", ssl.create_default_context()])
def test_an_authority_of_the_url_is_taken_if_the_keyword_asks_it(asked: Any) -> None:
    postgresql_driver("postgresql://h/d?sslrootcert=ca.pem", ssl=asked)


@pytest.mark.parametrize("asked", [False, "prefer"])
def test_an_authority_is_refused_if_the_keyword_says_that_nobody_asks_it(asked: Any) -> None:
    with pytest.raises(ConfigurationError, match="add sslmode=verify-full"):
        postgresql_driver("postgresql://h/d?sslmode=verify-full&sslrootcert=ca.pem", ssl=asked)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_server_without_tls_is_refused_where_tls_is_asked_for(
    engine: str, server: Callable[[str], servers.Server], certificates: Certificates
) -> None:
    with pytest.raises(PersistenceError):
        await create_persistence(trusting(engine, server(engine).url, certificates.authority))

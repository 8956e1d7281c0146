"""The command ``persistence``: import, look, repair, and a demonstration. Needs the extra ``cli``."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar, cast
from urllib.parse import quote

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import persistence
from persistence.checkpoints import Checkpoint, CheckpointMeta, ThreadMeta
from persistence.codec import encode
from persistence.collection import Listing
from persistence.connect import Persistence, create_persistence, driver_from_url
from persistence.errors import ConfigurationError, InvalidKeyError, InvalidValueError, PersistenceError
from persistence.ids import shown_time
from persistence.importing import (
    Conversation,
    Importer,
    Lines,
    keyed,
    read_conversation,
    standard_input,
)
from persistence.options import masked_url
from persistence.records import SessionRecord
from persistence.repair import RepairReport
from persistence.repositories import StoredMessage

__all__ = ["app"]

T = TypeVar("T")

_SHORT: Final = 200  # characters of a message in a table
_NARROW: Final = 8  # characters that a column of ids has at least
_LISTED: Final = 10  # orphans, and corrupt records, named below the table of a repair
_PIPE_WIDTH: Final = 160  # columns of a table that goes to no terminal
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline

app = typer.Typer(
    help="""Look after the store of your agents: import conversations, look at them, repair.

    \b
    Begin with:
      persistence demo
      persistence import conversations.jsonl --to sqlite:///agents.db
      persistence sessions sqlite:///agents.db
      persistence threads sqlite:///agents.db

    A store is named by an URL: sqlite:///relative.db, sqlite:////absolute.db, file:///folder,
    postgresql://, mysql://, redis://, mongodb://… The environment variable PERSISTENCE_URL stands
    for an URL left out, and keeps a password out of the list of processes. PERSISTENCE_KEYS has the
    keys of an encrypted store: base64, separated by commas.
    """,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

URL = Annotated[str, typer.Argument(metavar="URL", envvar="PERSISTENCE_URL", help="The store.")]
MaybeURL = Annotated[
    str | None, typer.Argument(metavar="URL", help="The store. [env var: PERSISTENCE_URL]")
]  # before another argument: whoever gives one alone means that other
AsJSON = Annotated[
    bool,
    typer.Option(
        "--json", help="Print JSON for programs: values as they are stored, reports with all their counts."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"agent-persistence {persistence.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


# ---- import


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines; - reads the standard input.")],
    to: Annotated[str, typer.Option("--to", metavar="URL", envvar="PERSISTENCE_URL", help="The store.")],
    container: Annotated[
        str, typer.Option(metavar="ID", help="The container_id of lines without one.")
    ] = "imported",
    image: Annotated[str, typer.Option(metavar="ID", help="The image_id of lines without one.")] = "imported",
) -> None:
    """Import conversations from JSON lines.

    \b
    One conversation a line, an object like
      {"session_id": "s1", "messages": [{"role": "user", "content": "hello"}, …]}

    Other fields are kept as fields of the session. Interrupted, the same command resumes: messages
    that the store has already are compared and left as they are, those that are missing are
    appended. A line that cannot be imported, or contradicts the store, is reported with its number
    and changes nothing; the exit code is then 1.

    \b
    Examples:
      persistence import conversations.jsonl --to sqlite:///agents.db
      zcat old.jsonl.gz | persistence import - --to postgresql://user@host/database --container old
    """
    if file == "-":
        source, size = standard_input(), None
    else:
        try:
            source = open(file, "rb")  # noqa: SIM115 - read_lines closes it
        except OSError as error:
            _fail(f"{file}: {error.strerror}", 2)
        status = os.fstat(source.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with _progress(*columns) as progress:
        bar = progress.add_task("importing", total=size)
        importer: Importer | None = None

        async def work() -> None:
            nonlocal importer
            async with create_persistence(await keyed(to)) as p:
                importer = Importer(p, image, container)
                importer.on_problem = lambda number, reason: typer.echo(
                    f"line {number}: {_one_line(reason)}", err=True
                )
                importer.on_line = lambda size: progress.advance(bar, size)
                await importer.run(lines)

        lines = Lines(source)
        try:
            _run(work(), resumable=True)
        except OSError as error:
            _fail(f"{file}: {error.strerror}; the same command resumes", 1)
        finally:
            lines.close()
            progress.stop()
            if importer is not None:
                typer.echo(_summary(importer))
    if importer is not None and importer.bad:
        raise typer.Exit(1)


def _summary(done: Importer) -> str:
    counts = (
        (done.added, "sessions added"),
        (done.completed, "sessions completed"),
        (done.unchanged, "sessions already there"),
        (done.messages, "messages appended"),
        (done.bad, "bad lines"),
    )
    return ", ".join(f"{what}: {count:,}" for count, what in counts if count) or "nothing imported"


# ---- looking


@app.command()
def sessions(
    url: URL,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    container: Annotated[str | None, typer.Option(metavar="ID", help="Only those of a container.")] = None,
    image: Annotated[str | None, typer.Option(metavar="ID", help="Only those of an image.")] = None,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    as_json: AsJSON = False,
) -> None:
    """List sessions, newest first.

    With --json: one object with "sessions", "cursor" (null: there are no more) and, where a value is
    beyond JSON and written as a tag such as {"$bytes": "aGk="}, "tagged": true.

    \b
    Examples:
      persistence sessions sqlite:///agents.db
      persistence sessions sqlite:///agents.db --container c1 --limit 100
      persistence sessions sqlite:///agents.db --json | jq -r '.sessions[].session_id'
    """
    if container is not None and image is not None:
        _fail("give --container or --image, not both", 2)

    async def work() -> tuple[list[SessionRecord], list[int], str | None]:
        async with _looking(url) as p:
            if container is not None:
                found = await p.sessions.find_sessions_by_container_id(container, limit=limit, cursor=cursor)
            elif image is not None:
                found = await p.sessions.find_sessions_by_image_id(image, limit=limit, cursor=cursor)
            else:
                found = await p.sessions.find_all_sessions(limit=limit, cursor=cursor)
            return found, [] if as_json else await _counts(p, found), found.cursor

    records, counts, more = _run(work())
    if as_json:
        _print_json("sessions", [record.to_mapping() for record in records], {"cursor": more})
        return
    _print(_sessions_table(records, counts))
    _tell_of_more("--cursor", more)


@app.command(no_args_is_help=True)
def show(
    url: MaybeURL = None,
    session: Annotated[str | None, typer.Argument(metavar="SESSION", help="The id of the session.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many messages, from the end.")] = 20,
    full: Annotated[bool, typer.Option("--full", help="Do not shorten long messages.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Show a session and its last messages.

    With --json: one message a line, an object with "seq", "created_at" (Unix milliseconds), "message"
    and, where a value is beyond JSON and written as a tag such as {"$bytes": "aGk="}, "tagged": true.

    \b
    Examples:
      persistence show sqlite:///agents.db s1
      persistence show sqlite:///agents.db s1 --last 1 --full
      persistence show sqlite:///agents.db s1 --last 1000000 --json > s1.jsonl
    """
    store, session_id = _store_and("session", url, session)

    async def work() -> tuple[SessionRecord | None, list[StoredMessage], int]:
        async with _looking(store) as p:
            return await asyncio.gather(
                p.sessions.find_session_by_id(session_id),
                p.sessions.read_messages(session_id, last=last),
                p.sessions.count_messages(session_id),
            )

    record, messages, count = _run(work())
    if record is None and not messages:
        _fail(f"there is no session {session_id!r}", 1)
    if as_json:
        for stored in messages:
            others = {"seq": stored.seq, "created_at": stored.created_at}
            _print_json("message", stored.message, others)
        return
    fields: dict[str, Any] = {"session_id": session_id} if record is None else record.to_mapping()
    for name, value in fields.items():
        shown = shown_time(value) if name in ("created_at", "updated_at") else _cell(value, full=full)
        _print(Text.assemble((f"{name}: ", "bold"), shown))
    _print(_messages_table(messages, full=full))
    typer.echo(f"{len(messages):,} of {count:,} messages")


@app.command()
def threads(
    url: URL,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    as_json: AsJSON = False,
) -> None:
    """List threads of checkpoints, those begun last first; checkpoints stored by name are no threads.

    With --json: one object with "threads" and "cursor" (null: there are no more).

    \b
    Examples:
      persistence threads sqlite:///agents.db
      persistence threads sqlite:///agents.db --json | jq -r '.threads[].thread_id'
    """

    async def work() -> Listing[ThreadMeta]:
        async with _looking(url) as p:
            return await p.checkpoints.list_threads(limit=limit, cursor=cursor)

    found = _run(work())
    if as_json:
        _print_json("threads", [msgspec.structs.asdict(one) for one in found], {"cursor": found.cursor})
        return
    table = Table()
    table.add_column("thread", overflow="fold", min_width=_NARROW)
    table.add_column("checkpoints", justify="right")
    table.add_column("latest", overflow="fold")
    table.add_column("updated", no_wrap=True)
    for one in found:
        ids = Text(_clean(one.thread_id)), f"{one.checkpoints:,}", Text(_clean(one.latest_id))
        table.add_row(*ids, shown_time(one.updated_at))
    _print(table)
    _tell_of_more("--cursor", found.cursor)


@app.command(no_args_is_help=True)
def checkpoints(
    url: MaybeURL = None,
    thread: Annotated[str | None, typer.Argument(metavar="THREAD", help="The id of the thread.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    before: Annotated[str | None, typer.Option(metavar="ID", help="Only those older than this one.")] = None,
    state: Annotated[
        str | None, typer.Option(metavar="ID", help="Print the state of this one, or of the latest.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """List the checkpoints of a thread, newest first, or print the state of one.

    With --json: one object with "checkpoints" and "before" (null: there are no more). With --state:
    one object with "checkpoint", which has the state as "state". In both, where a value is beyond
    JSON and written as a tag such as {"$bytes": "aGk="}, "tagged": true.

    \b
    Examples:
      persistence checkpoints sqlite:///agents.db thread-1
      persistence checkpoints sqlite:///agents.db thread-1 --state latest | jq .checkpoint.state
    """
    store, thread_id = _store_and("thread", url, thread)
    if state is not None:
        _print_state(store, thread_id, None if state == "latest" else state)
        return

    async def work() -> Listing[CheckpointMeta]:
        async with _looking(store) as p:
            return await p.checkpoints.list(thread_id, limit=limit, before=before)

    found = _run(work())
    if not found and before is None:
        _fail(f"there is no thread {thread_id!r}", 1)
    if as_json:
        _print_json("checkpoints", list(map(_fields, found)), {"before": found.cursor})
        return
    table = Table()
    for name in ("checkpoint", "labels", "run"):
        table.add_column(name, overflow="fold", min_width=_NARROW)
    for name in ("bytes", "stored"):
        table.add_column(name, justify="right")
    table.add_column("created", no_wrap=True)
    for one in found:
        about = Text(_clean(", ".join(one.labels))), Text(_clean(one.run_id or ""))
        sizes = f"{one.size_bytes:,}", f"{one.stored_bytes:,}"
        table.add_row(Text(_clean(one.id)), *about, *sizes, shown_time(one.created_at))
    _print(table)
    _tell_of_more("--before", found.cursor)


def _print_state(store: str, thread_id: str, checkpoint_id: str | None) -> None:
    async def work() -> Checkpoint | None:
        async with _looking(store) as p:
            return await p.checkpoints.read(thread_id, checkpoint_id)

    found = _run(work())
    if found is None:
        what = "checkpoints" if checkpoint_id is None else f"checkpoint {checkpoint_id!r}"
        _fail(f"the thread {thread_id!r} has no {what}", 1)
    _print_json("checkpoint", _fields(found.meta) | {"state": found.state}, {})


def _fields(meta: CheckpointMeta) -> dict[str, Any]:
    return msgspec.structs.asdict(meta) | {"labels": list(meta.labels)}


@asynccontextmanager
async def _looking(url: str) -> AsyncIterator[Persistence]:
    """Open a store that is there."""
    async with create_persistence(await keyed(_existing(url))) as p:
        yield p


def _tell_of_more(option: str, value: str | None) -> None:
    if value is not None:
        typer.echo(f"There are more: {option} {shlex.quote(value)}")


def _store_and(what: str, url: str | None, id: str | None) -> tuple[str, str]:
    """Return the URL and the id that two arguments stand for, the first of which may be left out."""
    store, wanted = (os.environ.get("PERSISTENCE_URL"), url) if id is None else (url, id)
    if not store or wanted is None:
        _fail(f"give an URL and a {what}, or a {what} and the URL in PERSISTENCE_URL", 2)
    return store, wanted


# ---- looking after


@app.command()
def repair(
    url: URL,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, only count.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Clean up and mend a store.

    Finishes interrupted deletes, mends listings, removes what nobody needs. Safe while the store is
    in use, and to interrupt and repeat; once a day is plenty. The exit code is 1 if something in the
    store cannot be read; it is named, and left as it is.

    \b
    Examples:
      persistence repair sqlite:///agents.db --dry-run
      persistence repair sqlite:///agents.db
    """
    with _progress(SpinnerColumn(), TextColumn("{task.completed:,.0f} partitions")) as progress:
        bar = progress.add_task("repair", total=None)

        async def work() -> RepairReport:
            async with _looking(url) as p:
                return await p.repair(
                    dry_run=dry_run, progress=lambda count: progress.update(bar, completed=count)
                )

        report = _run(work(), resumable=True)
    if as_json:
        _write(msgspec.json.encode(report))
    else:
        table = Table("would be done" if dry_run else "done", "count")
        table.columns[1].justify = "right"
        for name, value in msgspec.structs.asdict(report).items():
            if isinstance(value, int):
                table.add_row(name.replace("_", " "), f"{value:,}")
        _print(table)
        _list("orphan", report.orphans, report.orphan_count)
        _list("corrupt", report.corrupt, report.corrupt_count)
    if report.corrupt_count:
        raise typer.Exit(1)


def _list(kind: str, found: Sequence[str], count: int) -> None:
    for place in found[:_LISTED]:
        typer.echo(f"{kind}: {_one_line(place)}")
    if count > _LISTED:
        typer.echo(f"{kind}: {count - _LISTED:,} more (--json names up to 1,000)")


@app.command()
def schema(
    url: URL,
    view: Annotated[
        bool, typer.Option("--view", help="Those of a view that shows names and values as text or JSON.")
    ] = False,
) -> None:
    """Print the statements that create a store.

    They are for your migration tool; nothing is connected to. With create=false in the URL of the
    store its driver creates nothing by itself.

    \b
    Example:
      persistence schema postgresql://localhost/agents > schema.sql
      persistence schema postgresql://localhost/agents --view | psql agents
    """
    try:
        driver = driver_from_url(url)
    except PersistenceError as error:
        _fail_with(error)
    ddl: Callable[[], str] | None = getattr(driver, "view_ddl" if view else "ddl", None)
    if ddl is None and view:
        typer.echo(f"{masked_url(url)}: there is no view for it, the data are legible as they are", err=True)
    elif ddl is None:
        typer.echo(f"{masked_url(url)}: it needs no statements, opening it creates it", err=True)
    else:
        typer.echo(ddl())


# ---- demo


@app.command()
def demo(
    to: Annotated[
        str | None, typer.Option(metavar="URL", help="Another store than a new SQLite file.")
    ] = None,
) -> None:
    """See an import survive a kill -9.

    Imports a few real conversations into a new SQLite file in a temporary folder, message by message,
    kills the importing process in the middle with SIGKILL, resumes the import, and compares every
    message with its source. The file stays, for you to look at.

    \b
    Examples:
      persistence demo
      persistence demo --to sqlite:///demo.db
      persistence demo --to postgresql://localhost/agents
    """
    folder = None
    if to is None:
        folder = tempfile.mkdtemp(prefix="persistence-demo-")
        to = f"sqlite:///{quote(Path(folder, 'demo.db').as_posix())}"
    elif to.lower().startswith("memory:"):
        _fail("memory:// lives in one process, and this is about two: give the URL of another store", 2)
    _run(_demo(to))
    shown = shlex.quote(to) if to == masked_url(to) else "URL"
    if folder is not None:
        typer.echo(f"\nThe file stays: {Path(folder, 'demo.db')} (to remove it:  rm -r {folder})")
    command = _own_command()
    typer.echo("Try next:")
    typer.echo(f"  {command} sessions {shown}")
    typer.echo(f"  {command} show {shown} airline-36-0 --last 5")
    typer.echo(f"  {command} import YOUR.jsonl --to {shown}")


def _own_command() -> str:
    """Return what to type for this command: in a virtual environment it need not be on the PATH."""
    if shutil.which("persistence"):
        return "persistence"
    called = Path(sys.argv[0])
    return (
        shlex.quote(str(called))
        if called.name == "persistence"
        else f"{shlex.quote(sys.executable)} -m persistence"
    )


async def _demo(url: str) -> None:
    source = resources.files("persistence").joinpath("demo_conversations.jsonl")
    lines = (await asyncio.to_thread(source.read_bytes)).splitlines(keepends=True)
    conversations = {one.record.session_id: one for one in map(read_conversation, lines)}
    total = sum(len(one.messages) for one in conversations.values())
    async with create_persistence(await keyed(url)) as p:
        for session_id in conversations:
            if await p.sessions.session_exists(session_id) or await p.sessions.count_messages(session_id):
                _fail(f"the store has a session {session_id!r} already: give the URL of another one", 2)

    typer.echo(f"A process imports {len(lines)} conversations with {total} messages into {masked_url(url)}")
    # What it does not get before its end cannot be imported before its end.
    acknowledged = await import_and_kill(url, lines[:-1], random.randint(total // 4, total // 2))
    reported = sum(acknowledged.values())
    typer.echo(f"Killed it with SIGKILL when it had reported {reported} messages as stored")

    async with create_persistence(await keyed(url)) as p:
        stored = {id: await p.sessions.get_messages(id) for id in conversations}
        _fail_for(find_fault(conversations, stored, acknowledged))
        found = sum(map(len, stored.values()))
        typer.echo(f"The store has {found}: those, {found - reported} not reported in time, nothing else")

        importer = Importer(p)
        with closing(Lines(io.BytesIO(b"".join(lines)))) as again:
            await importer.run(again)
        typer.echo(f"The same import again appends the other {importer.messages}")

        stored = {id: await p.sessions.get_messages(id) for id in conversations}
        complete = {id: len(one.messages) for id, one in conversations.items()}
        _fail_for(find_fault(conversations, stored, complete))
        typer.echo(f"Compared all {total} messages with their source: nothing lost, nothing doubled\n")

        records = [await p.sessions.find_session_by_id(id) for id in conversations]
        listed = [record for record in records if record is not None]
        _print(_sessions_table(listed, await _counts(p, listed)))
        cut = max(acknowledged, key=lambda id: complete[id] - acknowledged[id])
        typer.echo(f"\nThe last messages of {cut}, of which {acknowledged[cut]} had been reported:")
        _print(_messages_table(await p.sessions.read_messages(cut, last=4), full=False))


async def import_and_kill(url: str, lines: Iterable[bytes], after: int) -> dict[str, int]:
    """Have a process import `lines`; kill it when it has reported `after` messages as stored.

    Return how many it has reported of each session, up to its end. It waits
    for more lines, and so never ends by itself.
    """
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "persistence.importing"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PERSISTENCE_URL": url},  # arguments can be seen by all users of the machine
    )
    stdin, stdout = cast("asyncio.StreamWriter", child.stdin), cast("asyncio.StreamReader", child.stdout)
    reports: list[bytes] = []
    try:
        stdin.writelines(lines)
        while len(reports) < after:
            report = await stdout.readline()
            if not report:
                _fail("the importing process ended by itself", 1)
            reports.append(report)
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        reports += (await stdout.read()).splitlines()
        await child.wait()
    return dict(json.loads(report) for report in reports)


def find_fault(
    conversations: dict[str, Conversation],
    stored: dict[str, list[dict[str, Any]]],
    expected: dict[str, int],
) -> str | None:
    """Return what is wrong, None if each session has the `expected` messages at least, all as in its line."""
    for session_id, one in conversations.items():
        messages = stored[session_id]
        if len(messages) < expected.get(session_id, 0):
            return f"{session_id}: {expected[session_id]} messages were stored, {len(messages)} are there"
        if len(messages) > len(one.messages):
            return f"{session_id}: {len(messages)} messages are there, {len(one.messages)} in its source"
        for number, (message, given) in enumerate(zip(messages, one.messages, strict=False), 1):
            if encode(message) != encode(given):
                return f"{session_id}: message {number} is not that of its source"
    return None


# ---- running, failing


def _run(work: Coroutine[Any, Any, T], *, resumable: bool = False) -> T:
    again = "; the same command resumes" if resumable else ""
    try:
        return asyncio.run(_interruptible(work))
    except PersistenceError as error:
        _fail_with(error, again)
    except KeyboardInterrupt:
        typer.echo(f"interrupted{again}", err=True)
        raise typer.Exit(130) from None


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    # With a handler of its own the loop is woken by every signal. Without one it sleeps on when Ctrl-C
    # comes just as it begins to wait.
    with suppress(RuntimeError):  # not on Windows, nor in another thread than the first
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    return await work


def _fail_with(error: PersistenceError, again: str = "") -> NoReturn:
    if isinstance(error, ConfigurationError | InvalidKeyError | InvalidValueError):
        _fail(str(error), 2)
    _fail(f"{error}{again}", 1)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"Error: {_one_line(message)}", err=True)
    raise typer.Exit(code)


def _fail_for(fault: str | None) -> None:
    if fault is not None:
        _fail(fault, 1)


def _existing(url: str) -> str:
    """Return `url` so that a mistyped path is an error: looking at a store must not make a file."""
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in ("sqlite", "file") or re.search(r"[?&]create=", rest):
        return url
    return f"{url}{'&' if '?' in rest else '?'}create=false"


# ---- printing


def _print(thing: Table | Text) -> None:
    console = Console(file=sys.stdout, highlight=False)
    if not sys.stdout.isatty():
        console.width = max(console.width, _PIPE_WIDTH)
    console.print(thing)


def _progress(*columns: Any) -> Progress:
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


def _print_json(name: str, value: Any, others: dict[str, Any]) -> None:
    """Print an object: `others`, then `value` exactly, under `name`."""
    text, tagged = encode(value)
    document = others | {name: msgspec.Raw(text)} | ({"tagged": True} if tagged else {})
    _write(msgspec.json.encode(document))


def _write(document: bytes) -> None:
    sys.stdout.buffer.write(document + b"\n")


async def _counts(p: Persistence, records: Iterable[SessionRecord]) -> list[int]:
    return await asyncio.gather(*(p.sessions.count_messages(record.session_id) for record in records))


def _sessions_table(records: Sequence[SessionRecord], counts: Sequence[int]) -> Table:
    table = Table()
    for name in ("session", "image", "container"):
        # An id that is cut short, or not there, could not be copied.
        table.add_column(name, overflow="fold", min_width=_NARROW)
    table.add_column("messages", justify="right")
    table.add_column("created", no_wrap=True)
    for record, count in zip(records, counts, strict=True):
        ids = (record.session_id, record.image_id, record.container_id)
        table.add_row(*(Text(_clean(id)) for id in ids), f"{count:,}", shown_time(record.created_at))
    return table


def _messages_table(messages: Sequence[StoredMessage], *, full: bool) -> Table:
    table = Table(show_lines=full)
    table.add_column("number", justify="right")
    table.add_column("added", no_wrap=True)
    table.add_column("role")
    table.add_column("message", overflow="fold")
    for stored in messages:
        texts = Text("\n").join(_cell(text, full=full) for text in _texts(stored.message))
        table.add_row(str(stored.seq), shown_time(stored.created_at), _cell(_role(stored.message)), texts)
    return table


def _role(message: dict[str, Any]) -> str:
    parts = [message.get("role"), message.get("name")]
    return " ".join(part if isinstance(part, str) else _as_json(part) for part in parts if part is not None)


def _texts(message: dict[str, Any]) -> list[str]:
    """Return the texts and the calls of a message; all of it as JSON where it has neither."""
    content, calls = message.get("content"), message.get("tool_calls")
    texts = [_part(part) for part in content] if isinstance(content, list) else [_part(content)]
    texts += [_call(call) for call in calls] if isinstance(calls, list) else [_part(calls)]
    texts = [text for text in texts if text]
    others = {name: value for name, value in message.items() if name not in ("role", "content", "tool_calls")}
    return texts if texts or not others else [_as_json(message)]


def _part(part: Any) -> str:
    match part:
        case None:
            return ""
        case str():
            return part
        case {"text": str() as text}:
            return text
        case {"type": "tool_use", "name": str() as name, "input": arguments}:
            return f"→{name}({_as_json(arguments)})"
        case {"type": "tool_result", "content": content}:
            return "\n".join(map(_part, content)) if isinstance(content, list) else _part(content)
    return _as_json(part)


def _call(call: Any) -> str:
    match call:
        case {"function": {"name": str() as name, "arguments": arguments}}:
            return f"→{name}({arguments if isinstance(arguments, str) else _as_json(arguments)})"
    return _as_json(call)


def _as_json(value: Any) -> str:
    return encode(value)[0].decode()


def _cell(value: Any, *, full: bool = False) -> Text:
    text = _clean(value if isinstance(value, str) else _as_json(value))
    if not full:
        text = " ".join(text.split())
        if len(text) > _SHORT:
            text = f"{text[:_SHORT]}… ({len(text) - _SHORT:,} more)"
    return Text(text)


def _one_line(text: str) -> str:
    return " ".join(_clean(text).split())


def _clean(text: str) -> str:
    """Return `text` without what would give commands to a terminal."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)

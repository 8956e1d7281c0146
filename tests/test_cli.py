"""The command: what it imports, survives, shows and refuses."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pty
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from typer.testing import CliRunner, Result

from persistence import create_persistence, memory_driver
from persistence.cli import app, find_fault, import_and_kill
from persistence.codec import decode
from persistence.importing import Importer, read_conversation

Conversations = list[dict[str, Any]]


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env=environment, prog_name="persistence")


def run_process(*arguments: str, input: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = (sys.executable, "-m", "persistence", *arguments)
    return subprocess.run(command, input=input, capture_output=True, check=False, **options)


def to_lines(conversations: Sequence[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(conversation).encode() + b"\n" for conversation in conversations]


def write(path: Path, conversations: Sequence[dict[str, Any]]) -> str:
    path.write_bytes(b"".join(to_lines(conversations)))
    return str(path)


async def given(lines: Sequence[bytes]) -> AsyncIterator[bytes]:
    for line in lines:
        yield line


async def stored(url: str, ids: Sequence[str]) -> list[list[dict[str, Any]]]:
    async with create_persistence(url) as p:
        return [await p.sessions.get_messages(id) for id in ids]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def imported(url: str, tmp_path: Path, conversations: Conversations) -> str:
    """The URL of a store with all conversations."""
    assert run("import", write(tmp_path / "all.jsonl", conversations), "--to", url).exit_code == 0
    return url


# ---- import


def test_conversations_come_back_identical(imported: str, conversations: Conversations) -> None:
    ids = [conversation["session_id"] for conversation in conversations]
    assert asyncio.run(stored(imported, ids)) == [one["messages"] for one in conversations]


def test_a_store_is_encrypted_with_the_keys_of_the_environment(
    url: str, tmp_path: Path, conversations: Conversations
) -> None:
    lines = write(tmp_path / "some.jsonl", conversations[:1])
    session, secret = conversations[0]["session_id"], conversations[0]["messages"][-1]["content"].encode()
    keys = {"PERSISTENCE_KEYS": base64.b64encode(bytes(32)).decode()}
    assert run("import", lines, "--to", url, **keys).exit_code == 0
    shown = run("show", url, session, "--json", **keys)
    assert json.loads(shown.stdout.splitlines()[-1])["message"] == conversations[0]["messages"][-1]
    assert run("repair", url, **keys).exit_code == 0
    assert not any(secret in path.read_bytes() for path in tmp_path.glob("store.db*"))
    assert "encrypted" in run("show", url, session).output
    assert "PERSISTENCE_KEYS" in run("show", url, session, PERSISTENCE_KEYS="x").output


@pytest.mark.parametrize("limit", ["1", "1000"])
def test_a_full_disk_under_the_output_is_told_in_a_line(imported: str, limit: str) -> None:
    with open("/dev/full", "wb") as full:
        command = (sys.executable, "-m", "persistence", "sessions", imported, "--json", "--limit", limit)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"persistence: ")
    assert done.stderr.count(b"\n") == 1


def test_the_other_fields_of_a_line_are_kept_in_the_session(
    imported: str, conversations: Conversations
) -> None:
    async def records() -> list[dict[str, Any]]:
        async with create_persistence(imported) as p:
            return [record.to_mapping() for record in await p.sessions.find_all_sessions()]

    given = {"image_id": "imported", "container_id": "imported"}
    expected = {one["session_id"]: given | one for one in conversations}
    found = asyncio.run(records())
    assert len(found) == len(expected)
    for record in found:
        wanted = {name: value for name, value in expected[record["session_id"]].items() if name != "messages"}
        assert {name: record[name] for name in wanted} == wanted


def test_a_second_import_changes_nothing(url: str, tmp_path: Path, conversations: Conversations) -> None:
    file = write(tmp_path / "all.jsonl", conversations)
    count, messages = len(conversations), sum(len(one["messages"]) for one in conversations)
    assert run("import", file, "--to", url).stdout == (
        f"sessions added: {count:,}, messages appended: {messages:,}\n"
    )
    assert run("import", file, "--to", url).stdout == f"sessions already there: {count:,}\n"


@pytest.mark.parametrize("seed", range(20))
async def test_a_killed_import_is_resumed_without_loss_or_double(
    seed: int, url: str, conversations: Conversations
) -> None:
    lines = to_lines(conversations[:8])
    read = {one.record.session_id: one for one in map(read_conversation, lines)}
    total = sum(len(one.messages) for one in read.values())

    acknowledged = await import_and_kill(url, lines, random.Random(seed).randint(1, total))
    killed = dict(zip(read, await stored(url, list(read)), strict=True))
    assert find_fault(read, killed, acknowledged) is None

    async with create_persistence(url) as p:
        importer = Importer(p)
        await importer.run(given(lines))
    assert importer.messages == total - sum(map(len, killed.values()))
    assert await stored(url, list(read)) == [one.messages for one in read.values()]


async def test_an_import_goes_on_where_the_line_is_longer_than_the_session(
    conversations: Conversations,
) -> None:
    line = conversations[0]
    async with create_persistence(memory_driver()) as p:
        for end in (0, 1, 7, 7, len(line["messages"])):
            importer = Importer(p, batch=3)
            await importer.run(given(to_lines([line | {"messages": line["messages"][:end]}])))
            assert importer.bad == 0
            assert await p.sessions.get_messages(line["session_id"]) == line["messages"][:end]


async def test_a_session_that_went_on_is_left_as_it_is(conversations: Conversations) -> None:
    line = conversations[0]
    async with create_persistence(memory_driver()) as p:
        await p.sessions.add_messages(line["session_id"], [*line["messages"], {"role": "user"}])
        importer = Importer(p)
        await importer.run(given(to_lines([line])))
        assert (importer.messages, importer.bad) == (0, 0)
        assert await p.sessions.count_messages(line["session_id"]) == len(line["messages"]) + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line["messages"][3].update(content="?"), "message 4 of this session is another one"),
        (lambda line: line["messages"][3].update(more=1), "message 4 of this session is another one"),
        (lambda line: line.update(task_id=17), "'task_id' of this session is another one"),
        (lambda line: line.update(task_id=False), "'task_id' of this session is another one"),
    ],
)
async def test_a_line_that_contradicts_the_store_changes_nothing(
    change: Callable[[dict[str, Any]], None], reason: str, conversations: Conversations
) -> None:
    problems: list[tuple[int, str]] = []
    async with create_persistence(memory_driver()) as p:
        first, second = conversations[:2]
        half = first | {"messages": first["messages"][:6]}
        await Importer(p).run(given(to_lines([half])))
        (other,) = map(json.loads, to_lines([first]))
        change(other)

        importer = Importer(p, on_problem=lambda *problem: problems.append(problem))
        await importer.run(given(to_lines([other, second])))

        assert [number for number, _ in problems] == [1]
        assert reason in problems[0][1]
        assert await p.sessions.get_messages(first["session_id"]) == half["messages"]
        record = await p.sessions.find_session_by_id(first["session_id"])
        assert record is not None
        assert record.extra["task_id"] == first["task_id"]
        assert await p.sessions.get_messages(second["session_id"]) == second["messages"]


async def test_what_an_import_stores_is_nobodys_orphan_and_expires_when_the_line_says() -> None:
    now = 1_800_000_000_000
    lines = [
        b'{"session_id": "s%d", "expires_at": %d, "messages": [{}]}' % (n, now - 1 + n) for n in range(3)
    ]
    async with create_persistence(memory_driver(), clock=lambda: now) as p:
        importer = Importer(p)
        await importer.run(given(lines))
        assert (importer.added, importer.bad) == (1, 2)  # what is over already could never be read
        assert (await p.repair(dry_run=True)).orphan_count == 0
        assert await p.sessions.count_messages("s2") == 1
        now += 1
        assert await p.sessions.count_messages("s2") == 0


async def test_what_is_the_same_is_no_contradiction() -> None:
    first = (
        b'{"session_id": "s1", "x": NaN, "messages": [{"a": NaN, "b": 1.0, "c": 12345678901234567890123}]}'
    )
    second = b'{"messages": [{"c": 12345678901234567890123, "b": 1.0, "a": NaN}], "session_id": "s1"}'
    async with create_persistence(memory_driver()) as p:
        importer = Importer(p)
        await importer.run(given([first, first, second]))
        assert (importer.added, importer.unchanged, importer.bad) == (1, 2, 0)


async def test_imports_at_the_same_time_double_nothing(url: str, conversations: Conversations) -> None:
    lines = to_lines(conversations)
    async with create_persistence(url) as one, create_persistence(url) as other:
        # With the records there, nothing but the numbers of the messages keeps the imports apart.
        await Importer(one).run(given(to_lines([line | {"messages": []} for line in conversations])))
        importers = [Importer(p, batch=2) for p in (one, other, one)]
        await asyncio.gather(*(importer.run(given(lines)) for importer in importers))
    assert [importer.bad for importer in importers] == [0, 0, 0]
    assert sum(importer.messages for importer in importers) == sum(
        len(one["messages"]) for one in conversations
    )
    ids = [conversation["session_id"] for conversation in conversations]
    assert await stored(url, ids) == [one["messages"] for one in conversations]


async def test_lines_of_one_session_are_imported_in_their_order(conversations: Conversations) -> None:
    line = conversations[0]
    lines = [line | {"messages": line["messages"][:end]} for end in range(1, len(line["messages"]) + 1)]
    async with create_persistence(memory_driver()) as p:
        importer = Importer(p)
        await importer.run(given(to_lines(lines)))
        assert (importer.added, importer.completed, importer.bad) == (1, len(lines) - 1, 0)


async def test_few_lines_are_in_memory_at_once(conversations: Conversations) -> None:
    begun = done = most = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal begun, most
        for number in range(10):
            for line in to_lines(
                [one | {"session_id": f"{number}-{i}"} for i, one in enumerate(conversations)]
            ):
                begun += 1
                most = max(most, begun - done)
                yield line

    def count(size: int) -> None:
        nonlocal done
        done += 1

    async with create_persistence(memory_driver()) as p:
        await Importer(p, on_line=count).run(counted())
    assert done == 10 * len(conversations)
    assert most <= 17


def test_bad_lines_are_reported_by_number_and_the_rest_is_imported(
    url: str, tmp_path: Path, conversations: Conversations
) -> None:
    good, last = to_lines(conversations[:2])
    bad = {
        2: (b"nonsense", "no JSON: Expecting value at column 1"),
        3: (good[:1000], "no JSON: "),
        4: (b"[]", "no JSON object"),
        5: (b'{"session_id": "a"}', "there are no 'messages'"),
        6: (b'{"session_id": "b", "messages": {}}', "'messages' is no list"),
        7: (b'{"session_id": "c", "messages": [{}, 1]}', "message 2: it is no JSON object"),
        8: (b'{"session_id": "d", "messages": [{"x": "\\ud800"}]}', "message 1: the text at .x"),
        9: (b'{"session_id": 5, "messages": []}', "Expected `str`, got `int`"),
        10: (b'{"messages": []}', "missing required field `session_id`"),
        11: (b'{"session_id": "e", "messages": [], "x": "\\ud800"}', "the fields beside the messages: "),
        12: (b"\xff\xfe\xff", "no JSON"),
        13: (b"[" * 100_000, "no JSON that can be read"),
        14: (b'{"session_id": "f", "expires_at": 5, "messages": [{}]}', "its expires_at is over"),
    }
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join([good.strip(), *(line.strip() for line, _ in bad.values()), b"", last]))

    result = run("import", str(file), "--to", url)
    assert result.exit_code == 1
    assert result.stdout == (
        f"sessions added: 2, messages appended: {sum(len(one['messages']) for one in conversations[:2])}, "
        f"bad lines: {len(bad)}\n"
    )
    reports = result.stderr.splitlines()
    assert len(reports) == len(bad)
    for report, (number, (_, reason)) in zip(reports, bad.items(), strict=True):
        assert report.startswith(f"line {number}: ")
        assert reason in report
    assert [row["session_id"] for row in json.loads(run("sessions", url, "--json").stdout)["sessions"]] == [
        one["session_id"] for one in reversed(conversations[:2])
    ]


def test_it_reads_standard_input_and_prints_no_bar_where_no_terminal_is(
    url: str, conversations: Conversations
) -> None:
    done = run_process(
        "import", "-", "--to", url, "--container", "c1", "--image", "i1", input=to_lines(conversations)[0]
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"sessions added: 1, messages appended: %d\n" % len(conversations[0]["messages"])
    (session,) = json.loads(run("sessions", url, "--json").stdout)["sessions"]
    assert (session["container_id"], session["image_id"]) == ("c1", "i1")


def test_a_bar_is_drawn_on_a_terminal_beside_clean_output(
    url: str, tmp_path: Path, conversations: Conversations
) -> None:
    file = write(tmp_path / "all.jsonl", conversations)
    ours, theirs = pty.openpty()
    try:
        command = (sys.executable, "-m", "persistence", "import", file, "--to", url)
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment)
        assert b"importing" in os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout.startswith(b"sessions added: ")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_cleanly_and_says_how_to_go_on(url: str, sign: signal.Signals) -> None:
    command = (sys.executable, "-m", "persistence", "import", "-", "--to", url)
    pipe = subprocess.PIPE
    # Whoever runs the tests in the background may have them ignore the signal, and so would the child.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    finally:
        signal.signal(signal.SIGINT, old)
    with child:
        assert child.stdin
        assert child.stderr
        child.stdin.write(b"nonsense\n")
        child.stdin.flush()
        assert child.stderr.readline().startswith(b"line 1: ")  # it runs, and waits for more
        child.send_signal(sign)
        assert child.wait() == 130
        assert child.stderr.read() == b"interrupted; the same command resumes\n"


def test_a_file_that_cannot_be_read_is_named(url: str, tmp_path: Path) -> None:
    for path, reason in (("missing.jsonl", "No such file"), (".", "Is a directory")):
        result = run("import", str(tmp_path / path), "--to", url)
        assert result.exit_code == 2
        assert reason in result.stderr


# ---- looking


def test_sessions_are_listed_newest_first_and_paged(imported: str, conversations: Conversations) -> None:
    listed: list[str] = []
    cursor: list[str] = []
    while True:
        result = run("sessions", imported, "--limit", "5", "--json", *cursor)
        page = json.loads(result.stdout)
        listed += [session["session_id"] for session in page["sessions"]]
        if page["cursor"] is None:
            break
        assert len(page["sessions"]) == 5
        cursor = ["--cursor", page["cursor"]]
    assert sorted(listed) == sorted(one["session_id"] for one in conversations)
    table = run("sessions", imported, "--limit", "5").stdout
    assert [id for id in listed if id in table] == listed[:5]
    assert "There are more: --cursor " in table


def test_sessions_can_be_those_of_a_container_or_an_image(
    url: str, tmp_path: Path, conversations: Conversations
) -> None:
    for number, conversation in enumerate(conversations[:3]):
        line = conversation | {"container_id": f"c{number % 2}", "image_id": f"i{number}"}
        run("import", write(tmp_path / "one.jsonl", [line]), "--to", url)

    def listed(*arguments: str) -> set[str]:
        sessions = json.loads(run("sessions", url, "--json", *arguments).stdout)["sessions"]
        return {session["image_id"] for session in sessions}

    assert listed() == {"i0", "i1", "i2"}
    assert listed("--container", "c0") == {"i0", "i2"}
    assert listed("--image", "i1") == {"i1"}
    assert run("sessions", url, "--container", "c0", "--image", "i1").exit_code == 2


def test_show_prints_the_last_messages_exactly_as_json(imported: str, conversations: Conversations) -> None:
    conversation = conversations[0]
    result = run("show", imported, conversation["session_id"], "--last", "7", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    count = len(conversation["messages"])
    assert [line["seq"] for line in lines] == list(range(count - 6, count + 1))
    assert [line["message"] for line in lines] == conversation["messages"][-7:]


def test_show_takes_the_url_from_the_environment(imported: str, conversations: Conversations) -> None:
    session_id = conversations[0]["session_id"]
    assert (
        run("show", session_id, PERSISTENCE_URL=imported).stdout == run("show", imported, session_id).stdout
    )
    assert run("show", session_id, PERSISTENCE_URL="").exit_code == 2


def test_show_shortens_long_messages_unless_all_is_wanted(
    imported: str, conversations: Conversations
) -> None:
    conversation = conversations[0]
    last_word = conversation["messages"][0]["content"].split()[-1]
    arguments = ("show", imported, conversation["session_id"], "--last", str(len(conversation["messages"])))
    short, full = run(*arguments).stdout, run(*arguments, "--full").stdout
    assert " more)" in short
    assert " more)" not in full
    assert last_word in full
    calls = [call["function"] for one in conversation["messages"] for call in one.get("tool_calls") or ()]
    assert calls  # the messages with a call have no content
    for call in calls:
        assert f"→{call['name']}(" in short


MESSAGES: list[dict[Any, Any]] = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "look at"}, {"type": "image", "data": b"\x00\xff"}],
    },
    {"role": "assistant", "content": [{"type": "tool_use", "name": "search", "input": {"q": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "found"}]}]},
    {"role": "assistant", "content": None},
    {"role": 5, "content": {"at": datetime(2024, 5, 15, tzinfo=UTC)}, "tool_calls": "none"},
    {"kind": "event", "id": UUID(int=7)},
    {"content": "\x1b]0;title\x07[bold]red[/bold]", "tool_calls": [{"odd": (1, 2)}]},
    {1: 2, "$bytes": 3},
    {},
]


def test_show_knows_every_shape_of_a_message(url: str) -> None:
    async def add() -> None:
        async with create_persistence(url) as p:
            await p.sessions.add_messages("s1", MESSAGES)

    asyncio.run(add())
    table = run("show", url, "s1").stdout
    for text in (
        "look at",
        '→search({"q":1})',
        "found",
        '{"at":{"$datetime":',
        '"kind":"event"',
        "\\x1b]0;title\\x07[bold]red[/bold]",
        '{"odd":{"$tuple":[1,2]}}',
        "9 of 9 messages",
    ):
        assert text in table, text
    assert "\x1b" not in table

    lines = run("show", url, "s1", "--json").stdout.splitlines()
    raw = [(json.dumps(json.loads(line)["message"]), json.loads(line).get("tagged", False)) for line in lines]
    assert [decode(text.encode(), tagged) for text, tagged in raw] == MESSAGES


def test_an_unknown_session_is_an_error(imported: str) -> None:
    result = run("show", imported, "no such\x1b")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: there is no session 'no such\\x1b'\n"


@pytest.fixture
def checkpointed(url: str) -> str:
    """The URL of a store with two threads of checkpoints."""

    async def put() -> None:
        async with create_persistence(url) as p:
            for turn in range(3):
                state = {"turn": turn, "raw": bytes([turn])}
                await p.checkpoints.put("t 1", state, labels=["a\x1b", "b"], metadata={"at": b"x"}, now=turn)
            await p.checkpoints.put("t2", [1, 2], run_id="r")

    asyncio.run(put())
    return url


def test_threads_are_listed_and_paged(checkpointed: str) -> None:
    table = run("threads", checkpointed).stdout
    assert table.index("t2") < table.index("t 1")
    page = json.loads(run("threads", checkpointed, "--limit", "1", "--json").stdout)
    assert [(one["thread_id"], one["checkpoints"]) for one in page["threads"]] == [("t2", 1)]
    result = run("threads", checkpointed, "--limit", "1")
    assert result.stdout.splitlines()[-1] == f"There are more: --cursor {page['cursor']}"
    rest = json.loads(run("threads", checkpointed, "--cursor", page["cursor"], "--json").stdout)
    assert [one["thread_id"] for one in rest["threads"]] == ["t 1"]
    assert rest["cursor"] is None


def test_checkpoints_of_a_thread_are_listed_and_paged(checkpointed: str) -> None:
    page = json.loads(run("checkpoints", checkpointed, "t 1", "--limit", "2", "--json").stdout)
    assert [one["created_at"] for one in page["checkpoints"]] == [2, 1]
    assert page["tagged"] is True
    assert page["checkpoints"][0]["metadata"] == {"at": {"$bytes": "eA=="}}
    assert page["checkpoints"][0]["labels"] == ["a\x1b", "b"]
    more = run("checkpoints", "t 1", "--limit", "2", PERSISTENCE_URL=checkpointed).stdout
    assert "a\\x1b, b" in more
    assert more.splitlines()[-1] == f"There are more: --before {page['before']}"
    rest = run("checkpoints", checkpointed, "t 1", "--before", page["before"], "--json").stdout
    assert [one["created_at"] for one in json.loads(rest)["checkpoints"]] == [0]
    assert json.loads(rest)["before"] is None


def test_a_state_is_printed_exactly(checkpointed: str) -> None:
    listed = json.loads(run("checkpoints", checkpointed, "t 1", "--json").stdout)["checkpoints"]
    for id, turn in (("latest", 2), (listed[1]["id"], 1)):
        found = json.loads(run("checkpoints", checkpointed, "t 1", "--state", id).stdout)
        state = decode(json.dumps(found["checkpoint"]["state"]).encode(), found["tagged"])
        assert state == {"turn": turn, "raw": bytes([turn])}
    plain = json.loads(run("checkpoints", checkpointed, "t2", "--state", "latest").stdout)
    assert (plain["checkpoint"]["state"], plain["checkpoint"]["run_id"]) == ([1, 2], "r")
    assert "tagged" not in plain


def test_an_unknown_thread_or_checkpoint_is_an_error(checkpointed: str) -> None:
    for arguments, message in (
        (("t3",), "there is no thread 't3'"),
        (("t3", "--state", "latest"), "the thread 't3' has no checkpoints"),
        (("t2", "--state", "7"), "the thread 't2' has no checkpoint '7'"),
    ):
        result = run("checkpoints", checkpointed, *arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {message}\n")
    assert run("checkpoints", "t2", PERSISTENCE_URL="").exit_code == 2


@pytest.mark.parametrize(
    "command", [("sessions",), ("show", "s1"), ("threads",), ("checkpoints", "t1"), ("repair",)]
)
@pytest.mark.parametrize("scheme", ["sqlite", "file"])
def test_looking_at_a_mistyped_path_makes_no_store(
    scheme: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    result = run(command[0], f"{scheme}:///{tmp_path / 'typo'}", *command[1:])
    assert result.exit_code == 2
    assert "typo" in result.stderr
    assert list(tmp_path.iterdir()) == []


# ---- repair, schema


def test_repair_counts_first_and_then_does_it(imported: str, conversations: Conversations) -> None:
    async def break_it() -> None:
        async with create_persistence(imported) as p:
            store = p._driver  # a listing that lost an entry, as a restored backup may have
            page = await store.scan("index/sessions", "", None, limit=1)
            await store.purge("index/sessions", page.entries[0].key, f"{page.entries[0].key}!")

    asyncio.run(break_it())
    for _ in range(2):
        assert json.loads(run("repair", imported, "--dry-run", "--json").stdout)["hints_added"] == 1
    result = run("repair", imported)
    assert result.exit_code == 0
    assert "hints added" in result.stdout
    assert json.loads(run("repair", imported, "--json").stdout)["hints_added"] == 0


def test_schema_prints_what_a_store_needs_and_nothing_else() -> None:
    result = run("schema", "postgresql://nobody:secret@nowhere.invalid/x")
    assert result.exit_code == 0
    assert result.stdout.startswith("CREATE ")
    result = run("schema", "memory://")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "needs no statements" in result.stderr


def test_schema_prints_a_view_where_there_is_one() -> None:
    for scheme in ("postgresql", "mysql", "mongodb"):
        result = run("schema", f"{scheme}://nowhere.invalid/x", "--view")
        assert result.exit_code == 0
        assert "VIEW" in result.stdout.upper()
        assert "CREATE TABLE" not in result.stdout
    result = run("schema", "sqlite:///agents.db", "--view")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "legible" in result.stderr


# ---- failing


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("agents.db", 2),
        ("nope://user:secret@host", 2),
        ("sqlite:///x.db?colour=red", 2),
        ("redis://user:secret@localhost:1/0", 1),
        ("postgresql://user:secret@localhost:1/x", 1),
    ],
)
def test_an_error_is_one_line_without_a_password(url: str, code: int) -> None:
    for command in (["sessions", url], ["repair", url], ["import", __file__, "--to", url]):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (code, "")
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("Error: ")
        assert "secret" not in result.stderr


def test_a_store_that_fails_ends_the_import_and_the_same_command_resumes(
    url: str, tmp_path: Path, conversations: Conversations
) -> None:
    file = write(tmp_path / "all.jsonl", conversations)
    result = run("import", file, "--to", "redis://localhost:1")
    assert result.exit_code == 1
    assert "the same command resumes" in result.stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_it_tells_how_to_install_them(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from persistence.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"the command needs the package {package!r}: run  pip install 'agent-persistence[cli]'\n"
    )


def test_help_has_an_example_for_each_command() -> None:
    commands = [
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    ]
    assert sorted(commands) == [
        *("checkpoints", "demo", "import", "repair", "schema", "sessions", "show", "threads")
    ]
    for command in commands:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"  persistence {command}" in result.stdout.partition("Example")[2]


@pytest.mark.parametrize(("reader", "seen"), [("head -c 1", b"{"), ("true", b""), ("sleep 0.1", b"")])
def test_a_reader_that_has_seen_enough_causes_no_traceback(
    imported: str, conversations: Conversations, reader: str, seen: bytes
) -> None:
    show = f"-m persistence show {imported} {conversations[0]['session_id']} --last 99 --json"
    command = f"{sys.executable} {show} | {reader}"
    done = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (seen, b"")


# ---- demo


def test_the_demo_survives_the_kill_and_says_where_things_are(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = run_process("demo", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    assert "\x1b" not in text
    assert "nothing lost, nothing doubled" in text
    (file,) = tmp_path.glob("persistence-demo-*/demo.db")
    url = f"sqlite:///{file}"
    assert f"persistence sessions {url}\n" in text
    assert len(json.loads(run("sessions", url, "--json").stdout)["sessions"]) == 6

    again = run("demo", "--to", url)
    assert again.exit_code == 2
    assert "already" in again.stderr


def test_the_demo_refuses_a_store_that_no_other_process_sees() -> None:
    assert run("demo", "--to", "memory://").exit_code == 2


def test_the_demo_would_notice_a_loss_a_double_and_a_change(conversations: Conversations) -> None:
    one = read_conversation(to_lines(conversations)[0])
    session_id, messages = one.record.session_id, one.messages
    expected = {session_id: len(messages)}

    def fault(found: list[dict[str, Any]]) -> str | None:
        return find_fault({session_id: one}, {session_id: found}, expected)

    assert fault(messages) is None
    assert fault(messages[:-1]) is not None
    assert fault([*messages, messages[-1]]) is not None
    assert fault([*messages[:3], messages[2], *messages[4:]]) is not None
    assert fault([*messages[:-1], messages[-1] | {"more": 1}]) is not None
    assert find_fault({session_id: one}, {session_id: messages[:-1]}, {}) is None


def test_the_version_is_that_of_the_package() -> None:
    from persistence import __version__

    assert run("--version").stdout == f"agent-persistence {__version__}\n"


def test_a_file_that_is_no_utf8_is_refused_line_by_line(tmp_path: Path) -> None:
    line = json.dumps(
        {"session_id": "s", "messages": [{"role": "user", "content": "это мир 日本 ok"}]}, ensure_ascii=False
    )
    (tmp_path / "f.jsonl").write_bytes(f"{line}\n{line}\n".encode("utf-16"))  # as PowerShell's > writes it
    result = run("import", str(tmp_path / "f.jsonl"), "--to", f"sqlite:///{tmp_path}/a.db")
    assert "sessions added" not in result.output
    assert result.exit_code == 1


def test_the_demo_encrypts_where_there_are_keys(tmp_path: Path) -> None:
    url, key = f"sqlite:///{tmp_path}/a.db", base64.b64encode(b"k" * 32).decode()
    assert run("demo", "--to", url, PERSISTENCE_KEYS=key).exit_code == 0
    assert b"role" not in (tmp_path / "a.db").read_bytes()
    assert run("sessions", url, PERSISTENCE_KEYS=key).exit_code == 0


def test_closed_output_is_no_error(tmp_path: Path) -> None:
    for json_ in ((), ("--json",)):
        command = [sys.executable, "-m", "persistence", "sessions", "memory://", *json_]
        done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def test_where_nobody_reads_errors_it_works_all_the_same(tmp_path: Path) -> None:
    lines, url = tmp_path / "one.jsonl", f"sqlite:///{tmp_path}/a.db"
    lines.write_text('{"session_id": "s1", "messages": [{"role": "user"}]}\n')
    for arguments in (["import", str(lines), "--to", url], ["repair", url], ["show", url, "s1"]):
        command = [sys.executable, "-m", "persistence", *arguments]
        done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, check=False)
        assert done.returncode == 0
    assert b"1 of 1 messages" in done.stdout


def test_a_narrow_terminal_shows_ids(imported: str) -> None:
    assert "airline" in run("sessions", imported, COLUMNS="30").stdout


@pytest.mark.parametrize("id", ["[link=http://x]click[/link]", "\x1b[31mred", "[/]"])
def test_an_id_that_somebody_wrote_into_the_store_gives_the_terminal_no_commands(url: str, id: str) -> None:
    async def prepare() -> None:
        async with create_persistence(url) as p:
            meta = await p.checkpoints.put("t", {"a": 1})
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
            quoted = json.dumps(id)[1:-1]
            for place, value in db.execute("SELECT rowid, v FROM persistence").fetchall():
                changed = value.replace(meta.id.encode(), quoted.encode())
                db.execute("UPDATE persistence SET v = ? WHERE rowid = ?", (changed, place))

    asyncio.run(prepare())
    shown = id.replace("\x1b", "\\x1b")
    assert shown in "".join(run("threads", url).stdout.split("\n"))
    assert shown in "".join(run("checkpoints", url, "t").stdout.split("\n"))

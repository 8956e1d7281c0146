"""A session's messages against a plain list, whatever several writers do one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from faulty_driver import RecordingDriver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from persistence import ConflictError, NotFoundError, Persistence, SessionRecord, create_persistence
from persistence.drivers.memory import MemoryDriver
from persistence.log import APPEND_ENTRIES
from persistence.repositories import Sessions

T = TypeVar("T")

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
WRITERS = 2
ONCE = {"one": 1, "three": 3, "a/b": 40}  # idempotency keys: for how many messages

ids = st.sampled_from("ssst")
places = st.floats(0, 1)
lives = st.sampled_from([None, None, None, 0.1, 0.5, 2, 20])
sizes = st.sampled_from([0, 1, 2, 3, 7, 20, 499, 500, 501, 10**12 - 1])


@dataclass
class Model:
    """A session: the numbers and texts of its visible messages, and what became of it."""

    visible: list[tuple[int, str]] = field(default_factory=list)
    greatest: int = 0  # number ever given, markers included
    marker: int = 0  # the last of these
    saved: bool = False
    deleted_at: int | None = None
    expires_at: int | None = None
    onces: dict[str, list[int]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return self.visible[-1][0] if self.visible else 0

    def add(self, texts: list[str]) -> list[int]:
        numbers = list(range(self.greatest + 1, self.greatest + 1 + len(texts)))
        self.visible += zip(numbers, texts, strict=True)
        self.greatest += len(texts)
        return numbers

    def mark(self) -> None:
        self.greatest = self.marker = self.greatest + 1

    def expired(self, now: int) -> bool:
        return self.expires_at is not None and self.expires_at <= now

    def bury(self, now: int) -> None:
        self.mark()
        self.visible, self.saved, self.deleted_at, self.expires_at = [], False, now, None
        self.onces = {}  # keys of a life that is over

    def save(self, expires_at: int | None) -> None:
        sooner = expires_at is not None and (self.expires_at is None or expires_at < self.expires_at)
        if self.deleted_at is not None or sooner:
            self.mark()
        self.saved, self.deleted_at, self.expires_at = True, None, expires_at

    def page(
        self, last: int | None, after: int | None, before: int | None, limit: int | None
    ) -> list[tuple[int, str]]:
        if last is not None:
            return self.visible[len(self.visible) - min(last, len(self.visible)) :]
        if before is not None:
            found = [entry for entry in self.visible if entry[0] < before]
            return found if limit is None else found[len(found) - min(limit, len(found)) :]
        return [entry for entry in self.visible if entry[0] > (after or 0)][:limit]


class Writers(RuleBasedStateMachine):
    """Several processes, each with its memory of how the sessions end, on one store."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.now = 1_800_000_000_000
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("persistence.log.steady_seconds", lambda: self.now / 1000)
        self.memory = MemoryDriver()
        self.drivers = [RecordingDriver(self.memory) for _ in range(WRITERS)]
        self.opened = [self.run(self.open(driver)) for driver in self.drivers]
        self.models = {"s": Model(), "t": Model()}
        self.texts = 0
        self.at = 0

    @property
    def sessions(self) -> Sessions:
        return self.opened[self.at].sessions

    async def open(self, driver: RecordingDriver) -> Persistence:
        return await create_persistence(driver, clock=lambda: self.now)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def text(self) -> str:
        self.texts += 1
        return f"m{self.texts}"

    def refused(self, error: type[Exception], call: Coroutine[Any, Any, Any]) -> None:
        with pytest.raises(error):
            self.run(call)

    # ---- what changes a session

    @rule(
        id=ids,
        many=st.sampled_from([None, None, None, None, 0, 1, 2, 3, 4, 20, 500, APPEND_ENTRIES + 1]),
        key=st.one_of(st.none(), st.sampled_from(list(ONCE))),
        off=st.sampled_from([None, None, 0, -1, 1, 2]),
    )
    def add(self, id: str, many: int | None, key: str | None, off: int | None) -> None:
        sessions, model = self.sessions, self.models[id]
        if key is not None:  # a repetition has as many
            many = ONCE[key] if ONCE[key] > 1 else None
        texts = [self.text() for _ in range(1 if many is None else many)]
        messages = [{"id": text} for text in texts]
        expected_last = None if off is None else max(0, model.last + off)
        given: dict[str, Any] = {"idempotency_key": key, "expected_last": expected_last}
        if many is None:
            call: Coroutine[Any, Any, Any] = sessions.add_message(id, messages[0], **given)
        else:
            call = sessions.add_messages(id, messages, **given)
        if not texts:
            numbers = []
        elif model.expired(self.now):
            self.refused(NotFoundError, call)
            return
        elif key in model.onces:
            numbers = model.onces[key]
        elif model.deleted_at is not None or expected_last not in (None, model.last):
            self.refused(ConflictError if model.deleted_at is None else NotFoundError, call)
            return
        else:
            numbers = model.add(texts)
            if key is not None:
                model.onces[key] = numbers
        assert self.run(call) == (numbers[0] if many is None else numbers)

    @rule(id=ids, by=st.lists(st.integers(0, WRITERS - 1), min_size=2, max_size=12))
    def add_at_once(self, id: str, by: list[int]) -> None:
        model, texts = self.models[id], [self.text() for _ in by]

        async def add() -> list[Any]:
            calls = [
                self.opened[at].sessions.add_message(id, {"id": text})
                for at, text in zip(by, texts, strict=True)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

        numbers = self.run(add())
        if model.deleted_at is not None or model.expired(self.now):
            assert all(isinstance(number, NotFoundError) for number in numbers)
        else:
            order = sorted(zip(numbers, texts, strict=True))
            assert model.add([text for _, text in order]) == sorted(numbers)

    @rule(id=ids)
    def clear(self, id: str) -> None:
        model = self.models[id]
        if model.expired(self.now):
            assert self.run(self.sessions.clear_messages(id)) == 0
            return
        assert self.run(self.sessions.clear_messages(id)) == len(model.visible)
        if model.visible:
            model.mark()
        model.visible = []

    @rule(id=ids, place=places, by_id=st.booleans())
    def truncate(self, id: str, place: float, by_id: bool) -> None:
        model, sessions = self.models[id], self.sessions
        if model.expired(self.now):
            self.refused(NotFoundError, sessions.truncate_after_message(id, seq=model.last))
            return
        there = {number for number, _ in model.visible}
        hidden = [number for number in range(model.greatest + 3) if number not in there]
        not_there = hidden[round(place * (len(hidden) - 1))]
        self.refused(NotFoundError, sessions.truncate_after_message(id, seq=not_there))
        self.refused(NotFoundError, sessions.truncate_after_message(id, self.text()))
        if not model.visible:
            return
        index = round(place * (len(model.visible) - 1))
        number, text = model.visible[index]
        gone = len(model.visible) - 1 - index
        which: dict[str, Any] = {"message_id": text} if by_id else {"seq": number}
        assert self.run(sessions.truncate_after_message(id, **which)) == gone
        if gone:
            del model.visible[index + 1 :]
            model.mark()

    @rule(id=ids)
    def delete(self, id: str) -> None:
        model = self.models[id]
        removed = self.run(self.sessions.delete_session(id))
        assert (removed.sessions, removed.messages) == (model.saved, len(model.visible))
        if model.saved or (model.greatest and model.deleted_at is None):
            model.bury(self.now)

    @rule(id=ids, hours=lives)
    def save(self, id: str, hours: float | None) -> None:
        model = self.models[id]
        expires_at = None if hours is None else self.now + int(hours * HOUR_MS)
        record = SessionRecord(session_id=id, image_id="i", container_id="c", expires_at=expires_at)
        assert self.run(self.sessions.save_session(record)) > 0
        if model.expired(self.now):
            model.bury(self.now)
        model.save(expires_at)

    @rule(id=ids, hours=lives)
    def set_expiry(self, id: str, hours: float | None) -> None:
        model = self.models[id]
        expires_at = None if hours is None else self.now + int(hours * HOUR_MS)
        call = self.sessions.set_expiry(id, expires_at)
        if not model.saved or model.expired(self.now):
            self.refused(NotFoundError, call)
        else:
            assert self.run(call).expires_at == expires_at
            model.save(expires_at)

    @rule(hours=st.sampled_from([0.05, 0.2, 1]))
    def wait(self, hours: float) -> None:
        self.now += int(hours * HOUR_MS)

    # ---- what must change nothing

    @rule(hours=st.sampled_from([0, 0, 0.1, 30, 200]))
    def repair(self, hours: float) -> None:
        self.now += int(hours * HOUR_MS)
        report = self.run(self.opened[self.at].repair())
        assert report.corrupt == []
        for id, model in self.models.items():
            if model.expired(self.now):
                model.bury(self.now)
            if model.deleted_at is not None and model.deleted_at < self.now - 7 * DAY_MS:
                self.models[id] = Model()  # nothing is known of it any more, not even its numbers

    @rule()
    def restart(self) -> None:
        self.run(self.opened[self.at].close())
        assert self.drivers[self.at].broken == []
        self.drivers[self.at] = RecordingDriver(self.memory)
        self.opened[self.at] = self.run(self.open(self.drivers[self.at]))

    @rule()
    def switch(self) -> None:
        """Let another writer go on: each does several things in a row, of which the others do not know."""
        self.at = (self.at + 1) % WRITERS

    # ---- what is seen

    @rule(
        id=ids,
        bound=st.sampled_from([None, "last", "after", "before"]),
        size=sizes,
        place=places,
        limit=st.one_of(st.none(), sizes),
    )
    def read(self, id: str, bound: str | None, size: int, place: float, limit: int | None) -> None:
        model, sessions = self.models[id], self.sessions
        number = size if bound == "last" else round(place * (model.greatest + 2))
        page: dict[str, int | None] = {"last": None, "after": None, "before": None, "limit": limit}
        if bound is not None:
            page[bound] = number
        if bound == "last":
            page["limit"] = None
        expired = model.expired(self.now)
        expected = [] if expired else model.page(**page)
        found = self.run(sessions.read_messages(id, **page))
        assert [(one.seq, one.message["id"]) for one in found] == expected
        assert self.run(sessions.get_messages(id, **page)) == [{"id": text} for _, text in expected]
        assert self.run(sessions.count_messages(id)) == (0 if expired else len(model.visible))
        assert self.run(sessions.session_exists(id)) == (model.saved and not expired)

    def teardown(self) -> None:
        try:
            for id in self.models:
                for _ in range(WRITERS):
                    self.switch()
                    self.read(id=id, bound=None, size=0, place=0, limit=None)
            for days in (8, 2):  # what the first repair empties, the second removes
                self.repair(hours=24 * days)
            for id, model in self.models.items():
                page = self.run(self.memory.scan(f"session/{id}", "message/", "message0", limit=100_000))
                left = {number for number, _ in model.visible} | ({model.marker} if model.marker else set())
                assert [int(entry.key[len("message/") :]) for entry in page.entries] == sorted(left)
            for p in self.opened:
                self.run(p.close())
            assert [driver.broken for driver in self.drivers] == [[]] * WRITERS
        finally:
            self.runner.close()
            self.patch.undo()


Writers.TestCase.settings = settings(max_examples=60, stateful_step_count=80, deadline=None)
TestSessionsEqualLists = Writers.TestCase

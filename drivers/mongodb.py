r"""A document an entry, in one collection. Its `_id` is the only index that is needed.

    {_id: "default/session/42\0m/000000000007", p: "default/session/42", v: BinData(…), ver: NumberLong(…)}

MongoDB 5.0 and later, as a replica set (one node is enough) or sharded by ``{p: "hashed"}``, where every
filter names `p`. Round trips: 1 for `get` (2 beyond 8 MB), `scan`, `partitions`, and a `commit` of Writes of
one op; 2 for other Writes, 5 where one of several is refused or a Write deletes, beside other ops, a key
that is not there; `purge` 2 for each 5,000 entries. What would surprise:

* `_id` is a string, since binary data would sort by length first. A partition holds no NUL, hence the entries
  of one lie side by side, by rising key.
* Reads are snapshots of what the majority has. A write acknowledged earlier than that would be missed by the
  next read, so writes always wait for the majority.
* `_GONE` makes an upsert fail that finds nothing to update. So each conditional update of a bulk reports by
  itself that it was refused, which MongoDB otherwise tells only as a total.
* A Write of one op needs no transaction. The others share one; where that fails because of one of them, it is
  sought out, and in the end each has a transaction of its own.
* A `Check` writes field `c`: under snapshot isolation, what is only read may change before the commit.
* For a minute MongoDB keeps a transaction whose client was killed before the commit, and lets nobody else
  write there. So a `commit` that takes long looks for such transactions of this library, and aborts them.
* Where pymongo sends a write again after a lost connection, that is safe, and left on: the server knows the
  write by its transaction number and does not apply it twice. Lone creates it does not send again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote

from persistence.driver import ABSENT, Delete, Entry, Key, Op, Page, Put, Write, page_of
from persistence.errors import ConfigurationError, CorruptRecordError, UnavailableError
from persistence.options import (
    Durability,
    check_address,
    check_durability,
    check_files,
    check_namespace,
    check_pool_size,
    check_seconds,
    flag,
    masked_url,
    missing_client,
    split_url,
    take_apart,
    untrusted,
    url_or_address,
)

try:
    import pymongo
    from bson.codec_options import CodecOptions
    from bson.int64 import Int64
    from pymongo import AsyncMongoClient, DeleteOne, ReadPreference, UpdateOne, WriteConcern, errors
    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.asynchronous.collection import AsyncCollection
    from pymongo.driver_info import DriverInfo
    from pymongo.read_concern import ReadConcern
except ImportError as error:
    raise missing_client("mongodb", "pymongo") from error

__all__ = ["MongoDBDriver", "from_url", "mongodb_driver"]

T = TypeVar("T")
_Document: TypeAlias = dict[str, Any]
_Request: TypeAlias = "UpdateOne | DeleteOne"
_Outcomes: TypeAlias = list[bool | None]

# An upsert would have to insert this `_id` beside the one of its filter: the server refuses with error 66.
_GONE = {"$setOnInsert": {"_id": 0}}
_REFUSED = (66, 11000)  # immutable field: see above; duplicate key
_FORBIDDEN = (13, 18, 73)  # unauthorized, authentication failed, invalid namespace
_EXISTS = 48
_WIRE_VERSION = 13  # MongoDB 5.0
_SNAPSHOT = ReadConcern("snapshot")
_TRIES = 12
_AT_ONCE = 8  # transactions of one `commit` that run singly
_FULL_ANSWER = 8 << 20  # half of what one answer can hold; no value has more than the sixteenth part
_WINDOW = 8_000  # names that one answer can hold, however long they are
_PAGE = 5_000  # entries that it can hold, however long their names, with PAGE_BYTES of values
_PURGE_STEP = 5_000
_ABANDONED = 3.0  # seconds in which nothing was done in a transaction
_IDLE_MS = 60_000  # after which a connection is renewed: firewalls forget those of some minutes
_OURS = DriverInfo("agent-persistence")  # tells the server whose connections these are
_FILES = ("tlsCAFile", "tlsCertificateKeyFile", "tlsCRLFile")
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "namespace": str,
    "durability": str,
    "create": flag,
    "database": str,
    "collection": str,
    "timeout": float,
    "connect_timeout": float,
    "pool_size": int,
}
# Binary data can be told as text by no operator before MongoDB 8.
_AS_JSON = """function (v) {
  try { return JSON.parse(decodeURIComponent(v.hex().replace(/../g, "%$&"))); } catch (e) { return null; }
}"""
_VIEW: list[_Document] = [
    {
        "$project": {
            "_id": 0,
            "namespace": {"$first": {"$split": ["$p", "/"]}},
            "partition": {
                "$substrCP": ["$p", {"$add": [{"$indexOfCP": ["$p", "/"]}, 1]}, {"$strLenCP": "$p"}]
            },
            "key": {"$last": {"$split": ["$_id", "\0"]}},
            "value": {"$function": {"body": _AS_JSON, "args": ["$v"], "lang": "js"}},
            "bytes": {"$binarySize": "$v"},
            "version": "$ver",
        }
    }
]
_log = logging.getLogger("persistence")


class MongoDBDriver:
    """Keep everything in a collection of a MongoDB replica set or sharded cluster.

    `url` is ``mongodb://user:password@host:port/database?replicaSet=…`` or ``mongodb+srv://…``. Without it,
    `host`, `port`, `user` and `password` say the same. `client`, an ``AsyncMongoClient``, is used instead
    where given, and not closed.

    The entries are in `collection` of `database`, by default the one that the URL names, or else "agentx".
    `open` makes it unless `create` is False, which asks that it exists: `ddl` tells how, sharding included.
    `timeout` is how many seconds a call may take, `connect_timeout` how many a server may be sought,
    `pool_size` how many connections there may be. Further options go to pymongo as they are; options of the
    URL win over all of these.

    pymongo's own logger "pymongo.command" shows at level DEBUG what is stored: leave it at INFO.

    Transactions that a process left open when it was killed are aborted after 3 seconds, those of a `client`
    that was passed in only by MongoDB itself, after its ``transactionLifetimeLimitSeconds``, by default 60.

    `durability`: every write waits for the majority of the nodes with both, for reads see nothing else.
    "power" also asks that they have it in their journal. "process" leaves that to the replica set's
    ``writeConcernMajorityJournalDefault``, which unless changed says the same.
    """

    lanes = 2

    def __init__(
        self,
        url: str | None = None,
        *,
        client: AsyncMongoClient[Any] | None = None,
        host: str | None = None,
        port: int | None = None,
        user: str | None = None,
        password: str | None = None,
        database: str | None = None,
        collection: str = "storage",
        namespace: str = "default",
        durability: Durability = "power",
        create: bool = True,
        timeout: float = 10.0,
        connect_timeout: float = 5.0,
        pool_size: int = 20,
        **client_options: Any,
    ) -> None:
        check_address("mongodb", host, port, user, password, database)
        check_pool_size(pool_size)
        check_seconds("timeout", timeout)
        check_seconds("connect_timeout", connect_timeout)
        self._namespace = check_namespace(namespace)
        journal = {"j": True} if check_durability(durability) == "power" else {}
        self._durable = WriteConcern("majority", **journal)
        self.may_lose = not journal
        if isinstance(client, pymongo.MongoClient) or not (client is None or hasattr(client, "admin")):
            message = f"mongodb: client must be an AsyncMongoClient, not a {type(client).__name__}"
            raise ConfigurationError(message)
        self._url = url_or_address(url, "mongodb", host, port)
        self._database = database or _database_of(self._url) or "agentx"
        self._name = collection
        self._create = create
        self._sharded = False
        self._timeout = timeout
        self._connect_timeout = min(connect_timeout, timeout)
        self._given = client
        self._client = client
        self._collection: AsyncCollection[_Document] | None = None
        self._sweep: asyncio.Task[None] | None = None
        options: dict[str, Any] = {
            "driver": _OURS,
            "serverSelectionTimeoutMS": int(connect_timeout * 1000),
            "connectTimeoutMS": int(connect_timeout * 1000),
            "maxIdleTimeMS": _IDLE_MS,
            "maxPoolSize": pool_size,
            **({} if user is None else {"username": user}),
            **({} if password is None else {"password": password}),
            **client_options,
        }
        # pymongo takes ";" as well.
        named = {option.partition("=")[0].lower() for option in re.split("[&;]", self._url.partition("?")[2])}
        self._options = {name: value for name, value in options.items() if name.lower() not in named}

    def __repr__(self) -> str:
        where = "client=…" if self._given else repr(masked_url(self._url))
        return f"mongodb_driver({where}, database={self._database!r}, collection={self._name!r})"

    def ddl(self) -> str:
        """Return what makes the collection, for mongosh. The second line is for sharded clusters only."""
        full = f"{self._database}.{self._name}"
        return (
            f"db.getSiblingDB({json.dumps(self._database)}).createCollection({json.dumps(self._name)})\n"
            f'sh.shardCollection({json.dumps(full)}, {{p: "hashed"}})  // sharded clusters only'
        )

    def view_ddl(self) -> str:
        """Return what makes a view of the data, ``<collection>_view``, for mongosh: there values are BinData.

        A value that is no JSON is null there. This driver does not use the view.
        """
        view = ", ".join(map(json.dumps, (f"{self._name}_view", self._name, _VIEW)))
        return f"db.getSiblingDB({json.dumps(self._database)}).createView({view})"

    async def open(self) -> None:
        if self._collection is not None:
            return
        try:
            await check_files("mongodb", self._url, self._options, _FILES)
            if self._client is None:
                self._client = self._connect()
            with self._translated():
                with pymongo.timeout(self._connect_timeout):  # replaces serverSelectionTimeoutMS
                    await self._check_server(self._client)
                await self._check_collection(self._client)
                self._collection = self._client[self._database].get_collection(
                    self._name, CodecOptions(), ReadPreference.PRIMARY, self._durable, _SNAPSHOT
                )
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._sweep is not None:
            await asyncio.wait([self._sweep])
        client, self._client, self._collection = self._client, self._given, None
        if client is not None and client is not self._given:
            await client.close()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        ids = [self._id(key.partition, key.key) for key in keys]
        wanted: _Document = {"_id": ids[0] if len(ids) == 1 else {"$in": ids}}
        if self._sharded:  # or all shards would be asked
            wanted["p"] = {"$in": list({self._partition(key.partition) for key in keys})}
        with self._translated():
            found = await self._find(wanted, len(ids))
            if (
                len(found) < len(ids)
                and sum(len(v) for d in found if isinstance(v := d.get("v"), bytes)) > _FULL_ANSWER
            ):
                found = await self._entries.find(wanted).to_list()  # more than one answer can hold
        documents = {document["_id"]: document for document in found}
        return [
            _entry(*key, documents[id]) if id in documents else None
            for key, id in zip(keys, ids, strict=True)
        ]

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        limit = min(limit, _PAGE)
        named = len(self._id(partition, ""))
        with self._translated():
            # Of large values up to 16 MB come, the most of one answer, of which a page keeps PAGE_BYTES.
            documents = await self._find(
                self._range(partition, start, end),
                limit + 1,
                sort={"_id": pymongo.DESCENDING if reverse else pymongo.ASCENDING},
            )
        return page_of((_entry(partition, each["_id"][named:], each) for each in documents), limit)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        kinds: dict[Callable[[Sequence[Write]], Any], list[int]] = {}
        for place, write in enumerate(writes):
            kinds.setdefault(self._way(write), []).append(place)
        outcomes: _Outcomes = [None] * len(writes)
        try:
            with self._translated(), self._unhindered():
                results = await _settled([way([writes[n] for n in places]) for way, places in kinds.items()])
        except UnavailableError as error:
            if [*kinds] == [self._insert]:  # one command, which may have had nowhere to go
                error.unapplied = isinstance(error.__cause__, errors.ServerSelectionTimeoutError)
            raise
        for places, result in zip(kinds.values(), results, strict=True):
            for place, outcome in zip(places, result or (), strict=result is not None):
                outcomes[place] = outcome
        return outcomes

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        within = self._range(partition, start, end)
        while True:
            with self._translated():
                following = await self._find(
                    within, 1, sort={"_id": 1}, projection={"_id": 1}, skip=_PURGE_STEP
                )
                step = {**within["_id"], **({"$lt": following[0]["_id"]} if following else {})}
                await self._entries.delete_many({**within, "_id": step})
            if not following:
                return
            within["_id"]["$gte"] = following[0]["_id"]

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        """List by `_id` alone, which the index answers; the cursor is the last partition of the page."""
        start = f"{self._namespace}/" if cursor is None else f"{self._partition(cursor)}\x01"
        with self._translated():
            # Most partitions hold a few entries; one that holds more is passed by at the end of a page.
            window = min(4 * limit, _WINDOW)
            within = {"_id": {"$gte": start, "$lt": f"{self._namespace}0"}}
            documents = await self._find(within, window, sort={"_id": 1}, projection={"_id": 1})
        skip = len(self._namespace) + 1
        names = list(dict.fromkeys(document["_id"].partition("\0")[0][skip:] for document in documents))
        done = len(documents) < window and len(names) <= limit
        return names[:limit], None if done else names[:limit][-1]

    def _connect(self) -> AsyncMongoClient[Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # pymongo leaves out an option it does not know
                return AsyncMongoClient(self._url, **self._options)
        except UserWarning as error:
            what = str(error) if str(error).startswith("Unknown option") else "an option has no valid value"
            message = f"mongodb: {what}; ours are {', '.join(sorted(_OPTIONS))}, others are pymongo's"
            raise ConfigurationError(message) from None
        except (TypeError, ValueError, OSError, errors.PyMongoError) as error:
            if (refused := untrusted(error, "mongodb", "tlsCAFile=")) is not None:
                raise refused from error
            # Not even as the cause: it may quote a part of the password out of a malformed URL.
            message = f"mongodb: pymongo cannot use {masked_url(self._url)!r}, or one of the options given"
            raise ConfigurationError(message) from None

    async def _check_server(self, client: AsyncMongoClient[Any]) -> None:
        hello = await client.admin.command("hello")
        self._sharded = hello.get("msg") == "isdbgrid"
        if hello["maxWireVersion"] < _WIRE_VERSION:
            message = "mongodb: the server is too old; 5.0 is the oldest that works"
            raise ConfigurationError(message)
        if "setName" not in hello and not self._sharded:
            message = (
                "mongodb: the server stands alone and has no transactions: start it with --replSet rs0 and "
                "run rs.initiate() once in mongosh; a replica set of one node is enough"
            )
            raise ConfigurationError(message)

    async def _check_collection(self, client: AsyncMongoClient[Any]) -> None:
        database = client[self._database]
        listed = await database.list_collections(filter={"name": self._name})
        for found in await listed.to_list():
            options = found["options"]
            if found["type"] != "collection" or "collation" in options or options.get("capped"):
                message = (
                    f"mongodb: {self._database}.{self._name} must be a plain collection without collation"
                )
                raise ConfigurationError(message)
            return
        if not self._create:
            message = (
                f"mongodb: no collection {self._database}.{self._name}, and create=False; run  {self.ddl()}"
            )
            raise ConfigurationError(message)
        try:
            await database.create_collection(self._name, check_exists=False, write_concern=self._durable)
        except errors.OperationFailure as failure:
            if failure.code != _EXISTS:  # another process was faster
                raise

    @property
    def _entries(self) -> AsyncCollection[_Document]:
        if self._collection is None:
            message = "mongodb: the driver is not open"
            raise ConfigurationError(message)
        return self._collection

    def _way(self, write: Write) -> Callable[[Sequence[Write]], Any]:
        """Return the method that commits Writes like this one."""
        match write.ops:
            case (Delete(expect=None),):
                return self._delete
            case (Delete(),):
                return self._delete_expected
            case (Put(expect=0),):  # ABSENT
                return self._insert
            case (_,):
                return self._update
            case _:
                return self._transact

    async def _find(self, wanted: _Document, limit: int, **options: Any) -> list[_Document]:
        """Return up to `limit` documents in one answer. A cursor costs pymongo half as much again."""
        reply = await self._entries.database.command(
            {
                "find": self._name,
                "filter": wanted,
                # A lone `_id` the server finds without any planning, but only without a hint.
                **({"hint": {"_id": 1}} if "sort" in options else {}),
                "limit": limit,
                "batchSize": limit,
                "singleBatch": True,
                "readConcern": _SNAPSHOT.document,
                **options,
            }
        )
        found: list[_Document] = reply["cursor"]["firstBatch"]
        return found

    async def _insert(self, writes: Sequence[Write]) -> _Outcomes:
        # Without the machinery of a bulk write, which costs pymongo as much again.
        reply = await self._entries.database.command(
            {
                "insert": self._name,
                "documents": [self._document(write, write.ops[0]) for write in writes],
                "ordered": False,
                "writeConcern": self._durable.document,
            }
        )
        outcomes: _Outcomes = [None if "writeConcernError" in reply else True] * len(writes)
        return _without_losers(outcomes, reply.get("writeErrors", ()))

    async def _update(self, writes: Sequence[Write]) -> _Outcomes:
        requests = [self._request(write, write.ops[0]) for write in writes]
        outcomes = await self._bulk(requests)
        free = [n for n, write in enumerate(writes) if write.ops[0].expect is None]
        for _ in range(_TRIES):
            # Two upserts of a key may both try to insert it; the one that fails finds it there the next time.
            lost = [n for n in free if outcomes[n] is False]
            if not lost:
                return outcomes
            for n, outcome in zip(lost, await self._bulk([requests[n] for n in lost]), strict=True):
                outcomes[n] = outcome
        return [None if n in free and outcome is False else outcome for n, outcome in enumerate(outcomes)]

    async def _delete(self, writes: Sequence[Write]) -> _Outcomes:
        return await self._bulk([DeleteOne(self._place(write, write.ops[0])) for write in writes])

    async def _delete_expected(self, writes: Sequence[Write]) -> _Outcomes:
        # A bulk would tell only how many of them were deleted.
        deletions = [self._entries.delete_one(self._place(write, write.ops[0])) for write in writes]
        return [None if result is None else result.deleted_count == 1 for result in await _settled(deletions)]

    async def _bulk(self, requests: Sequence[_Request]) -> _Outcomes:
        try:
            await self._entries.bulk_write(requests, ordered=False)
        except errors.BulkWriteError as failure:
            outcomes: _Outcomes = [None if failure.details["writeConcernErrors"] else True] * len(requests)
            return _without_losers(outcomes, failure.details["writeErrors"])
        return [True] * len(requests)

    async def _transact(self, writes: Sequence[Write]) -> _Outcomes:
        """Try all in one transaction, then all that look as if they could hold, then each by itself."""
        if len(writes) > 1:
            for look in (False, True):
                try:
                    return await self._transaction(writes, look=look)
                except errors.PyMongoError as failure:
                    if _is_refusal(failure):
                        continue
                    if not _is_passing(failure):
                        raise
                    break
        turn = asyncio.Semaphore(_AT_ONCE)

        async def alone(write: Write) -> bool | None:
            async with turn:
                return await self._retried(write)

        return await _settled([alone(write) for write in writes])

    async def _retried(self, write: Write) -> bool | None:
        """Commit one Write in a transaction; again while others were in its way, which changed nothing."""
        for attempt in count():
            try:
                return (await self._transaction([write], look=False))[0]
            except errors.PyMongoError as failure:
                if _is_refusal(failure):
                    return False
                if not _is_passing(failure):  # such as that the time is up
                    raise
            await asyncio.sleep(random.uniform(0, 0.005 * 2 ** min(attempt, 6)))
        return None

    async def _transaction(self, writes: Sequence[Write], *, look: bool) -> _Outcomes:
        client = self._entries.database.client
        async with client.start_session(causal_consistency=False) as session:
            await session.start_transaction(_SNAPSHOT, self._durable, ReadPreference.PRIMARY)
            outcomes: _Outcomes = [True] * len(writes)
            if look:
                outcomes = await self._look(writes, session)
            requests: list[_Request] = []
            deletions: list[_Request] = []
            free: list[tuple[Write, Op]] = []  # Deletes of what may be absent
            for write, holds in zip(writes, outcomes, strict=True):
                for op in write.ops if holds else ():
                    if isinstance(op, Delete) and op.expect is None:
                        free.append((write, op))
                    else:
                        requests.append(self._request(write, op))
                    if isinstance(op, Delete):
                        deletions.append(DeleteOne(self._place(write, op)))
            if requests or deletions:
                done = await self._entries.bulk_write([*requests, *deletions], session=session)
                if done.deleted_count < len(deletions):
                    # What is absent must stay so until the commit, and only what is written is locked.
                    held = [self._request(*each) for each in free]
                    gone = [DeleteOne(self._place(*each)) for each in free]
                    await self._entries.bulk_write([*held, *gone], session=session)
            await _commit(session)
        return outcomes

    async def _look(self, writes: Sequence[Write], session: AsyncClientSession) -> _Outcomes:
        """Tell which Writes hold in the snapshot of this transaction."""
        expected = [(write, op) for write in writes for op in write.ops if op.expect is not None]
        ids = [self._id(write.partition, op.key) for write, op in expected]
        partitions = list({self._partition(write.partition) for write, _ in expected})
        found = self._entries.find(
            {"_id": {"$in": ids}, "p": {"$in": partitions}},
            {"ver": 1},
            batch_size=len(ids) + 1,
            session=session,
        )
        versions = {document["_id"]: document["ver"] for document in await found.to_list()}
        return [
            all(
                op.expect is None or versions.get(self._id(write.partition, op.key), ABSENT) == op.expect
                for op in write.ops
            )
            for write in writes
        ]

    def _request(self, write: Write, op: Op) -> UpdateOne:
        """Return the update that does a Put or a Check, or tests for a Delete; it fails unless `op` holds."""
        if isinstance(op, Put):
            change = {"v": op.value, "ver": Int64(write.version)}
        else:
            change = {"c": Int64(write.version)}
        place = self._place(write, op)
        if op.expect in (None, ABSENT):
            # No document has version 0: the upsert inserts, and fails where the `_id` is taken.
            where = place if op.expect is None else {**place, "ver": ABSENT}
            return UpdateOne(where, {"$set": change}, upsert=True)
        return UpdateOne(place, {"$set": change, **_GONE}, upsert=True)

    def _document(self, write: Write, op: Op) -> _Document:
        value = op.value if isinstance(op, Put) else b""
        return {**self._place(write, op), "v": value, "ver": Int64(write.version)}

    def _place(self, write: Write, op: Op) -> _Document:
        place = {"_id": self._id(write.partition, op.key), "p": self._partition(write.partition)}
        return {**place, "ver": Int64(op.expect)} if op.expect else place

    def _range(self, partition: str, start: str, end: str | None) -> _Document:
        physical = self._partition(partition)
        stop = f"{physical}\x01" if end is None else f"{physical}\0{end}"
        within: _Document = {"_id": {"$gte": f"{physical}\0{start}", "$lt": stop}}
        return {**within, "p": physical} if self._sharded else within

    def _id(self, partition: str, key: str) -> str:
        return f"{self._namespace}/{partition}\0{key}"

    def _partition(self, partition: str) -> str:
        return f"{self._namespace}/{partition}"

    @contextmanager
    def _unhindered(self) -> Iterator[None]:
        """From time to time while this takes long, end what may be in the way."""
        loop = asyncio.get_running_loop()
        patience = min(_ABANDONED, self._timeout / 2)

        timer: asyncio.TimerHandle

        def begin() -> None:
            nonlocal timer
            timer = loop.call_later(patience, sweep)

        def sweep() -> None:
            if self._sweep is None or self._sweep.done():
                self._sweep = loop.create_task(self._end_abandoned())
            begin()

        begin()
        try:
            yield
        finally:
            timer.cancel()

    async def _end_abandoned(self) -> None:
        """Abort our transactions in which nothing was done for long; who still wants one begins it anew."""
        admin = self._entries.database.client.admin
        idle = {
            "clientMetadata.driver.name": {"$regex": f"\\|{_OURS.name}$"},
            "transaction.timeInactiveMicros": {"$gt": _ABANDONED * 1_000_000},
        }
        try:
            found = await admin.aggregate([{"$currentOp": {"idleSessions": True}}, {"$match": idle}])
            sessions = [{"id": one["lsid"]["id"]} async for one in found]
            if sessions:
                await admin.command("killSessions", sessions)
                _log.warning("mongodb: aborted %d transactions that were left open", len(sessions))
        except errors.PyMongoError as error:  # the server will end them, later
            level = logging.WARNING if isinstance(error, errors.OperationFailure) else logging.DEBUG
            _log.log(level, "mongodb: cannot end transactions that were left open: %s", error)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with pymongo.timeout(self._timeout):
                yield
        except errors.BulkWriteError as error:
            # Its text and its fields quote the values that were to be stored.
            faults = error.details["writeErrors"] or error.details["writeConcernErrors"]
            message = f"mongodb: error {faults[0]['code']}: {faults[0].get('errmsg')}"
            raise UnavailableError(message) from None
        except errors.OperationFailure as error:
            message = f"mongodb: {error.details.get('errmsg') if error.details else error}"
            if error.code in _FORBIDDEN:
                raise ConfigurationError(message) from error
            raise UnavailableError(message) from error
        except (errors.ConfigurationError, errors.InvalidName) as error:
            message = f"mongodb: {error}"
            raise ConfigurationError(message) from error
        except errors.PyMongoError as error:
            message = f"mongodb: {error}"
            raise untrusted(error, "mongodb", "tlsCAFile=") or UnavailableError(message) from error


mongodb_driver = MongoDBDriver


def from_url(url: str) -> MongoDBDriver:
    """Return the driver of ``mongodb://host/database?collection=…&namespace=…``; others go to pymongo."""
    split = split_url(url, _OPTIONS, others=True)
    return MongoDBDriver(split.url, **split.options)


def _without_losers(outcomes: _Outcomes, faults: Iterable[_Document]) -> _Outcomes:
    for fault in faults:
        outcomes[fault["index"]] = False if fault["code"] in _REFUSED else None
    return outcomes


def _database_of(url: str) -> str:
    return unquote(take_apart(url).path[1:])


async def _settled(calls: Sequence[Awaitable[T]]) -> list[T | None]:
    """Return results, None for a call that failed; raise if all did, or for what the server did not cause."""
    if len(calls) == 1:
        return [await calls[0]]
    results = await asyncio.gather(*calls, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in failures:
        if len(failures) == len(results) or not isinstance(failure, errors.PyMongoError):
            raise failure
        _log.debug("mongodb: the outcome of a write is unknown: %s", type(failure).__name__)
    return [None if isinstance(result, BaseException) else result for result in results]


async def _commit(session: AsyncClientSession) -> None:
    for attempt in range(_TRIES):
        try:
            return await session.commit_transaction()
        except errors.PyMongoError as error:
            # Committing again is safe: the server knows what it did with the transaction of that number.
            if not error.has_error_label("UnknownTransactionCommitResult") or attempt == _TRIES - 1:
                raise
    return None


def _is_refusal(failure: errors.PyMongoError) -> bool:
    """Tell whether an op of a transaction found another version than it expects."""
    return any(fault["code"] in _REFUSED and "ver" in fault["op"]["q"] for fault in _faults(failure))


def _is_passing(failure: errors.PyMongoError) -> bool:
    """Tell whether a transaction was surely not committed and may succeed when tried again."""
    raced = any(fault["code"] in _REFUSED for fault in _faults(failure))
    return (raced or failure.has_error_label("TransientTransactionError")) and not failure.timeout


def _faults(failure: errors.PyMongoError) -> list[_Document]:
    return failure.details["writeErrors"] if isinstance(failure, errors.BulkWriteError) else []


def _entry(partition: str, key: str, document: _Document) -> Entry:
    value, version = document.get("v"), document.get("ver")
    if not isinstance(value, bytes) or not isinstance(version, int):
        message = "mongodb: the document has no value or no version"
        raise CorruptRecordError(message, partition=partition, key=key)
    return Entry(key, value, int(version))

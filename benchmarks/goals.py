"""What is to be reached, by measure, engine and kind of reference."""

from __future__ import annotations

from harness import Goal

__all__ = ["EMBEDDED", "SERVERS", "goal"]

EMBEDDED = ("memory", "filesystem", "sqlite")
# "mysql" is with aiomysql, which the extra installs; the driver takes asyncmy where somebody installed it.
SERVERS = ("postgresql", "mysql", "mysql_asyncmy", "redis", "redis_cluster", "mongodb")

_GOALS = {
    ("append", "memory", "client"): Goal("value", 40e-6),
    ("append", "sqlite power", "client"): Goal("cost", 1.3),
    ("append", "sqlite power", "peer"): Goal("speed", 1.2),
    ("append, 64 tasks", "sqlite power", "client"): Goal("speed", 10),
    ("append, 64 tasks", "sqlite power", "peer"): Goal("speed", 20),
    ("append, 64 tasks", "filesystem process", "client"): Goal("speed", 10),
    ("append, 64 tasks", "filesystem power", "client"): Goal("speed", 2.5),
    ("last 50 of 10,000", "sqlite power", "peer"): Goal("speed", 1.5),
    ("idle session", "memory", "none"): Goal("value", 3_000),
    ("import persistence", "", "none"): Goal("value", 30e-3),
}

# Of the servers: get, append, three-key conditional at 64 tasks; conditional over unconditional.
_AT_64 = {
    "postgresql": (10, 10, 5, 2.0),
    "mongodb": (15, 10, 2.5, 2.5),
    "mysql": (6, 5, 3, 1.5),
    "mysql_asyncmy": (6, 5, 3, 1.5),
    "redis": (6, 6, 3, 1.5),
    "redis_cluster": (3, 3, 3, 1.5),
}

for _engine, (_get, _append, _conditional, _over_unconditional) in _AT_64.items():
    for _measure in ("get", "append", "scan of 100"):
        _GOALS[_measure, _engine, "client"] = Goal("cost", 1.3)
    _GOALS["get, 64 tasks", _engine, "client"] = Goal("speed", _get)
    _GOALS["append, 64 tasks", _engine, "client"] = Goal("speed", _append)
    _GOALS["3-key conditional, 64 tasks", _engine, "client"] = Goal("speed", _conditional)
    _GOALS["3-key conditional", _engine, "ours"] = Goal("cost", _over_unconditional)


def goal(measure: str, engine: str, kind: str) -> Goal | None:
    """Return the goal of a row. `kind`: "client", "peer", "ours" (ourselves, otherwise used) or "none"."""
    if measure == "append at 10,000":
        return Goal("cost", 1.2)
    return _GOALS.get((measure, engine, kind))

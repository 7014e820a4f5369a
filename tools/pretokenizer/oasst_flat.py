"""Reader of the published tables of Open-Assistant messages: one message per row, with its parent's id. The rows of a tree are
adjacent."""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_ft.errors import kind_of
from tools.pretokenizer.chunk import Chunk, Faulty
from tools.pretokenizer.lines import parse
from tools.pretokenizer.oasst import ANY_LANGUAGE

TREES = 50  # per chunk
FLAT = ("message_id", "parent_id", "role", "text")  # columns of such a table
_SPEAKERS = {"user": "prompter", "human": "prompter", "gpt": "assistant"}
_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def is_flat(record: dict[str, Any]) -> bool:
    """Return whether a record is a row of a table. A first message has no parent_id there, or null."""
    return "message_id" in record and "prompt" not in record


def trees(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Convert chunks of rows to chunks of trees in the format of the export. Faulty in place of a row that cannot be read, of a tree whose
    rows are not adjacent, and of one that lacks a parent."""
    rows: list[dict[str, Any]] = []
    done: set[Any] = set()
    found: list[dict[str, Any] | Faulty] = []
    count, name, current = 0, "", None
    for chunk in chunks:
        name, bad = chunk.name, list[str]()
        for where, row in parse(chunk, bad):
            found += _taken(bad)
            if problem := _no_name(row):
                bad.append(f"{where}: {problem}; correct the row")
                continue
            if (tree := _tree_of(row, current)) != current:
                if rows:
                    found.append(_tree(rows, name))
                rows, current = [], tree
                if tree in done:
                    bad.append(f"{where}: tree {tree} began earlier in the file; sort the rows by message_tree_id")
                    continue
                done.add(tree)
                if len(found) >= TREES:
                    yield Chunk(name, "tree", count + 1, None, found)
                    count, found = count + len(found), []
            rows.append(_typed(row))
        found += _taken(bad)
    if rows:
        found.append(_tree(rows, name))
    if found:
        yield Chunk(name, "tree", count + 1, None, found)


def _tree_of(row: dict[str, Any], current: Any) -> Any:
    """Return the name of a row's tree: without one, the tree is that of the row before, unless the row has no parent."""
    own = row.get("message_id") if row.get("parent_id") in (None, "") else current
    return row.get("message_tree_id") or own or row.get("message_id")


def _taken(bad: list[str]) -> list[Faulty]:
    """Return the messages and empty the list."""
    taken = list(map(Faulty, bad))
    bad.clear()
    return taken


def _no_name(row: dict[str, Any]) -> str | None:
    keys = ("message_tree_id", "message_id", "parent_id")
    return next(
        (f"{key} is {kind_of(row[key])}, not a name" for key in keys if isinstance(row.get(key), list | dict)), None
    )


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose rank is a number and whose switches are true or false, which in CSV are words. A value that is neither stays, and
    is refused where it is read."""
    result = dict(row)
    if isinstance(row.get("rank"), str | float):
        with contextlib.suppress(ValueError):
            rank = float(row["rank"])  # pandas writes 1.0 in columns with empty cells
            result["rank"] = int(rank) if rank.is_integer() else row["rank"]
    for key in ("deleted", "synthetic", "review_result"):
        if isinstance(value := row.get(key), str):
            result[key] = _SWITCHES.get(value.lower(), value)
    if row.get("role") in _SPEAKERS:
        result["role"] = _SPEAKERS[row["role"]]
    return result


def _tree(rows: list[dict[str, Any]], name: str) -> dict[str, Any] | Faulty:
    messages = {row["message_id"]: {**row, "replies": []} for row in rows if row.get("message_id")}
    roots = []
    for message in messages.values():
        parent = message.get("parent_id")
        if parent in (None, ""):
            roots.append(message)
        elif parent in messages:
            messages[parent]["replies"].append(message)
        else:
            return Faulty(
                f"{name}: message {message['message_id']} answers {parent}, which is not in its tree; "
                "complete the tree, or put its rows together"
            )
    if len(roots) != 1:
        tree = rows[0].get("message_tree_id") or rows[0].get("message_id")
        return Faulty(
            f"{name}: tree {tree} has {len(roots)} messages without a parent, expected one; correct parent_id"
        )
    root = roots[0]
    unsaid = {"review_result": True, "lang": ANY_LANGUAGE}  # where a table has no such column
    root |= {key: value for key, value in unsaid.items() if not any(key in row for row in rows)}
    state = root.get("tree_state", "ready_for_export")  # published tables contain only finished trees
    return {"message_tree_id": root["message_id"], "tree_state": state, "prompt": root}

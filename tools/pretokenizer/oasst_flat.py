"""Reader of the published tables of Open-Assistant messages: one message per row, with its parent's id. The rows of a tree are
adjacent."""

from collections.abc import Iterator
from typing import Any

from megatron_ft.errors import DataError
from tools.pretokenizer.lines import Chunk, parse

TREES = 50  # per chunk


def is_flat(record: dict[str, Any]) -> bool:
    return "message_id" in record and "parent_id" in record and "prompt" not in record


def trees(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Convert chunks of rows to chunks of trees in the format of the export. Raise DataError if the rows of a tree are not adjacent,
    or a parent is missing."""
    rows: list[dict[str, Any]] = []
    done: set[Any] = set()
    found: list[dict[str, Any]] = []
    count, name, current = 0, "", None
    for chunk in chunks:
        name = chunk.name
        for where, row in parse(chunk):
            for key in ("message_tree_id", "message_id", "parent_id"):
                if isinstance(row.get(key), list | dict):
                    raise DataError(f"{where}: {key} is no name but a {type(row[key]).__name__}; correct the row")
            if (tree := row.get("message_tree_id") or row.get("message_id")) != current:
                if rows:
                    found.append(_tree(rows, name))
                if tree in done:
                    raise DataError(f"{where}: tree {tree} began earlier in the file; sort the rows by message_tree_id")
                done.add(tree)
                rows, current = [], tree
                if len(found) == TREES:
                    yield Chunk(name, "tree", count + 1, None, found)
                    count, found = count + len(found), []
            rows.append(row)
    if rows:
        found.append(_tree(rows, name))
    if found:
        yield Chunk(name, "tree", count + 1, None, found)


def _tree(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    messages = {row["message_id"]: {**row, "replies": []} for row in rows if row.get("message_id")}
    roots = []
    for message in messages.values():
        parent = message.get("parent_id")
        if parent is None:
            roots.append(message)
        elif parent in messages:
            messages[parent]["replies"].append(message)
        else:
            raise DataError(f"{name}: message {message['message_id']} answers {parent}, which is not in its tree")
    if len(roots) != 1:
        raise DataError(f"{name}: tree {rows[0].get('message_tree_id')} has {len(roots)} first messages, expected one")
    root = roots[0]
    state = root.get("tree_state", "ready_for_export")  # published tables contain only finished trees
    return {"message_tree_id": root["message_id"], "tree_state": state, "prompt": root}

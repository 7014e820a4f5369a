"""The formats of chat data, one Reader each: from a record of a file to conversations.

A new format is a function and a row in READERS. lines.py reads the files.
"""

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.hints import alternatives, meant
from megatron_ft.errors import ConfigError, DataError
from tools.pretokenizer import custom, messages, named, pairs
from tools.pretokenizer.dolphin_mix import MixOptions
from tools.pretokenizer.fields import Conversation, get_text, is_row, keep
from tools.pretokenizer.filled import JOINED, FillOptions
from tools.pretokenizer.lines import chunks, parse
from tools.pretokenizer.oasst import OasstOptions, conversations
from tools.pretokenizer.oasst_flat import FLAT
from tools.pretokenizer.places import files_of
from tools.pretokenizer.unread import ALL, LANGUAGE, Reads, chat_reads, pair_reads

FIRST = 10_000  # records at a file's start among which its format is looked for


@dataclass(frozen=True)
class NoOptions:
    """The options of a reader without keys of its own."""


@dataclass(frozen=True)
class Reader:
    """One format. convert: (record, where, options, left_out) -> conversations, which stay on one side of the train/val split.

    keys: a record with all these keys has this format; empty for a format that must be named. options: a dataclass of the reader's
    own configuration keys. repositories: names of published datasets. marked: default share of the samples whose text is marked for
    language-modelling loss. data_files: the file of the repository that is read, if it is there. splits: that are read. val_rounding:
    default of this key. reads: the keys it knows (unread.py), or a function of the options that returns them.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[dict[str, Any], str, Any, Counter[str]], list[Conversation]]
    options: type = NoOptions
    repositories: tuple[str, ...] = ()
    marked: float = 0.0
    data_files: str | None = None
    splits: str = "train"
    val_rounding: str = "down"
    reads: Reads | Callable[[Any], Reads] = field(default_factory=dict)

    def known(self, options: Any) -> Reads:
        return self.reads(options) if callable(self.reads) else self.reads


def recognise(path: Path, skip_bad: bool = False) -> Reader:
    """Return the reader for a file or a folder, from its first record. Raise DataError with the nearest known shapes.

    skip_bad: pass over records at the start that are faulty or have no known shape.
    """
    first, problem = files_of(path)[0], ""
    bad: list[str] | None = [] if skip_bad else None
    for where, record, columns in itertools.islice(_first_records(first, bad), FIRST):
        if reader := _of_shape(columns or record):
            return reader
        problem = problem or _unknown(where, columns or record)
        if not skip_bad:
            break
    if problem or bad:
        raise DataError(problem or (bad or [""])[0])
    raise DataError(f"{first}: contains no chats; write one JSON object per line")


def _first_records(path: Path, bad: list[str] | None) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield records with their places, and the columns of a table with a value of each: a row has no key where it has no value."""
    for chunk in chunks(path):
        rows = chunk.rows if chunk.unit == "row" and chunk.rows else []
        columns = {key: value for row in reversed(rows) if isinstance(row, dict) for key, value in row.items()}
        yield from ((where, record, columns) for where, record in parse(chunk, bad))


def _of_shape(record: dict[str, Any]) -> Reader | None:
    if all(key in record for key in FLAT):
        return READERS["oasst_export"]
    return next((r for r in READERS.values() if r.keys and all(key in record for key in r.keys)), None)


def _unknown(where: str, record: dict[str, Any]) -> str:
    """Return the message about a record of no known shape."""
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and _of_shape(value[0]):
            return f"{where}: the chats are in a list under '{key}'; write one chat per line: jq -c '.{key}[]' FILE"
    shapes = "; ".join(f"{reader.name}: {', '.join(reader.keys)}" for reader in _nearest(record))
    keys = ", ".join(itertools.islice(record, 12)) or "(none)"
    return (
        f"{where}: no known format has the keys {keys}; the nearest are {shapes}; rename the keys, or say what they mean: "
        "--keys question=KEY answer=KEY, or --keys messages=KEY"
    )


def _nearest(record: dict[str, Any]) -> list[Reader]:
    """Return the three readers that have most keys in common with a record; of equal ones those with the most similar names."""

    def likeness(reader: Reader) -> tuple[float, float]:
        common = sum(key in record for key in reader.keys) / len(reader.keys)
        known = sum(key in record for key in reader.known(reader.options()))
        similar = sum(bool(difflib.get_close_matches(key, record, 1, 0.7)) for key in reader.keys)
        return common + similar / len(reader.keys), known

    shaped = sorted((r for r in READERS.values() if r.keys), key=lambda reader: reader.options is OasstOptions)
    return sorted(shaped, key=likeness, reverse=True)[:3]


def get_reader(name: str) -> Reader:
    """Return a reader by its name in configurations. Raise ConfigError for an unknown name."""
    if (known := meant(name, READERS, beginnings=False)) is None:
        raise ConfigError(f"unknown dataset '{name}': choose one of {', '.join(READERS)}{alternatives(name, READERS)}")
    return READERS[known]


def _chat(key: str) -> pairs.Convert:
    """Return the reader of {KEY: [{"role", "content"} or {"from", "value"}], "system", "tools"}."""

    def convert(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
        return keep(messages.chat(record, key, where), left_out)

    return convert


def _text(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """Read {"text"}, or a whole .txt file: one document without a chat format."""
    text = "" if is_row(where) and record.get("text") is None else get_text(record, "text", where)
    return keep([{"role": "text", "content": text}] if text else [], left_out)


def _instruction(name: str) -> Reader:
    """Return the reader of a published dataset of questions and answers."""
    columns = named.INSTRUCTIONS[name]
    keys_of = (columns.question, columns.answer)
    keys = keys_of if name in ("megacode2", "oa_leet10k") else ()
    return Reader(
        *(name, keys, named.instruction(name), FillOptions),
        repositories=(columns.repository,),
        data_files=columns.data_files,
        val_rounding="up",
        reads=lambda options: _columns(*keys_of, *([JOINED] if options.fill_min_length is not None else [])),
    )


def _table(readers: Iterable[Reader]) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers}


def _columns(*keys: str) -> Reads:
    return dict.fromkeys(keys, ALL)


_ORCA: Reads = {"instruction": ALL, "conversation": _columns("input", "output")}
_TREE_MESSAGE: dict[str, Any] = dict.fromkeys(
    *(
        (
            "text",
            "role",
            "rank",
            "lang",
            "review_result",
            "deleted",
            "synthetic",
            "message_id",
            "parent_id",
            "message_tree_id",
        ),
        ALL,
    )
)
_TREE_MESSAGE["replies"] = _TREE_MESSAGE
_TREE: Reads = {"message_tree_id": ALL, "tree_state": ALL, "prompt": _TREE_MESSAGE}


def _pair(name: str, *, repositories: tuple[str, ...] = ()) -> Reader:
    shape = pairs.SHAPES[name]
    keys = (shape.question[0], shape.answer)
    return Reader(name, keys, pairs.reader(shape), repositories=repositories, reads=pair_reads(shape))


# In the order of recognition, for files whose format is not given.
READERS = _table(
    [
        Reader(
            *("oasst_export", ("message_tree_id", "prompt"), conversations, OasstOptions),
            repositories=("OpenAssistant/oasst1",),
            splits="train,validation",
            reads=_TREE,
        ),
        Reader("messages", ("messages",), _chat("messages"), reads=chat_reads("messages")),
        Reader("sharegpt", ("conversations",), _chat("conversations"), reads=chat_reads("conversations")),
        Reader(
            *("orca-chat", ("instruction", "conversation"), named.orca_chat),
            repositories=("shahules786/orca-chat",),
            data_files="orca-chat-gpt4.json",
            val_rounding="up",
            reads=_ORCA,
        ),
        Reader("conversation", ("conversation",), _chat("conversation"), reads=chat_reads("conversation")),
        Reader(
            *("seed_tasks", ("instruction", "instances"), pairs.self_instruct),
            reads={**pair_reads(pairs.ALPACA), "instances": pair_reads(pairs.ALPACA)},
        ),
        Reader(
            *("dolly15k_multilingual", ("instruction", "context", "response"), named.dolly15k, named.DollyOptions),
            repositories=("argilla/databricks-dolly-15k-curated-multilingual",),
            val_rounding="up",
            reads={**_columns("instruction", "context", "response"), **LANGUAGE},
        ),
        _pair("alpaca"),
        _pair("gpteacher", repositories=("teknium/GPTeacher-General-Instruct", "jondurbin/airoboros-gpt4-1.4.1")),
        _pair("prompt_completion"),
        *map(_instruction, named.INSTRUCTIONS),
        Reader(
            *("dolly15k", (), named.dolly15k_english, named.DollyOptions),
            repositories=("OllieStanley/oa_dolly_15k",),
            val_rounding="up",
            reads={**_columns("INSTRUCTION", "RESPONSE"), "METADATA": _columns("CONTEXT")},
        ),
        Reader(  # alpaca's keys with another meaning
            *("dolphin", (), named.dolphin),
            repositories=("ehartford/dolphin",),
            reads=_columns("instruction", "input", "output"),
        ),
        Reader(
            *("dolphin-mix", (), named.orca_chat, MixOptions),  # of conversations that dolphin_mix.py makes
            repositories=("ehartford/dolphin",),
            data_files="flan5m-alpaca-uncensored.jsonl",
            val_rounding="up",
            reads=_ORCA,
        ),
        Reader(
            *("alpaca_gpt4", (), named.alpaca_gpt4),
            repositories=("teknium/GPT4-LLM-Cleaned",),
            val_rounding="up",
            reads=_columns("instruction", "input", "output"),
        ),
        _pair("critiques"),
        _pair("question_answer"),
        _pair("question_response", repositories=("Open-Orca/OpenOrca",)),
        _pair("query_response"),
        _pair("sled", repositories=("tau/sled",)),
        Reader("text", ("text",), _text, marked=1.0, reads={"text": ALL}),
        Reader("custom", (), custom.convert, custom.KeysOptions, reads=custom.reads),
    ]
)

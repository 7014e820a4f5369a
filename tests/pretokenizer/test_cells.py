"""Empty cells and cells of other kinds: a table gives the chats of the same records as JSON lines."""

import csv
import json
from collections import Counter

import pytest

from megatron_ft.errors import DataError
from tools.pretokenizer.lines import parse, records
from tools.pretokenizer.readers import READERS, recognise
from tools.pretokenizer.settings import Settings
from tools.pretokenizer.sources import make_sources

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a, b"}]
TREE = [
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q", "lang": "en", "review_result": True},
    {
        "message_id": "2",
        "parent_id": "1",
        "role": "assistant",
        "text": "best",
        "rank": 0,
        "deleted": False,
        "synthetic": False,
    },
    {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "gone", "rank": 1, "deleted": True},
    {"message_id": "4", "parent_id": "1", "role": "assistant", "text": "second", "rank": 2, "synthetic": False},
    {"message_id": "5", "parent_id": "2", "role": "prompter", "text": "and?"},
    {"message_id": "6", "parent_id": "5", "role": "assistant", "text": "so"},
    {"message_id": "7", "parent_id": None, "role": "prompter", "text": "Frage", "lang": "de", "review_result": True},
    {"message_id": "8", "parent_id": "7", "role": "assistant", "text": "Antwort", "rank": 0},
]


def write(path, rows):
    """Write a table as a program does that has no word for a missing value."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in row.items()}
            )
    return path


def read(path, **keys):
    name = recognise(path).name
    (source,) = make_sources(Settings([(name, {"input_file_path": path, **keys})]))
    left_out, found = Counter(), []
    for chunk in source.chunks():
        for where, record in parse(chunk):
            found += source.reader.convert(record, where, source.job.options, left_out)
    return name, found, left_out


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("tree_id", [True, False])
@pytest.mark.parametrize("keys", [{}, {"top_k": 1}, {"lang": "de"}], ids=str)
def test_a_table_of_messages(tmp_path, kind, tree_id, keys):
    rows = [{**row, **({"message_tree_id": "1" if i < 6 else "7"} if tree_id else {})} for i, row in enumerate(TREE)]
    table = read(write(tmp_path / f"x.{kind}", rows), **keys)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert table == read(tmp_path / "x.jsonl", **keys)
    texts = [[turn["content"] for turn in chat] for chat in table[1]]
    whole = [["q", "best", "and?", "so"], ["q", "second"]]
    assert texts == {"{}": whole, "{'top_k': 1}": whole[:1], "{'lang': 'de'}": [["Frage", "Antwort"]]}[str(keys)]


def test_a_table_with_four_columns_and_common_names_of_roles(tmp_path):
    names = {"prompter": "user", "assistant": "assistant"}
    rows = [
        {key: row[key] for key in ("message_id", "parent_id", "text")} | {"role": names[row["role"]]} for row in TREE
    ]
    _, found, left_out = read(write(tmp_path / "x.csv", rows))
    assert [len(chat) for chat in found] == [4, 2, 2, 2] and not left_out
    assert found[0][0]["role"] == "prompter"


def test_what_is_wrong_with_a_tree_is_said(tmp_path):
    rows = [{**TREE[0]}, {**TREE[1], "parent_id": "9"}]
    with pytest.raises(
        DataError,
        match=r"x.csv: message 2 answers 9, which is not in its tree; complete the tree, or put its rows together",
    ):
        read(write(tmp_path / "x.csv", rows))
    with pytest.raises(DataError, match=r"rank 'high' is not a number"):
        read(write(tmp_path / "x.csv", [TREE[0], {**TREE[1], "rank": "high"}]))


ROWS = {
    "alpaca": [
        {"instruction": "q", "output": "a", "input": ""},
        {"instruction": "q", "output": "a", "input": "x", "system": "s"},
    ],
    "dolly15k_multilingual": [
        {"instruction": "q", "context": "", "response": "a"},
        {"instruction": "q", "context": "c", "response": "a"},
    ],
    "messages": [{"messages": CHAT, "tools": ""}, {"messages": CHAT, "tools": [{"name": "f"}]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": ""}],
    "prompt_completion": [
        {"prompt": CHAT[:1], "completion": CHAT[1:], "history": ""},
        {"prompt": "q", "completion": "[{}]"},
    ],
    "query_response": [
        {"query": "q", "response": "a", "history": [["x", "y"]]},
        {"query": "q", "response": "a", "history": ""},
    ],
    "orca-chat": [{"instruction": one, "conversation": [{"input": "q", "output": "a"}]} for one in ("", "s")],
    "megacode2": [{"USER": "q", "ASSISTANT": ""}, {"USER": "q", "ASSISTANT": "a"}],
    "text": [{"text": "", "id": "1"}, {"text": "x", "id": "2"}],
    "seed_tasks": [{"instruction": "q", "instances": [{"input": "", "output": "a"}]}],
}


@pytest.mark.parametrize("name", ROWS)
def test_empty_cells_are_absent_and_lists_are_lists(tmp_path, name):
    rows = ROWS[name]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(write(tmp_path / "x.csv", rows))
    assert found == read(tmp_path / "x.jsonl")
    assert found[0] == name and found[1]


def test_metadata_that_is_an_object_as_text():
    record = {"INSTRUCTION": "q", "RESPONSE": "a", "METADATA": json.dumps({"CONTEXT": "c"})}
    reader = READERS["dolly15k"]
    (chat,) = reader.convert(record, "x", reader.options(), Counter())
    assert [turn["content"] for turn in chat] == ["q", "c", "a"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_format_is_known_from_all_columns(tmp_path, kind):
    rows = [{"question": "q"}, {"question": "q", "answer": "a"}]
    path = write(tmp_path / f"x.{kind}", [{"question": "q", "answer": None}, rows[1]])
    assert recognise(path).name == "question_answer"
    first, second = records(path)
    assert second[1] == rows[1]
    convert, options = READERS["question_answer"].convert, READERS["question_answer"].options()
    with pytest.raises(DataError, match=r"row \d: the key 'answer' has no value in this row"):
        convert(first[1], first[0], options, Counter())


def test_a_list_in_python_s_notation_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("messages\n\"[{'role': 'user', 'content': 'q'}]\"\n")
    with pytest.raises(
        DataError, match=r"row 2: 'messages' is text, not a list; write it as a list, or as the JSON of one"
    ):
        read(tmp_path / "x.csv")

"""What a record says besides its texts is honoured or listed, and a table says what the JSON lines say that it was made of."""

import json
from collections import Counter

import numpy as np
import pytest

from megatron_ft.data.roles import ASSISTANT, MARKED, ROLE_BITS, all_weights
from megatron_ft.data.shards import open_shards
from megatron_ft.errors import DataError
from tests.pretokenizer.fixtures import lines
from tests.pretokenizer.test_pretokenize import configure, place, pretokenize, shortcut  # noqa: F401 - a fixture
from tools.pretokenizer.lines import records
from tools.pretokenizer.readers import READERS, recognise
from tools.pretokenizer.unread import Unread

FRENCH = {"system": "ANSWER IN FRENCH"}
PAIR = [("user", "q"), ("assistant", "a")]
SYSTEM = [("system", "ANSWER IN FRENCH")]
PAST = [("user", "q0"), ("assistant", "a0")]
LISTS = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
CHATS = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
SHAPES = [
    ("sharegpt", {**FRENCH, **CHATS}, SYSTEM + PAIR),
    ("sharegpt", {"conversations": MESSAGES["messages"]}, PAIR),
    ("messages", {"messages": CHATS["conversations"]}, PAIR),
    ("messages", {"system_prompt": "ANSWER IN FRENCH", **MESSAGES}, SYSTEM + PAIR),
    ("conversation", {"conversation": MESSAGES["messages"]}, PAIR),
    ("alpaca", {**FRENCH, "history": [["q0", "a0"]], "instruction": "q", "input": "", "output": "a"}, SYSTEM + PAST + PAIR),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), ("assistant", "a")]),
    ("alpaca", {"history": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}],
                "instruction": "q", "output": "a"}, PAST + PAIR),
    ("gpteacher", {"instruction": "q", "input": "x", "response": "a"}, [("user", "q\n\nx"), ("assistant", "a")]),
    ("gpteacher", {"instruction": "q", "response": "a", **FRENCH, "category": "c"}, SYSTEM + PAIR),
    ("sled", {"id": "1", "pid": "1_0", "input": "q", "output": "a"}, PAIR),
    ("sled", {"id": "1", "pid": "1_0", "input_prefix": "p", "input": "q", "output": "a"}, [("user", "p\n\nq"), ("assistant", "a")]),
    ("critiques", {"prompt": "q", "response": "a"}, PAIR),
    ("question_answer", {"question": "q", "answer": "a"}, PAIR),
    ("question_answer", {"question": "q", "answer": "a", "context": "c"}, [("context", "c"), *PAIR]),
    ("question_response", {"id": "niv.1", "system_prompt": "ANSWER IN FRENCH", "question": "q", "response": "a"}, SYSTEM + PAIR),
    ("query_response", {"query": "q", "response": "a", "history": [["q0", "a0"]]}, PAST + PAIR),
    ("prompt_completion", LISTS, PAIR),
    ("prompt_completion", {**LISTS, "completion": "a"}, PAIR),
    ("seed_tasks", {"id": "seed_task_0", "instruction": "q", "instances": [{"input": "", "output": "a"}]}, PAIR),
]  # fmt: skip


def convert(name, record, **options):
    reader = READERS[name]
    return reader.convert(record, "here", reader.options(**options), Counter())


def said(chat):
    return [(turn["role"], turn["content"]) for turn in chat]


def not_read(name, record, **options):
    unread = Unread(READERS[name].known(READERS[name].options(**options)))
    unread.add(record)
    return dict(unread.counted)


@pytest.mark.parametrize(("name", "record", "turns"), SHAPES)
def test_shapes_in_use(tmp_path, name, record, turns):
    (tmp_path / "x.jsonl").write_bytes(lines([record]))
    assert recognise(tmp_path / "x.jsonl").name == name
    (chat,) = convert(name, record)
    assert said(chat) == turns
    assert not_read(name, record).keys() <= {"id", "pid", "category"}


def test_every_reader_says_what_it_reads():
    assert [name for name, reader in READERS.items() if not reader.reads] == []


def test_a_task_is_a_chat_for_each_instance():
    task = {"instruction": "add", "instances": [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]}
    first, second = convert("seed_tasks", task)
    assert said(first) == [("user", "add\n\n1"), ("assistant", "2")]
    assert said(second) == [("user", "add\n\n3"), ("assistant", "4")]


@pytest.mark.parametrize(
    ("more", "weight"),
    [
        ({"loss": False}, 0), ({"train": False}, 0), ({"weight": 0}, 0), ({"loss": True}, 1), ({"train": True}, 1),
        ({"loss": None}, 1), ({}, 1), ({"loss": False, "weight": 0.5}, 0), ({"train": True, "weight": 0.5}, 0.5), ({"loss": 0}, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("style", ["openai", "sharegpt"])
def test_what_a_message_counts(more, weight, style):
    answer = {"role": "assistant", "content": "a"} if style == "openai" else {"from": "gpt", "value": "a"}
    (chat,) = convert("messages", {"messages": [{**answer, **more}]})
    assert chat[0].get("weight", 1) == weight


def test_a_prompt_of_messages_is_not_trained_on():
    """As TRL: of prompt and completion, only the completion."""
    few = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "one"}, *LISTS["prompt"]]
    (chat,) = convert("prompt_completion", {**LISTS, "prompt": few})
    assert [turn.get("weight", 1) for turn in chat] == [1, 0, 1, 1]


def test_reasoning_stands_before_the_text():
    for key in ("reasoning_content", "reasoning", "thinking"):
        record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, key: "r"}]}
        assert convert("messages", record)[0][1] == {"role": "assistant", "content": "", "reasoning_content": "r"}
    (chat,) = convert("question_answer", {"question": "q", "answer": "a", "reasoning_content": "r"})
    assert chat[-1]["reasoning_content"] == "r"


def test_contexts_with_what_is_known_of_them():
    """Airoboros' blocks: lines of key and value between two marks, then the text."""
    context = [
        {"date": "2021-01-01", "url": "https://web.site/123", "text": "Blueberries are green."},
        "Plums are purple.",
    ]
    record = {"messages": [{"role": "user", "content": "q", "context": context}, {"role": "assistant", "content": "a"}]}
    first = "BEGINCONTEXT\ndate: 2021-01-01\nurl: https://web.site/123\nENDCONTEXT\nBlueberries are green."
    assert said(convert("messages", record)[0]) == [("context", first), ("context", "Plums are purple."), *PAIR]


def test_keys_that_were_not_read_are_counted():
    call = {
        "index": 0,
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": {"any": {"thing": 1}}, "strict": True},
    }
    record = {
        "id": 7, "source": None,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {}}], "mood": "calm"},
            {"role": "assistant", "content": "", "tool_calls": [call], "refusal": None},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }  # fmt: skip
    expected = ("id", "messages.mood", "messages.content.cache_control", "messages.tool_calls.index")
    assert not_read("messages", record) == {key: 1 for key in (*expected, "messages.tool_calls.function.strict")}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**FRENCH, "messages": [{"role": "system", "content": "other"}]}, "different system messages"),
        ({"messages": [{"role": "assistant", "content": "a", "loss": "no"}]}, "'loss' is text; give true or false"),
        ({"messages": [{"role": "assistant", "content": "a", "name": 3}]}, "'name' is a number"),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": ["x"]}]},
            "'reasoning_content' is a list",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning": "x", "thinking": "y"}]},
            "different reasonings",
        ),
        ({"messages": [{"role": "user", "content": "a", "reasoning_content": "x"}]}, "reasoning by the user"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]}, "only the assistant can"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "arguments of a tool call are a list",
        ),
        ({"messages": [{"role": "user", "content": "a", "context": {"url": "x"}}]}, "without a text"),
        ({**MESSAGES, "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "both 'tools' and 'functions'"),
        ({"messages": [{"role": "user", "content": "a", "value": "b"}]}, "different things in 'content' and 'value'"),
        ({"messages": [{"role": "user", "from": "gpt", "content": "a"}]}, "different things in 'role' and 'from'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}]},
            "both 'tool_calls' and 'function_call'",
        ),
        ({**MESSAGES, "documents": ["d"]}, "'documents' is not a list of objects"),
        ({"messages": [None]}, "a message is null, not an object"),
        ({"messages": [{"role": "user", "content": [None]}]}, "a part that is null"),
    ],
)
def test_what_cannot_be_meant_is_refused(record, problem):
    with pytest.raises(DataError, match=f"here: .*{problem}") as caught:
        convert("messages", record)
    assert "NoneType" not in str(caught.value)


@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_a_side_without_messages(key):
    with pytest.raises(DataError, match=f"'{key}' is a list without messages"):
        convert("prompt_completion", {**LISTS, key: []})


def test_a_null_beside_the_other_name_of_a_key_says_nothing():
    turns = [
        {"from": "human", "role": None, "value": "q", "content": None},
        {"from": "gpt", "role": "assistant", "value": "a", "content": "a", "tool_calls": [], "name": None},
    ]
    assert said(convert("sharegpt", {"conversations": turns, "documents": None})[0]) == PAIR


def test_a_call_in_json_text_that_says_more_stays_text():
    for text in ('{"name": "f", "arguments": {}, "thought": "x"}', '{"name": "f", "arguments": {"a": 1, "a": 2}}'):
        record = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}]}
        assert convert("sharegpt", record)[0][1] == {"role": "assistant", "content": text}


LONG = 123456789012345678901234567890


def test_a_long_integer_in_a_call_stays_what_it_is(tmp_path):
    call = {"function": {"name": "f", "arguments": {"id": LONG}}}
    (tmp_path / "x.jsonl").write_bytes(
        lines([{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}])
    )
    ((_, record),) = records(tmp_path / "x.jsonl")
    assert record["messages"][0]["tool_calls"] == [call]


def test_a_null_in_json_lines_stays():
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    (chat,) = convert("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert chat[0]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_the_three_nearest_shapes(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines([{"question": "x", "answers": "y"}]))
    with pytest.raises(DataError) as caught:
        recognise(tmp_path / "x.jsonl")
    nearest = str(caught.value).split("the nearest are ")[1].split("; rename")[0].split("; ")
    assert len(nearest) == 3 and nearest[0] == "question_answer: question, answer"


def test_chats_inside_something_else_are_found(tmp_path):
    (tmp_path / "x.json").write_bytes(lines([{"version": 1, "data": [MESSAGES]}]))
    with pytest.raises(DataError, match=r"line 1: the chats are in a list under 'data'; .*jq -c '\.data\[\]' FILE"):
        recognise(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(MESSAGES, indent=1))
    with pytest.raises(DataError, match=r"line 1: an object over several lines; .*jq -c"):
        recognise(tmp_path / "x.json")


BLOCKS = (
    "BEGININPUT\nBEGINCONTEXT\ndate: 2021-01-01\nurl: https://web.site/123\nENDCONTEXT\nBlueberries are now green.\nENDINPUT\n"
    "BEGININPUT\nBEGINCONTEXT\nurl: https://web.site/5\nENDCONTEXT\nPlums stay purple.\nENDINPUT\n"
    "BEGININSTRUCTION\nWhat colour are blueberries? Source?\nENDINSTRUCTION"
)


def test_airoboros_blocks_by_the_text_or_by_the_parts_are_the_same(place):  # noqa: F811
    """The published text of a prompt with two inputs, and the same from contexts with what is known of them."""
    contexts = [
        {"date": "2021-01-01", "url": "https://web.site/123", "text": "Blueberries are now green."},
        {"url": "https://web.site/5", "text": "Plums stay purple."},
    ]
    question = {"role": "user", "content": "What colour are blueberries? Source?", "context": contexts}
    (place / "parts.jsonl").write_bytes(lines([{"messages": [question, {"role": "assistant", "content": "Green."}]}]))
    (place / "text.jsonl").write_bytes(lines([{"category": "contextual", "instruction": BLOCKS, "response": "Green."}]))
    found = []
    for name in ("parts", "text"):
        flags = ("--chat_format", "vicuna", "--val_split", 0, "--write_json", "--output_prefix", f"out/{name}")
        assert shortcut(*flags, source=f"{name}.jsonl") == 0
        found.append(open_shards(f"out/{name}-train").tokens(0).tolist())
    assert found[0] == found[1]
    text = json.loads((place / "out/text-train.jsonl").read_text())["text"]
    assert f" USER: {BLOCKS} ASSISTANT: Green.</s>" in text


@pytest.mark.parametrize(
    ("record", "keys", "turns"),
    [
        ({"p": "q", "c": "a", "s": "ANSWER IN FRENCH"}, "question=p answer=c system=s", SYSTEM + PAIR),
        (
            {"p": "q", "c": "a", "d": "x"},
            ["question=p", "input=d", "answer=c"],
            [("user", "q\n\nx"), ("assistant", "a")],
        ),
        (
            {"talk": [{"who": "human", "what": "q"}, {"who": "gpt", "what": "a"}]},
            {"messages": "talk", "role": "who", "content": "what"},
            PAIR,
        ),
        ({"body": "a"}, "text=body", [("text", "a")]),
    ],
)
def test_own_keys(record, keys, turns):
    assert said(convert("custom", record, keys=keys)[0]) == turns
    assert not_read("custom", {**record, "id": 1}, keys=keys) == {"id": 1}


def test_own_keys_on_the_command_line(place, capsys):  # noqa: F811
    (place / "x.jsonl").write_bytes(lines([{"p": f"q{i}", "c": "a", "id": i} for i in range(5)]))
    assert shortcut("--keys", "question=p", "answer=c", "--val_split", 0, source="x.jsonl") == 0
    assert "keys of x.jsonl that were not read: id (5)" in capsys.readouterr().out
    for wrong, problem in (
        ("questoin=p", "did you mean question"),
        ("question=p question=q answer=a", "question=... is given twice"),
        ("question=p", "answer is not"),
        ("p", "write MEANING=KEY"),
    ):
        assert shortcut("--keys", wrong, "--output_prefix", "out/other", source="x.jsonl") == 2
        assert problem in capsys.readouterr().err
    assert shortcut("--keys", "question=nix", "answer=c", "--output_prefix", "out/other", source="x.jsonl") == 2
    assert "line 1: the key 'nix' is missing" in capsys.readouterr().err


def test_weights_and_marks_reach_the_shards(place, capsys):  # noqa: F811
    turns = [("human", None), ("gpt", False), ("human", True), ("gpt", True)]
    chat = {
        "conversations": [{"from": who, "value": f"text {i}", "train": train} for i, (who, train) in enumerate(turns)]
    }
    (place / "x.jsonl").write_bytes(lines([chat] * 2))
    assert shortcut("--val_split", 0, source="x.jsonl") == 0
    shards = open_shards("out/mine-train", verify=True)
    role_bytes = shards.role_bytes(0)
    by_role_byte = shards.loss_weights(np.array([0, 0, 1, 0], "f4"))[role_bytes]
    starts = [i for i in range(len(role_bytes)) if not i or role_bytes[i] != role_bytes[i - 1]]
    assert [float(by_role_byte[i]) for i in starts] == [0, 0, 1, 1]
    assert role_bytes[starts[2]] & MARKED and role_bytes[starts[1]] & ROLE_BITS == ASSISTANT
    out = capsys.readouterr().out
    assert "«assistant text 1»" not in out and "«assistant text 3»" in out and "«user text 2»" in out


def test_two_datasets_of_one_kind_have_names_of_their_own(place):  # noqa: F811
    (place / "more").mkdir()
    for name in ("chats.jsonl", "critiques.jsonl", "more/chats.jsonl"):
        (place / name).write_bytes(lines([MESSAGES] * 3))
    flags = ("--tokenizer", "tokenizer.model", "--output_prefix", "out/mine", "--val_split", 0)
    assert pretokenize("--input", "chats.jsonl", "critiques.jsonl", "more/chats.jsonl", *flags) == 0
    names = [source["name"] for source in open_shards("out/mine-train").manifest.sources]
    assert names == [f"messages:{place.name}/chats", "messages:critiques", "messages:more/chats"]
    assert json.loads((place / "out/mine-train_stats.json").read_text())["datasets"][0]["name"] == "messages"


def test_chats_that_differ_in_their_reasoning_are_no_duplicates(place):  # noqa: F811
    question, answer = MESSAGES["messages"]
    chats = [{"messages": [question, {**answer, "reasoning_content": reasoning}]} for reasoning in ("r", "s", "r")]
    (place / "x.jsonl").write_bytes(lines(chats))
    assert shortcut("--val_split", 0, "--duplicates", "exact", source="x.jsonl") == 0
    assert len(open_shards("out/mine-train")) == 2


def test_turns_that_count_differently_are_not_joined():
    from tools.pretokenizer.selection import in_order

    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0.0},
        {"role": "assistant", "content": "b"},
    ]
    assert in_order(turns, "repair") == (turns, "roles out of order, beyond repair")
    assert len(in_order([{**turn, "weight": 0.0} for turn in turns], "repair")[0]) == 2


@pytest.mark.parametrize("mix", [False, True])
def test_chats_of_which_nothing_is_trained_on_are_counted(place, capsys, caplog, mix):  # noqa: F811
    """No assistant turn, or answers whose weight is 0; a mark of an answer with weight 0 changes nothing."""
    asked, answer = MESSAGES["messages"]
    chats = [
        [asked, answer], [asked], [asked, {**answer, "weight": 0}], [asked, {**answer, "loss": False}, asked, {**answer, "train": False}],
        [asked, {**answer, "weight": 0}, asked, {**answer, "weight": 0.5}], [{**asked, "train": True}, {**answer, "weight": 0}],
    ]  # fmt: skip
    (place / "c.jsonl").write_bytes(lines([{"messages": chat} for chat in chats]))
    section = {
        "output_dir": "out",
        "filename_prefix": "c",
        "vocab_file": "tokenizer.model",
        **({"mix_by": "samples"} if mix else {}),
    }
    section["datasets"] = [{"messages": {"input_file_path": "c.jsonl", "val_split": 0, "share": 1}}]
    assert pretokenize("--configs", "x", *configure(place, x=section)) == 0
    row = json.loads((place / "out/c-train_stats.json").read_text())["total"]
    assert row["without_assistant"] == 3
    assert "train: 3 chats have no token that is trained on: no assistant turn" in caplog.text
    shards = open_shards("out/c-train")
    weights = shards.loss_weights(all_weights(0, {}))
    assert sum(not weights[shards.role_bytes(i)].any() for i in range(6)) == 3

"""A chat that cannot be read or encoded is that chat's fault: named with file and line, and by choice skipped and counted."""

import json

import pytest

from megatron_ft.data.chat_format import ChatFormat
from megatron_ft.data.shards import open_shards
from megatron_ft.errors import TokenizerError
from tests.data.helpers import fast_file
from tests.pretokenizer.fixtures import TREES, lines
from tests.pretokenizer.test_datasets import flat
from tests.pretokenizer.test_pretokenize import place, pretokenize, shortcut  # noqa: F401 - a fixture


def chat(answer, **more):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], **more}


def counted(split="train"):
    """(accepted, skipped by reason, left out by reason) of a run's first dataset."""
    with open(f"out/mine-{split}_stats.json") as file:
        row = json.load(file)["datasets"][0]
    return row["accepted"], row["skipped_by_reason"], row["left_out_by_reader"]


GOOD = lines([chat("a")])
SKIP = ("--on_bad_record", "skip", "--val_split", 0)
BAD_LINES = {
    "cut short": b'{"messages": [{"role": "user", "con\n',
    "not UTF-8": b'{"messages": "\xff"}\n',
    "no object": b"[1]\n",
    "other keys": b'{"foo": 1}\n',
    "no keys": b"{}\n",
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n',
    "null content": b'{"messages": [{"role": "user", "content": null}]}\n',
    "unknown role": b'{"messages": [{"role": "bot", "content": "x"}]}\n',
    "a picture": b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}\n',
    "a bad call": b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}\n',
    "bad tools": b'{"messages": [{"role": "user", "content": "x"}], "tools": "nonsense"}\n',
    "a bad weight": b'{"messages": [{"role": "user", "content": "x", "weight": -1}]}\n',
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_that_line(place, capsys, name, first):  # noqa: F811
    content = [BAD_LINES[name], GOOD, GOOD]
    (place / "x.jsonl").write_bytes(b"".join(content if first else content[::-1]))
    line = 1 if first else 3
    assert shortcut("--val_split", 0, source="x.jsonl") == 2
    said = capsys.readouterr().err
    assert f"x.jsonl, line {line}: " in said and said.count("\n") == 1 and "NoneType" not in said
    assert shortcut(*SKIP, source="x.jsonl") == 0
    said = capsys.readouterr()
    assert f"skipped: x.jsonl, line {line}: " in said.err and "faulty record: 1" in said.out
    assert counted() == (2, {}, {"faulty record": 1})


def test_a_file_of_bad_lines_says_what_is_wrong_with_the_first(place, capsys):  # noqa: F811
    (place / "x.jsonl").write_bytes(BAD_LINES["cut short"] * 3)
    assert shortcut(*SKIP, source="x.jsonl") == 2
    assert "x.jsonl, line 1: not valid JSON" in capsys.readouterr().err


def own_template(place, template):  # noqa: F811
    """A folder with a tokenizer and a chat template of its own, as the flags that name it."""
    (place / "own").mkdir()
    fast_file(place / "own")
    (place / "own/tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<eos>"}))
    return ("--tokenizer", "own", "--chat_format", "tokenizer", "--output_prefix", "out/mine")


REFUSING = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('not this one') }}{% endif %}"
    "{{ m.role + ': ' + m.content }}<eos>{% endfor %}"
)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_chat_that_the_template_refuses(place, capsys, workers):  # noqa: F811
    flags = own_template(place, REFUSING)
    (place / "x.jsonl").write_bytes(lines([chat("a"), chat("bad"), chat("b"), chat("bad"), chat("c")]))
    assert pretokenize("--input", "x.jsonl", *flags, "--val_split", 0, "--workers", workers) == 2
    said = capsys.readouterr().err
    assert "x.jsonl, line 2: " in said and "not this one" in said and said.count("\n") == 1
    assert not (place / "out/mine-train-text.bin").exists()
    assert pretokenize("--input", "x.jsonl", *flags, *SKIP, "--workers", workers) == 0
    said = capsys.readouterr().err
    assert "skipped: x.jsonl, line 2: " in said and "skipped: x.jsonl, line 4: " in said
    assert counted() == (3, {"not sayable in the chat format": 2}, {})
    assert len(open_shards("out/mine-train", verify=True)) == 3


REGROUPING = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}user:{% endif %}[{{ m.content }}]"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<eos>{% endif %}"
    "{% else %}{{ m.role + ': ' + m.content }}<eos>{% endif %}{% endfor %}"
)


def test_parallel_results_that_a_template_regroups_end_no_run(place, capsys):  # noqa: F811
    calls = [{"id": name, "function": {"name": "f", "arguments": {}}} for name in "ab"]
    asked = [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    answered = [{"role": "tool", "tool_call_id": name, "content": name} for name in "ab"]
    parallel = {"messages": [*asked, *answered, {"role": "assistant", "content": "done"}]}
    (place / "x.jsonl").write_bytes(lines([parallel, chat("a"), chat("b")]))
    assert pretokenize("--input", "x.jsonl", *own_template(place, REGROUPING), *SKIP) == 0
    accepted, skipped, _ = counted()
    assert accepted + sum(skipped.values()) == 3 and accepted >= 2
    assert ("x.jsonl, line 1: " in capsys.readouterr().err) == (accepted == 2)


def test_whatever_stops_a_chat_from_being_encoded_is_that_chats(place, capsys, monkeypatch):  # noqa: F811
    """A tokenizer's error, as templates raise for what holds for one chat only."""
    encode = ChatFormat.encode_flat

    def refusing(self, tokenizer, conversations, add_generation_prompt=False):
        if any(message["content"] == "bad" for messages in conversations for message in messages):
            raise TokenizerError("earlier turns are written differently")
        return encode(self, tokenizer, conversations, add_generation_prompt)

    monkeypatch.setattr(ChatFormat, "encode_flat", refusing)
    (place / "x.jsonl").write_bytes(lines([chat("a"), chat("bad"), chat("b")]))
    assert shortcut("--val_split", 0, source="x.jsonl") == 2
    assert "x.jsonl, line 2: earlier turns are written differently" in capsys.readouterr().err
    assert shortcut(*SKIP, source="x.jsonl") == 0
    assert counted() == (2, {"not sayable in the chat format": 1}, {})
    both = open_shards("out/mine-train", verify=True)
    (place / "y.jsonl").write_bytes(lines([chat("a"), chat("b")]))
    assert shortcut(*SKIP, "--output_prefix", "out/only", source="y.jsonl") == 0
    only = open_shards("out/only-train")
    assert [both.tokens(i).tolist() for i in range(2)] == [only.tokens(i).tolist() for i in range(2)]


def test_a_tree_of_a_table_that_cannot_be_put_together_is_that_tree(place, capsys):  # noqa: F811
    rows = [list(flat(tree["prompt"], f"t{i}")) for i, tree in enumerate(TREES[:3])]
    rows[1] = [row for row in rows[1] if row["text"] != "right"]  # a parent that is gone
    rows[2].append({**rows[0][0], "message_tree_id": ["x"]})
    (place / "x.jsonl").write_bytes(b"not json\n" + lines([row for tree in rows for row in tree]))
    section = {"oasst_export": {"input_file_path": "x.jsonl", "val_split": 0}}
    (place / "conf").mkdir()
    mix = {"datasets": [section], "output_dir": "out", "filename_prefix": "mine", "vocab_file": "tokenizer.model"}
    (place / "conf/all.yaml").write_text(json.dumps({"mix": mix}))
    assert pretokenize("--configs", "mix", "--config_dir", "conf", "--on_bad_record", "fail") == 2
    assert "x.jsonl, line 1: not valid JSON" in capsys.readouterr().err
    assert pretokenize("--configs", "mix", "--config_dir", "conf", "--on_bad_record", "skip") == 0
    said = capsys.readouterr().err
    assert "which is not in its tree" in said and "message_tree_id is a list, not a name" in said
    accepted, _, left_out = counted()
    assert (accepted, left_out["faulty record"]) == (3, 3)

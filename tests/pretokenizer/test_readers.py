"""Reading: packings, message trees against statistics worked out by hand, shapes, and errors that name the line."""

import tarfile
from collections import Counter

import pytest

from megatron_ft.errors import DataError
from tests.data.helpers import real
from tests.pretokenizer.fixtures import EXPECTED, PACKINGS, TREES, answer, ask, lines, tar_gz, tree
from tools.pretokenizer import lines as lines_module
from tools.pretokenizer.lines import records
from tools.pretokenizer.oasst import OasstOptions, conversations
from tools.pretokenizer.readers import READERS, recognise


def convert(name, record, options=None):
    left_out = Counter()
    reader = READERS[name]
    return reader.convert(record, "here", options or reader.options(), left_out), left_out


@pytest.mark.parametrize(("options", "samples", "left_out"), EXPECTED)
def test_trees_worked_out_by_hand(options, samples, left_out):
    counted = Counter()
    found = [c for t in TREES for c in conversations(t, "here", OasstOptions(**options), counted)]
    assert [[turn["content"] for turn in chat] for chat in found] == samples
    assert counted == left_out
    assert {turn["role"] for chat in found for turn in chat[::2]} == {"prompter"}
    assert all(chat[-1]["role"] == "assistant" for chat in found)


@pytest.mark.parametrize(("top_k", "count"), [(None, 538), (1, 98), (2, 276)])
def test_the_real_export(top_k, count):
    """Of 609, 116 and 317 threads from root to leaf; the rest end with a question that is not its parent's first reply."""
    trees = list(records(real("oasst/en_100_tree.jsonl")))
    options, left_out = OasstOptions(top_k=top_k), Counter()
    assert sum(len(conversations(t, where, options, left_out)) for where, t in trees) == count
    assert left_out["synthetic message"] > 0


def test_a_very_deep_tree():
    node = answer("end")
    for i in range(5000):
        node = (ask if i % 2 == 0 else answer)(str(i), node)
    (chat,), _ = convert("oasst_export", tree(1, node if node["role"] == "prompter" else ask("q", node)))
    assert len(chat) > 5000


@pytest.mark.parametrize("name", PACKINGS)
def test_packings(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PACKINGS[name](lines(TREES)))
    assert [record for _, record in records(path)] == TREES
    assert recognise(path).name == "oasst_export"


SHAPES = {
    "messages": {"messages": [{"role": "user", "content": "q", "context": "c"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "x", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
}
TURNS = {
    "messages": ["context", "c", "user", "q", "assistant", "a"],
    "sharegpt": ["user", "q", "assistant", "a"],
    "alpaca": ["user", "q\n\nx", "assistant", "a"],
    "prompt_completion": ["user", "q", "assistant", "a"],
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_recognised_and_read(tmp_path, name):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines([SHAPES[name]]))
    assert recognise(path).name == name
    ((chat,), _) = convert(name, SHAPES[name])
    assert [part for turn in chat for part in (turn["role"], turn["content"])] == TURNS[name]


def test_a_chat_without_messages_is_counted():
    assert convert("messages", {"messages": []}) == ([], Counter({"chat without messages": 1}))


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("messages", {"text": "x"}, "the key 'messages' is missing"),
        ("messages", {"messages": "x"}, "text, not a list"),
        ("messages", {"messages": ["x"]}, "not an object"),
        ("messages", {"messages": [{"content": "x"}]}, "the key 'role' is missing"),
        ("messages", {"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "'role' is a list"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "null, not text"),
        ("sharegpt", {"conversations": [{"from": "bing", "value": "x"}]}, "unknown role 'bing'"),
        ("alpaca", {"instruction": "x", "output": 3}, "'output' is a number"),
        ("oasst_export", {"message_tree_id": 1}, "lacks 'prompt'"),
        ("oasst_export", tree(1, {**ask("q"), "role": "moderator"}), "unknown role 'moderator'"),
        ("oasst_export", tree(1, ask("q", ask("again"))), "by the prompter, assistant was expected"),
        ("oasst_export", tree(1, ask("q", answer("a", rank="0"))), "rank '0' is not a number"),
        ("oasst_export", tree(1, {**ask("q"), "replies": {"a": 1}}), "an object, not a list"),
        ("sharegpt", {"conversations": {"from": "human"}}, "an object, not a list"),
        ("oasst_export", tree(1, ask("q", {"role": "assistant", "rank": 0})), "lacks 'text'"),
        ("oasst_export", tree(1, ask("q", answer(3))), "'text' is a number"),
        ("oasst_export", tree(1, []), "prompt is a list, not a message"),
        ("messages", {"messages": [{"role": "user", "content": "q", "weight": 10**400}]}, "weight 1000"),
        ("messages", {"messages": [{"role": ["user"], "content": "q"}]}, "'role' is a list"),
    ],
)
def test_faulty_records_say_where(name, record, message):
    with pytest.raises(DataError, match=f"here: .*{message}"):
        convert(name, record)


GOOD = lines([SHAPES["messages"]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"messages": [\n', "line 2: not valid JSON"),
        (GOOD + b'{"messages": "\xff"}\n', "line 2: byte 15 is not UTF-8"),
        (GOOD + b'{"messages": "\\ud800"}\n', "line 2: not valid JSON"),
        (GOOD + b'{"weight": NaN}\n', "line 2: not valid JSON"),
        (GOOD + b"\n\n[1]\n", "line 4: a list, an object was expected"),
        (GOOD + b"\0\0\0\n", "line 2: not valid JSON"),
        (b"[{}, 3]", "entry 2: a number, an object"),
        (b"[{},\n}", "line 2: not valid JSON"),
        (b"[" * 100_000, "nested"),
        (b"\x1f\x8b\x08\x00garbage", "damaged"),
        (tar_gz([("a.jsonl", GOOD)])[:60], "damaged"),
        (tar_gz([("README", GOOD)]), "no .jsonl file"),
        (tar_gz([("../a.jsonl", GOOD)]), "member ../a.jsonl"),
        (tar_gz([("/a.jsonl", GOOD)]), "member /a.jsonl"),
    ],
)
def test_faulty_files_say_where(tmp_path, content, message):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"chats\.jsonl.*{message}"):
        list(records(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_archives_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("trees.jsonl")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "a.tar.gz").write_bytes(tar_gz([(info, b"")]))
    with pytest.raises(DataError, match="a link, a device"):
        list(records(tmp_path / "a.tar.gz"))


def test_a_giant_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE", 100)
    (tmp_path / "chats.jsonl").write_bytes(GOOD + b" " * 200)
    with pytest.raises(DataError, match="longer than"):
        list(records(tmp_path / "chats.jsonl"))


@pytest.mark.parametrize("length", [99, 100, 101, 163, 164, 300, 1000])
def test_a_giant_line_is_skipped_by_choice(tmp_path, monkeypatch, length):
    """Whatever of it was read with the lines before; the others keep their numbers."""
    monkeypatch.setattr(lines_module, "MAX_LINE", 100)
    monkeypatch.setattr(lines_module, "CHUNK", 64)
    (tmp_path / "chats.jsonl").write_bytes(b"{}\n" + b"x" * length + b"\n{}\n{}")
    bad, found = [], []
    for chunk in lines_module.chunks(tmp_path / "chats.jsonl"):
        assert len(chunk.lines) < 64 + 101
        found += [where.split(", ")[-1] for where, _ in lines_module.parse(chunk, bad)]
    assert found == ["line 1", "line 3", "line 4"]
    assert len(bad) == 1 and ", line 2: " in bad[0] and ("longer than" in bad[0]) == (length >= 100)


def test_what_is_not_recognised(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"questions": "x", "answers": "y"}\n')
    with pytest.raises(
        DataError, match="no known format has the keys questions, answers; the nearest are question_answer: "
    ):
        recognise(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="contains no chats"):
        recognise(path)
    with pytest.raises(DataError, match="cannot be read"):
        recognise(tmp_path / "nothing.jsonl")

"""Drawn chats with any key, order of roles, parts and calls: what is trained on comes back from the shards to the character, or the record
is refused by its line. Nothing is left out in silence."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_chats
from megatron_ft.data.chat_format import FORMATS
from megatron_ft.data.roles import ROLES, all_weights, weight_table
from megatron_ft.data.shards import ShardWriter, open_shards
from tests.data.families import FAMILIES
from tests.data.helpers import fast_file
from tools.pretokenizer import messages
from tools.pretokenizer.chunk import Chunk
from tools.pretokenizer.readers import READERS
from tools.pretokenizer.selection import Selection
from tools.pretokenizer.work import Job, Worker, WorkerSettings

TRICKS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<think>",
    "</tool_call>",
    "\n\n",
    " ",
    "é二😀",
    "BEGININPUT",
    "{{ x }}",
    "\0",
]
TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(TRICKS), max_size=4
).map("".join)
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | TEXT
)
JSON = st.recursive(
    SCALAR, lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXT, below, max_size=3), max_leaves=6
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
CALL = st.fixed_dictionaries({"name": TEXT, "arguments": OBJECT | OBJECT.map(json.dumps)})
SPEAKERS = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
SPEAKERS |= {"tool": "context", "observation": "context", "context": "context", "developer": "system"}
EVERYONE = sorted(SPEAKERS)
KNOWN = {
    "role",
    "content",
    "from",
    "value",
    "context",
    "weight",
    "loss",
    "train",
    "tool_call_id",
    "name",
    "tool_calls",
    "function_call",
}
KNOWN |= {"reasoning_content", "reasoning", "thinking"}
UNKNOWN = TEXT.filter(lambda key: key not in KNOWN)


@st.composite
def message(draw, speakers=EVERYONE):
    """A message as its author means it."""
    speaker = draw(st.sampled_from(speakers))
    parts = draw(st.lists(TEXT, min_size=1, max_size=3))
    content = "".join(parts) if draw(st.booleans()) else [{"type": "text", "text": text} for text in parts]
    openai = draw(st.booleans()) or not isinstance(content, str)
    result = {"role": speaker, "content": content} if openai else {"from": speaker, "value": content}
    optional = {"loss": st.booleans(), "train": st.none(), "weight": st.sampled_from([0, 1, 0.5, None])}
    if SPEAKERS[speaker] == "assistant":
        optional |= {
            "reasoning_content": TEXT,
            "tool_calls": st.lists(st.fixed_dictionaries({"function": CALL}) | CALL, max_size=2),
        }
    chosen = draw(st.lists(st.sampled_from(sorted(optional)), max_size=2, unique=True))
    return result | {key: draw(optional[key]) for key in chosen} | draw(st.dictionaries(UNKNOWN, JSON, max_size=1))


RECORD = st.fixed_dictionaries({"messages": st.lists(message(), min_size=1, max_size=5)})
ROUND = st.tuples(message(("user", "human")), message(("assistant", "gpt")))
ORDERED = st.lists(ROUND, min_size=1, max_size=3).map(
    lambda rounds: {"messages": [one for two in rounds for one in two]}
)
"""In the order of roles that all templates take."""


@st.composite
def wild(draw):
    """A record in which values of any kind stand where others are meant."""
    record = draw(RECORD)
    for one in record["messages"]:
        if draw(st.integers(0, 3)) == 0:
            one[draw(st.sampled_from(sorted(KNOWN)))] = draw(JSON)
    return record | draw(
        st.dictionaries(st.sampled_from(["system", "tools", "functions", "messages", "x"]), JSON, max_size=1)
    )


OWN = [f"a template as {name}'s" for name in FAMILIES]


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """A worker for each format and each family's template, over tokenizers in which every text comes back."""
    file = str(fast_file(tmp_path_factory.mktemp("tokenizer")))
    job = Job("messages", "messages", READERS["messages"].options(), Selection())
    own = fuzz_chats.own_workers(tmp_path_factory.mktemp("templates"), job)
    return dict(zip(OWN, own, strict=True)) | {
        name: Worker(WorkerSettings([job], file, chat_format.added_tokens, name, True, "keep", False))
        for name, chat_format in FORMATS.items()
    }


def through(worker, records, folder):
    """(shards, refusals, unread keys) of records, by the way that a run takes."""
    (job,) = worker.settings.jobs
    chunk = Chunk("x.jsonl", "line", 1, "\n".join(map(json.dumps, records)).encode(), None)
    counted = worker.count(job, chunk)
    wanted = np.ones(int(counted.sizes.sum()), np.uint8)
    table = weight_table(sorted(counted.weights))
    found = worker.tokenize(job, chunk, wanted, table).get(1)
    bad = counted.bad + (found.bad if found else [])
    with ShardWriter(
        folder / "x", worker.tokenizer.vocab_size, worker.tokenizer.info(), weights=table, parts=True
    ) as writer:
        if found:
            writer.add_many(found.ids, found.role_bytes, found.lengths)
    return open_shards(folder / "x"), bad, counted


def refused_lines(bad):
    assert all(message.startswith("x.jsonl, line ") and "NoneType" not in message for message in bad), bad
    lines = [int(message.removeprefix("x.jsonl, line ").split(":")[0]) for message in bad]
    assert len(set(lines)) == len(lines)
    return set(lines)


def text_of(one):
    content = one["content"] if "content" in one else one["value"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def weight_meant(one):
    weight = 1 if one.get("weight") is None else one["weight"]
    return 0 if one.get("loss") is False else weight


def check_turn(written, one):
    """The text of a turn says what the message says, and nothing else."""
    if reasoning := one.get("reasoning_content"):
        written = written.removeprefix("<think>\n")
        assert written.startswith(f"{reasoning}\n</think>\n\n")
        written = written.removeprefix(f"{reasoning}\n</think>\n\n")
    assert written.startswith(text_of(one))
    written = written.removeprefix(text_of(one))
    for call in one.get("tool_calls") or []:
        function = call.get("function", call)
        written = written.removeprefix("\n").removeprefix("<tool_call>\n")
        found, end = json.JSONDecoder().raw_decode(written)
        arguments = function["arguments"]
        assert found == {
            "name": function["name"],
            "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments,
        }
        assert written[end:].startswith("\n</tool_call>")
        written = written[end:].removeprefix("\n</tool_call>")
    assert written == ""


@settings(max_examples=60, deadline=None)
@given(records=st.lists(RECORD, min_size=1, max_size=4))
def test_what_a_record_says_comes_back(workers, tmp_path_factory, records):
    worker = workers["chatml"]
    shards, bad, counted = through(worker, records, tmp_path_factory.mktemp("shards"))
    assert bad == [] and len(shards) == len(records)
    start, end = (worker.tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    by_role_byte = shards.loss_weights(all_weights(0, {}))
    for i, record in enumerate(records):
        ids, role_bytes = shards.tokens(i), shards.role_bytes(i)
        starts, ends = np.flatnonzero(ids == start), np.flatnonzero(ids == end)
        assert len(starts) == len(ends) == len(record["messages"])
        for first, last, one in zip(starts, ends, record["messages"], strict=True):
            role = SPEAKERS[one.get("role", one.get("from"))]
            said = worker.tokenizer.decode(ids[first + 1 : last])
            assert said.startswith(f"{role}\n")
            check_turn(said.removeprefix(f"{role}\n"), one)
            expected = weight_meant(one) if ROLES[role] == 2 else 0
            assert set(by_role_byte[role_bytes[first : last + 1]].tolist()) == {expected}
    unknown = Counter(
        f"messages.{key}"
        for r in records
        for one in r["messages"]
        for key in one.keys() - KNOWN
        if one[key] is not None
    )
    assert counted.unread == unknown


def said(one, worker):
    """The texts of an answer, in the order in which a format writes them."""
    own = worker.settings.chat_format == "tokenizer"
    if not own or "reasoning_content" in worker.chat_format.places:
        yield one.get("reasoning_content") or ""
    yield from fuzz_chats.TAGS.split(text_of(one)) if own else [text_of(one)]


@pytest.mark.parametrize("name", [*sorted(FORMATS), *OWN])
@settings(max_examples=20, deadline=None)
@given(record=RECORD | ORDERED | ORDERED)
def test_what_is_trained_on_is_what_a_record_says(workers, tmp_path_factory, name, record):
    worker = workers[name]
    shards, bad, _ = through(worker, [record], tmp_path_factory.mktemp("shards"))
    assert refused_lines(bad) == ({1} if bad else set())
    weights = shards.loss_weights(all_weights(0, {}))
    by_sample = (shards.tokens(i)[weights[shards.role_bytes(i)] > 0] for i in range(len(shards)))
    trained = "\n".join(map(worker.tokenizer.decode, by_sample))
    answers = [one for one in record["messages"] if SPEAKERS[one.get("role", one.get("from"))] == "assistant"]
    assert bool(len(shards)) == (not bad) or not answers
    for one in (one for one in answers if weight_meant(one) and not bad):
        strips = name in OWN or worker.chat_format.strip
        assert all((text.strip() if strips else text) in trained for text in said(one, worker))
        for function in (call.get("function", call) for call in one.get("tool_calls") or []):
            assert function["name"] in trained or json.dumps(function["name"], ensure_ascii=False) in trained
            arguments = function["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            orders = (json.dumps(arguments, ensure_ascii=False, sort_keys=ordered) for ordered in (False, True))
            assert any(text in trained for text in orders)


def strings(value):
    """The texts of messages that are whole beyond doubt."""
    for one in value if isinstance(value, list) else []:
        if isinstance(one, dict) and one.get("role") in ("assistant", "gpt") and isinstance(one.get("content"), str):
            yield one["content"].strip(), one.get("weight"), one.get("loss"), one.get("train")


@pytest.mark.parametrize("name", sorted(FORMATS))
@settings(max_examples=20, deadline=None)
@given(records=st.lists(wild(), min_size=1, max_size=4))
def test_any_record_is_read_or_refused_by_its_line(workers, tmp_path_factory, name, records):
    worker = workers[name]
    shards, bad, counted = through(worker, records, tmp_path_factory.mktemp("shards"))
    refused = refused_lines(bad)
    kept = [record for number, record in enumerate(records, 1) if number not in refused]
    assert len(shards) + counted.left_out.total() == len(kept)
    by_role_byte = shards.loss_weights(all_weights(0, {}))
    read = [record for record in kept if record["messages"]]
    for i, record in enumerate(read if len(read) == len(shards) else []):
        trained = worker.tokenizer.decode(shards.tokens(i)[by_role_byte[shards.role_bytes(i)] > 0])
        for text, *weights in strings(record["messages"]):
            if weights == [None, None, None]:
                assert text in trained
                trained = trained[trained.index(text) + len(text) :]


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=10, deadline=None)
@given(records=st.lists(wild(), min_size=1, max_size=4))
def test_any_record_with_a_template_is_read_or_refused_by_its_line(workers, tmp_path_factory, name, records):
    worker = workers[name]
    shards, bad, _ = through(worker, records, tmp_path_factory.mktemp("shards"))
    refused = refused_lines(bad)
    by_role_byte = shards.loss_weights(all_weights(0, {}))
    by_sample = (shards.tokens(i)[by_role_byte[shards.role_bytes(i)] > 0] for i in range(len(shards)))
    trained = "\n".join(map(worker.tokenizer.decode, by_sample))
    for record in (record for number, record in enumerate(records, 1) if number not in refused):
        for text, *weights in strings(record["messages"]):
            if weights == [None, None, None]:
                assert all(part.strip() in trained for part in fuzz_chats.TAGS.split(text))


@pytest.mark.parametrize("templates", [False, True], ids=["our formats", "own templates"])
def test_the_campaign_in_its_short_form(tmp_path, templates):
    result = fuzz_chats.campaign(tmp_path, 3000, seed=11, templates=templates)
    assert result.total() == 3000 and result["accepted"] > 1000 and result["refused"] > 200


@pytest.mark.parametrize("templates", [False, True], ids=["our formats", "own templates"])
def test_the_campaign_sees_a_text_that_is_lost(tmp_path, monkeypatch, templates):
    monkeypatch.setattr(messages, "_reasoning", lambda *arguments: {})
    with pytest.raises(AssertionError):
        fuzz_chats.campaign(tmp_path, 3000, seed=11, templates=templates)


def test_the_campaign_sees_a_part_that_a_template_drops(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ft.data.template_complete._lost", lambda *arguments: None)
    with pytest.raises(AssertionError):
        fuzz_chats.campaign(tmp_path, 3000, seed=11, templates=True)

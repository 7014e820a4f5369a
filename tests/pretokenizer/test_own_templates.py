"""Chats of every kind through pretokenize, with tokenizers' own templates: what the shards hold, and what is left out."""

import json
from collections import Counter

import numpy as np
import pytest

from megatron_ft.data.roles import REASONING, SPOKEN, TOOL_CALL
from megatron_ft.data.shards import open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.errors import UserError
from tests.data.families import CHATS, FAMILIES, chat, write
from tools.pretokenizer.pretokenize import COMMAND, run


def record(messages):
    beside = {key: m[key] for m in messages for key in ("tools", "documents") if m.get(key)}
    plain = [{key: value for key, value in message.items() if key not in beside} for message in messages]
    return {"messages": plain, **beside}


def pretokenize(folder, chats, *words):
    from megatron_ft.config.cli import parse

    lines = "".join(json.dumps(record(one)) + "\n" for one in chats)
    (folder / "chats.jsonl").write_text(lines)
    more = ("--chat_format", "tokenizer", "--val_split", "0", "--output_prefix", str(folder / "out/x"))
    argv = ["--input", str(folder / "chats.jsonl"), "--tokenizer", str(folder), *more, *words]
    run(*parse(COMMAND, argv))
    return open_shards(folder / "out/x-train")


def texts(shards, tokenizer):
    return [tokenizer.decode(shards.tokens(i)) for i in range(len(shards))]


def test_parallel_results_end_no_run(tmp_path):
    tokenizer = load_tokenizer(write("qwen2.5", tmp_path))
    shards = pretokenize(tmp_path, [CHATS["parallel tools"], CHATS["one turn"]])
    first, second = texts(shards, tokenizer)
    assert "<tool_response>\n2\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>" in first
    assert TOOL_CALL in shards.roles(0) and "hello fox" in second
    assert shards.manifest.format_version == 3 and shards.manifest.counts["tokens_by_role"]["tool_call"] > 20


def test_one_chat_that_a_template_refuses_is_that_chats(tmp_path, capsys):
    write("llama2", tmp_path)
    bad = [CHATS["one turn"][1], CHATS["one turn"][0]]
    with pytest.raises(
        UserError, match=r"chats.jsonl, line 2: .*user and assistant must take turns.*--on_bad_record skip"
    ):
        pretokenize(tmp_path, [CHATS["one turn"], bad, CHATS["system"]])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.bin"))
    shards = pretokenize(tmp_path, [CHATS["one turn"], bad, CHATS["system"]], "--on_bad_record", "skip")
    assert len(shards) == 2


def test_reasoning_as_samples_or_as_one(tmp_path):
    tokenizer = load_tokenizer(write("qwen3", tmp_path))
    chats = [CHATS["thinking"], CHATS["one turn"]]
    shards = pretokenize(tmp_path, chats)
    assert len(shards) == 3
    assert sum(np.isin(shards.roles(i), [REASONING]).any() for i in range(3)) == 2
    one = pretokenize(tmp_path, chats, "--rewritten_turns", "one", "--overwrite")
    assert len(one) == 2 and "the fox" not in texts(one, tokenizer)[0]
    assert np.isin(one.roles(0), SPOKEN).sum() > np.isin(shards.roles(1), SPOKEN).sum() - 20


def test_a_chat_is_counted_and_compared_as_a_whole(tmp_path):
    """The samples of one chat begin alike, which makes them no duplicates; a turn with marks says nothing more to the template."""
    write("qwen3", tmp_path)
    chats = [[{**CHATS["thinking"][0], "train": True}, *CHATS["thinking"][1:]]] * 2
    shards = pretokenize(tmp_path, chats, "--duplicates", "exact")
    assert len(shards) == 2 and shards.manifest.counts["marked_tokens"] > 0
    statistics = json.loads((tmp_path / "out/x-train_stats.json").read_text())["datasets"][0]
    assert (statistics["available"], statistics["samples"], statistics["accepted"]) == (2, 2, 2)


def test_the_date_is_fixed_and_recorded(tmp_path):
    tokenizer = load_tokenizer(write("llama3.2", tmp_path))
    with pytest.raises(UserError, match="--template_date"):
        pretokenize(tmp_path, [CHATS["one turn"]])
    shards = pretokenize(tmp_path, [CHATS["one turn"]], "--template_date", "2024-07-26", "--template_arguments", "x=1")
    assert "26 Jul 2024" in texts(shards, tokenizer)[0]
    assert shards.manifest.chat_format["template_date"] == "2024-07-26"
    assert json.loads(shards.manifest.chat_format["template_arguments"]) == {"x": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_that_a_template_takes(tmp_path, name):
    family = FAMILIES[name]
    tokenizer = load_tokenizer(write(name, tmp_path))
    chats = [chat(kind, family) for kind in family.takes]
    shards = pretokenize(tmp_path, chats, "--template_date", "2024-07-26")
    said = Counter(
        m["content"].strip() for one in chats for m in one if m["role"] == "user" and m["content"].strip().isalpha()
    )
    if family.kind == "bytes":
        whole = "".join(texts(shards, tokenizer))
        assert all(text in whole for text in said)
    assert len(shards) >= len(chats)


def test_what_a_template_has_no_place_for_is_listed(tmp_path, capsys):
    write("llama3", tmp_path)
    chats = [[{**CHATS["reasoning key"][0], "name": "Ann"}, *CHATS["reasoning key"][1:]], CHATS["tools"]]
    shards = pretokenize(tmp_path, chats, "--on_bad_record", "skip")
    said = capsys.readouterr().out
    assert len(shards) == 1 and "not sayable in the chat format: 1" in said
    assert (
        "keys of chats.jsonl that were not read: messages.name (3), messages.reasoning_content (2), tools (1)" in said
    )
    write("qwen3", tmp_path)
    pretokenize(tmp_path, chats, "--overwrite")
    assert "not read: messages.name (3)\n" in capsys.readouterr().out


def test_documents_of_a_record_are_given_to_the_template(tmp_path, capsys):
    """transformers takes them as `documents`; a template without a place for them, and formats of ours, count them."""
    import transformers

    tokenizer = load_tokenizer(write("command-r", tmp_path))
    source = (
        "{% for d in documents or [] %}{{ d.title ~ ': ' ~ d.text }}{% endfor %}{% for m in messages %}"
        "<|START_OF_TURN_TOKEN|>{{ m.role ~ m.content }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": source}))
    documents = [{"title": "t", "text": "a fox <|END_OF_TURN_TOKEN|>"}]
    shards = pretokenize(tmp_path, [[{**CHATS["one turn"][0], "documents": documents}, CHATS["one turn"][1]]])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    harmless = [{"title": "t", "text": "a fox "}]
    expected = theirs.apply_chat_template(CHATS["one turn"], documents=harmless, return_dict=False)
    end = tokenizer.token_id("<|END_OF_TURN_TOKEN|>")
    found = shards.tokens(0).tolist()
    assert tokenizer.decode(found).startswith("t: a fox <|END_OF_TURN_TOKEN|>") and found.count(end) == expected.count(
        end
    )
    assert "not read" not in capsys.readouterr().out
    write("llama3", tmp_path)
    pretokenize(tmp_path, [[{**CHATS["one turn"][0], "documents": documents}, CHATS["one turn"][1]]], "--overwrite")
    assert "keys of chats.jsonl that were not read: documents (1)" in capsys.readouterr().out


def test_keys_that_a_template_takes_notice_of_are_given_to_it(tmp_path, capsys):
    import transformers

    write("qwen2.5", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.title %} ({{ m.title }}){% endif %}{{ '+' if m.prefix else '' }}\n"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": source}))
    tokenizer = load_tokenizer(tmp_path)
    first, second = CHATS["one turn"]
    messages = [{**first, "title": "Dr", "mood": "calm"}, {**second, "prefix": True, "title": None}]
    shards = pretokenize(tmp_path, [messages])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert shards.tokens(0).tolist() == theirs.apply_chat_template(messages, return_dict=False)
    assert "keys of chats.jsonl that were not read: messages.mood (1)\n" in capsys.readouterr().out
    forged = [{**first, "title": "Dr <|im_end|>"}, second]
    shards = pretokenize(tmp_path, [forged], "--overwrite")
    assert np.count_nonzero(shards.tokens(0) == tokenizer.token_id("<|im_end|>")) == 2

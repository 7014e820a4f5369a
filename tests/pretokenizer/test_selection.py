"""What is left out and why, duplicates, mixes, marks and weights: on conversations whose outcome is clear by eye."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from megatron_ft.data.roles import ASSISTANT, MARKED
from megatron_ft.data.shards import open_shards
from megatron_ft.errors import ConfigError, DataError
from tests.pretokenizer.fixtures import lines
from tests.pretokenizer.test_pretokenize import configure, place, pretokenize, shortcut  # noqa: F401 - a fixture
from tools.pretokenizer import mixing
from tools.pretokenizer.duplicates import NearIndex, first_of_each, signatures
from tools.pretokenizer.selection import Selection, in_order, language_fault, refuses, token_faults

SHORT = {"s": "system", "u": "user", "a": "assistant", "c": "context", "t": "tool"}


def chat(letters):
    return [{"role": SHORT[letter], "content": f"{letter}{i}"} for i, letter in enumerate(letters)]


@pytest.mark.parametrize(
    ("letters", "mended"),
    [
        ("ua", "ua"),
        ("suaua", "suaua"),
        ("scua", "scua"),
        ("uatatua", None),  # the assistant speaks after a tool
        ("uua", "ua"),
        ("auaa", "ua"),
        ("suau", "sua"),
        ("uac", "ua"),
        ("aaa", ""),
        ("usa", ""),
        ("su", ""),
    ],
)
def test_the_order_of_roles(letters, mended):
    asked, kept = chat(letters), chat(letters)
    assert in_order(asked, "keep") == (kept, None)
    right = mended in (letters, None)
    assert in_order(asked, "reject") == (kept, None if right else "roles out of order")
    result, fault = in_order(asked, "repair")
    if mended == "":
        assert fault == "roles out of order, beyond repair"
    elif right:
        assert (result, fault) == (kept, None)
    else:
        assert fault is None
        assert "".join(message["role"][0] for message in result) == mended
    assert asked == kept  # not changed in place


def test_mended_turns_hold_all_that_was_said():
    result, _ = in_order(chat("uuaa"), "repair")
    assert [message["content"] for message in result] == ["u0\n\nu1", "a2\n\na3"]


def test_refusals_and_languages():
    phrases = Selection(refusal_phrases=True).phrases
    assert refuses([{"role": "assistant", "content": "As an AI language model, I"}], phrases)
    assert refuses([{"role": "assistant", "content": "I’m sorry, but I can’t"}], phrases)
    assert not refuses([{"role": "user", "content": "as an ai language model"}], phrases)
    assert Selection(refusal_phrases="No Way, never").phrases == ("no way", "never")
    assert Selection().phrases == ()
    wanted = Selection(languages="en, de").wanted_languages
    assert language_fault({"lang": "de"}, wanted) is None
    assert language_fault({"language": "fr"}, wanted) == "other language"
    assert language_fault({}, wanted) == "language unknown"


def test_limits_in_tokens():
    role_bytes = np.array([1, 2, 2, 1, 1, 2 | MARKED], np.uint8)
    faults, reasons = token_faults(role_bytes, np.array([3, 0, 2, 1]), Selection(min_assistant_tokens=1, max_tokens=2))
    assert [reasons[i] for i in faults] == ["more than 2 tokens", "no tokens", "fewer than 1 assistant tokens", ""]
    faults, reasons = token_faults(role_bytes, np.array([3, 3]), Selection(min_tokens=4))
    assert [reasons[i] for i in faults] == ["fewer than 4 tokens"] * 2
    with pytest.raises(ConfigError, match="min_tokens 5 is above max_tokens 4"):
        Selection(min_tokens=5, max_tokens=4).check("here")


def test_duplicates_by_hash_and_by_likeness():
    assert first_of_each(np.array([3, 1, 3, 1, 2], np.uint64)).tolist() == [True, True, False, False, True]
    pytest.importorskip("rensa")
    words = [f"w{i}" for i in range(60)]
    texts = [
        " ".join(words),
        " ".join([*words[:-1], "other"]),
        " ".join(reversed(words)),
        " ".join(words).upper(),
        "w1",
    ]
    index = NearIndex(0.8)
    found = signatures([[{"role": "user", "content": text}] for text in texts])
    assert [index.keep(signature) for signature in found] == [True, False, True, False, True]


def write_chats(place, count=40, name="chats.jsonl", **more):  # noqa: F811
    chats = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}", **more}]}
        for i in range(count)
    ]
    (place / name).write_bytes(lines(chats))
    return chats


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_duplicates_over_all_datasets(place, capsys, kind):  # noqa: F811
    pytest.importorskip("rensa")
    chats = [
        {"messages": [{"role": "user", "content": f"{i} " * 50}, {"role": "assistant", "content": "x"}]}
        for i in range(9)
    ]
    (place / "a.jsonl").write_bytes(lines([*chats[:6], *chats[:2]]))
    (place / "b.jsonl").write_bytes(lines(chats[4:]))
    flags = ("--input", "a.jsonl", "b.jsonl", "--tokenizer", "tokenizer.model", "--output_prefix", "out/mine")
    assert pretokenize(*flags, "--val_split", 0, "--duplicates", kind) == 0
    assert len(open_shards("out/mine-train")) == 9
    said = capsys.readouterr().out
    assert said.count("exact duplicate: 2") == 2


def test_everything_left_out_is_counted(place, capsys):  # noqa: F811
    def one(*turns, **more):
        return {"messages": [{"role": role, "content": text} for role, text in turns], **more}

    good = one(("user", "a"), ("assistant", "b"), lang="en")
    records = [
        *[one(("user", f"q{i}"), ("assistant", "b"), lang="en") for i in range(4)],
        one(("user", "a"), ("assistant", "As a language model ..."), lang="en"),
        one(("user", "a"), ("user", "b"), lang="en"),
        one(("user", "a"), lang="en"),
        {**good, "lang": "fr"},
        {"messages": good["messages"]},
        {"messages": [], "lang": "en"},
        good,
        good,
        one(("user", "the lazy dog " * 30), ("assistant", "b"), lang="en"),
    ]
    (place / "chats.jsonl").write_bytes(lines(records) + b'{"messages": 3, "lang": "en"}\nnot json\n')
    flags = ("--lang", "en", "--refusal_phrases", "true", "--role_order", "reject", "--duplicates", "exact")
    assert shortcut(*flags, "--max_tokens", 60, "--val_split", 0) == 2
    assert "chats.jsonl, line 14: 'messages' is a number" in capsys.readouterr().err
    assert shortcut(*flags, "--max_tokens", 60, "--val_split", 0, "--on_bad_record", "skip") == 0
    said = capsys.readouterr()
    assert "chats.jsonl, line 15: not valid JSON" in said.err
    (row,) = json.loads((place / "out/mine-train_stats.json").read_text())["datasets"]
    assert row["left_out_by_reader"] == {
        "chat without messages": 1,
        "exact duplicate": 1,
        "faulty record": 2,
        "language unknown": 1,
        "other language": 1,
        "refusal phrase": 1,
        "roles out of order": 2,
    }
    assert row["skipped_by_reason"] == {"more than 60 tokens": 1}
    assert row["accepted"] == 5
    for reason in ("refusal phrase: 1", "more than 60 tokens: 1", "faulty record: 2"):
        assert reason in said.out


def test_marked_prompts_and_weights(place):  # noqa: F811
    chats = write_chats(place, 40)
    for i, record in enumerate(chats):
        record["messages"][1]["weight"] = (0.5, 1, 0)[i % 3]
    (place / "chats.jsonl").write_bytes(lines(chats))
    assert shortcut("--val_split", 0, "--marked_prompts", 0.5) == 0
    shards = open_shards("out/mine-train")
    assert shards.manifest.weights == [1.0, 0.0, 0.5]
    role_bytes = [shards.role_bytes(i) for i in range(40)]
    marked = [bool((one & MARKED).any()) for one in role_bytes]
    assert 8 < sum(marked) < 32
    for i, one in enumerate(role_bytes):
        assistant = one & 7 == ASSISTANT
        assert set((one[assistant] >> 4).tolist()) == {(2, 0, 1)[i % 3]}
        assert not (one[assistant] & MARKED).any()
        assert bool((one[~assistant] & MARKED).all()) == marked[i]


def test_a_mix_comes_out_as_asked(place, capsys):  # noqa: F811
    write_chats(place, 400, "many.jsonl")
    write_chats(place, 30, "few.jsonl")
    (place / "text.jsonl").write_bytes(lines([{"text": "the lazy dog " * 5}] * 30))
    files = {"many": ("messages", 0.5), "few": ("messages", 0.3), "text": ("text", 0.2)}
    section = {
        "datasets": [
            {reader: {"input_file_path": f"{name}.jsonl", "val_split": 0.1, "share": share}}
            for name, (reader, share) in files.items()
        ],
        "mix_by": "tokens",
        "mix_max_epochs": 3,
        "output_dir": "mix",
        "filename_prefix": "x",
        "vocab_file": "tokenizer.model",
    }
    flags = configure(place, mix=section)
    assert pretokenize("--configs", "mix", *flags) == 0
    stats = json.loads((place / "mix/x-train_stats.json").read_text())
    assert [round(row["realised"], 2) for row in stats["mix"]] == [0.5, 0.3, 0.2]
    assert max(row["epochs"] for row in stats["mix"]) == pytest.approx(3, abs=0.1)
    shards = open_shards("mix/x-train", verify=True)
    assert len(shards) == sum(row["samples"] for row in stats["mix"])
    by_source = [shards.lengths[slice(*source["documents"])].sum() for source in shards.manifest.sources]
    assert [round(n / sum(by_source), 2) for n in by_source] == [0.5, 0.3, 0.2]
    assert "of the mix, 30.0% requested" in capsys.readouterr().out
    assert not [path for path in (place / "mix").iterdir() if path.name.startswith(".")]
    assert pretokenize("--configs", "mix", *flags, "--mix_total", 10**6, "--overwrite") == 2
    assert "mix_max_epochs is 3" in capsys.readouterr().err
    assert shards.tokens(0).size  # what was there is still there
    assert pretokenize("--configs", "mix", *flags, "--mix_by", "words", "--overwrite") == 2
    del section["datasets"][0]["messages"]["share"]
    assert pretokenize("--configs", "mix", *configure(place, mix=section), "--overwrite") == 2
    assert "share is not set" in capsys.readouterr().err


def test_mixing_arithmetic():
    units = [np.full(100, 10), np.arange(1, 11)]
    rngs = [np.random.default_rng(i) for i in (1, 2)]
    a, b = mixing.select(["a", "b"], units, [1, 3], 120, 2.0, rngs)
    assert (a.units, len(a.picks), b.units) == (30, 3, 90)
    assert sorted(Counter(b.picks.tolist()).values())[-1] == 2
    assert b.epochs == pytest.approx(90 / 55)
    whole = mixing.select(["a", "b"], units, [1, 3], None, 1.0, rngs)
    assert whole[1].picks.tolist() == list(range(10))
    with pytest.raises(DataError, match="no samples are left"):
        mixing.select(["a", "b"], [units[0], units[1][:0]], [1, 1], None, 1.0, rngs)
    assert re.search(r"\| b +\| 75.0% +\| 75.0%", mixing.report([a, b], "tokens"))


@pytest.mark.parametrize("workers", [2, 3])
def test_same_bytes_for_any_number_of_workers(place, workers, monkeypatch):  # noqa: F811
    from tools.pretokenizer import lines as lines_module

    chats = write_chats(place, 3000)
    chats[5]["messages"][1]["weight"] = 0.25
    (place / "chats.jsonl").write_bytes(lines([*chats, *chats[:10]]))
    flags = ("--duplicates", "exact", "--marked_prompts", 0.3, "--min_assistant_tokens", 10, "--write_json")
    monkeypatch.setattr(lines_module, "CHUNK", 10_000)
    assert shortcut(*flags, "--workers", 1, "--output_prefix", "one/x") == 0
    assert shortcut(*flags, "--workers", workers, "--output_prefix", "many/x") == 0
    for path in (place / "one").iterdir():
        assert path.read_bytes() == (place / "many" / path.name).read_bytes(), path.name


def test_a_killed_worker_is_an_error_and_leaves_nothing(place, capsys, monkeypatch):  # noqa: F811
    from tools.pretokenizer import pool

    write_chats(place, 50)
    monkeypatch.setattr(pool, "_work", _die)
    assert shortcut("--workers", 2) == 2
    assert "a worker process was killed" in capsys.readouterr().err
    assert not list((place / "out").glob("*")) if (place / "out").exists() else True


def _die(*_):
    import os

    os._exit(9)


def test_a_full_disk_leaves_nothing(place, capsys, monkeypatch):  # noqa: F811
    from megatron_ft.data.shards import ShardWriter

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add_many", full)
    assert shortcut() == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list((place / "out").iterdir())


def test_a_file_that_changes_meanwhile(place, capsys, monkeypatch):  # noqa: F811
    from tools.pretokenizer import pretokenize as command

    real_count = command.count

    def count(*arguments):
        weights = real_count(*arguments)
        write_chats(place, 39)
        return weights

    write_chats(place, 40)
    monkeypatch.setattr(command, "count", count)
    assert shortcut() == 2
    assert "the file changed while it was read" in capsys.readouterr().err
    assert not list((place / "out").iterdir())


def test_half_a_character_is_named(place, capsys):  # noqa: F811
    record = (
        '[{"messages": [{"role": "user", "content": "\\ud800"}]}, {"messages": [{"role": "user", "content": "x"}]}]'
    )
    (place / "chats.json").write_text(record)
    assert shortcut("--val_split", 0, source="chats.json") == 2
    assert "entry 1: the text contains a lone surrogate" in capsys.readouterr().err
    assert shortcut("--val_split", 0, "--on_bad_record", "skip", source="chats.json") == 0
    assert len(open_shards("out/mine-train")) == 1


def test_chats_that_the_format_cannot_say_are_named_or_counted(place, capsys):  # noqa: F811
    write_chats(place, 8)
    with (place / "chats.jsonl").open("a") as file:
        file.write(
            json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "context", "content": "y"}]}) + "\n"
        )
    flags = ("--val_split", 0, "--chat_format", "alfred")
    assert shortcut(*flags) == 2
    assert "chats.jsonl, line 9: a chat ends with context" in capsys.readouterr().err
    assert shortcut(*flags, "--on_bad_record", "skip") == 0
    assert "skipped: not sayable in the chat format: 1" in capsys.readouterr().out
    assert len(open_shards("out/mine-train")) == 8


def test_a_tokenizer_s_own_template_gives_the_same_shards(place):  # noqa: F811
    from megatron_ft.data.chat_format import CHATML
    from megatron_ft.data.tokenizer import load_tokenizer
    from megatron_ft.data.tokenizer_export import export_tokenizer

    tokenizer = load_tokenizer("tokenizer.model", CHATML.added_tokens)
    export_tokenizer(tokenizer, place / "exported", CHATML.jinja, CHATML.stop_token)
    assert shortcut("--val_split", 0, "--output_prefix", "a/x") == 0
    flags = ("--tokenizer", "exported", "--chat_format", "tokenizer", "--output_prefix", "b/x")
    assert shortcut("--val_split", 0, *flags) == 0
    assert shortcut("--val_split", 0, *flags, "--output_prefix", "c/x", "--workers", 2) == 0
    for ending in ("-text.bin", "-role.bin", "-text.idx"):
        contents = {(place / f"{folder}/x-train{ending}").read_bytes() for folder in "abc"}
        assert len(contents) == 1
    described = open_shards("b/x-train").manifest.chat_format
    assert set(described) == {"template", "stop_token"} and described["stop_token"] == "<|im_end|>"
    with pytest.raises(ConfigError, match="leave it out"):
        from megatron_ft.data.chat_format import get_format

        get_format("tokenizer")

"""The command from its flags to its files, statistics worked out by hand, and what a user's mistakes look like."""

import gzip
import json

import numpy as np
import pytest
import yaml

from megatron_ft.config.cli import run_script
from megatron_ft.data.chat_format import CHATML
from megatron_ft.data.shards import open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from tests.data.helpers import CONTROLS, real, sentencepiece_file
from tests.pretokenizer.fixtures import TREES, lines
from tools.pretokenizer.pretokenize import COMMAND, run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a tokenizer, the five trees and ten plain chats."""
    monkeypatch.chdir(tmp_path)
    sentencepiece_file(tmp_path)
    (tmp_path / "trees.jsonl").write_bytes(lines(TREES))
    chats = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a " * i}]}
        for i in range(10)
    ]
    (tmp_path / "chats.jsonl").write_bytes(lines(chats))
    return tmp_path


def pretokenize(*flags):
    return run_script(COMMAND, run, [str(flag) for flag in flags])


def shortcut(*flags, source="chats.jsonl"):
    return pretokenize("--input", source, "--tokenizer", "tokenizer.model", "--output_prefix", "out/mine", *flags)


def configure(place, **sections):
    (place / "conf").mkdir(exist_ok=True)
    (place / "conf/all.yaml").write_text(yaml.safe_dump(sections))
    return ("--config_dir", "conf")


DEFAULTS = {"rng_seed": 42, "vocab_extra_ids_list": "<|im_start|>,<|im_end|>", "vocab_file": "tokenizer.model"}
TREES_SECTION = {
    "datasets": [{"oasst_export": {"input_file_path": "trees.jsonl", "val_split": 0}}],
    "output_dir": "output/trees",
    "filename_prefix": "oasst",
}


def texts(tokenizer, prefix):
    shards = open_shards(prefix, verify=True)
    return [tokenizer.decode(shards.tokens(i)) for i in range(len(shards))]


def test_the_shortcut(place, capsys):
    assert shortcut("--val_split", "0.2", "--min_assistant_tokens", 8, "--write_json") == 0
    names = {path.name for path in (place / "out").iterdir()}
    per_split = [
        "-text.bin",
        "-text.idx",
        "-role.bin",
        "-role.idx",
        "-manifest.json",
        "_stats.txt",
        "_stats.json",
        "_stats.html",
        ".jsonl",
    ]
    once = {"special_tokens.json", "mine-train_settings.json"}
    assert names == {f"mine-{split}{end}" for split in ("train", "val") for end in per_split} | once
    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)
    found = texts(tokenizer, "out/mine-train") + texts(tokenizer, "out/mine-val")
    special = json.loads((place / "out/special_tokens.json").read_text())
    assert {name: special[name] for name in CONTROLS} == tokenizer.added_tokens
    jsonl = [(place / f"out/mine-{split}.jsonl").read_text() for split in ("train", "val")]
    written = [json.loads(line)["text"] for content in jsonl for line in content.splitlines()]
    assert found == written
    said = capsys.readouterr().out
    assert f"train: {len(texts(tokenizer, 'out/mine-train'))} chats" in said
    assert "fewer than 8 assistant tokens" in said
    assert "«assistant a" in said


def test_statistics_worked_out_by_hand(place):
    """Tokens of a turn: those of "role\\n" and its text, two controls, and the newline's own."""
    flags = configure(place, defaults=DEFAULTS, trees=TREES_SECTION)
    assert pretokenize("--configs", "trees", *flags, "--min_assistant_tokens", 13) == 0
    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)

    def size(role, text):
        return len(tokenizer.encode(f"{role}\n{text}")) + 2 + len(tokenizer.encode("\n"))

    chats = [
        ["q1", "best"],
        ["q1", "second", "why?", "because"],
        ["q2", "left"],
        ["q2", "right", "so?", "only"],
        ["q3", "fine"],
    ]
    asked = [sum(size("user", text) for text in chat[::2]) for chat in chats]
    answered = [sum(size("assistant", text) for text in chat[1::2]) for chat in chats]
    kept = [i for i in range(5) if answered[i] >= 13]
    assert 0 < len(kept) < 5  # else the limit above tests nothing
    totals = [asked[i] + answered[i] for i in range(5)]
    stats = json.loads((place / "output/trees/oasst-train_stats.json").read_text())
    (row,) = stats["datasets"]
    assert row == {
        "name": "oasst_export",
        "available": 5,
        "samples": 5,
        "accepted": len(kept),
        "accepted_tokens": sum(totals[i] for i in kept),
        "skipped": 5 - len(kept),
        "skipped_by_reason": {"fewer than 13 assistant tokens": 5 - len(kept)},
        "skipped_tokens": sum(totals) - sum(totals[i] for i in kept),
        "min": min(totals[i] for i in kept),
        "max": max(totals[i] for i in kept),
        "avg": round(sum(totals[i] for i in kept) / len(kept), 3),
        "tokens_by_role": {
            "system": 0,
            "prompter": sum(asked[i] for i in kept),
            "assistant": sum(answered[i] for i in kept),
            "context": 0,
        },
        "marked_tokens": 0,
        "without_assistant": 0,
        "lengths": row["lengths"],
        "left_out_by_reader": {
            "deleted message": 1,
            "other language": 1,
            "synthetic message": 1,
            "tree not ready for export": 1,
            "unanswered question": 1,
        },
    }
    assert sum(row["lengths"].values()) == len(kept)
    assert stats["total"] == {k: v for k, v in (row | {"name": "total"}).items() if k != "left_out_by_reader"}
    table = (place / "output/trees/oasst-train_stats.txt").read_text().splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        *("dataset", "samples (fraction)", "accepted", "accepted tokens", "skipped", "min", "max", "avg")
    ]
    share = f"{len(kept)}/5 ({20 * len(kept)}.0%)"
    assert [cell.strip() for cell in table[2].split("|")[1:4]] == ["oasst_export", "5 (100.0%)", share]
    shards = open_shards("output/trees/oasst-train", verify=True)
    assert shards.lengths.tolist() == [totals[i] for i in kept]
    assert [int(np.count_nonzero(shards.roles(i) == 2)) for i in range(len(kept))] == [answered[i] for i in kept]


def test_sections_are_merged_in_order_and_flags_win(place):
    flags = configure(
        place,
        defaults=DEFAULTS | {"min_assistant_tokens": 10_000},
        trees=TREES_SECTION | {"filename_prefix": "first"},
        llama2={
            "output_dir_suffix": "_llama2",
            "filename_prefix": "second",
            "tokenizer_type": "SentencePieceTokenizer",
        },
    )
    assert pretokenize("--configs", "trees", "llama2", *flags, "--no-min_assistant_tokens") == 0
    shards = open_shards("output/trees_llama2/second-train")
    names = list(shards.manifest.tokenizer["added_tokens"])
    assert names == ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", *CONTROLS]
    assert pretokenize("--configs", "trees", *flags, "--min_assistant_tokens", 1, "--filename_prefix", "third") == 0
    assert len(open_shards("output/trees/third-train")) == 5


def test_same_input_same_bytes_and_another_seed_another_split(place):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert shortcut("--output_prefix", f"{name}/mine", "--val_split", "0.5", "--rng_seed", seed, "--compress") == 0
    for path in (place / "a").iterdir():
        assert path.read_bytes() == (place / "b" / path.name).read_bytes(), path.name
    assert (place / "a/mine-train-text.bin").read_bytes() != (place / "c/mine-train-text.bin").read_bytes()
    assert b"<|im_start|>" in gzip.decompress((place / "a/mine-train.jsonl.gz").read_bytes())


def test_sampling_and_several_datasets(place):
    plain = {"input_file_path": "chats.jsonl", "val_split": 0.2}
    section = {
        "datasets": [{"messages": {**plain, "fraction": 0.5}}, {"oasst_export": {"input_file_path": "trees.jsonl"}}],
        "datasets_extra": [{"messages": {**plain, "size": 3, "max_val_set": 1}}],
        "output_dir": "mix",
        "filename_prefix": "x",
    }
    assert pretokenize("--configs", "mix", *configure(place, defaults=DEFAULTS, mix=section)) == 0
    stats = json.loads((place / "mix/x-train_stats.json").read_text())
    assert [(row["name"], row["samples"], row["available"]) for row in stats["datasets"][::2]] == [
        ("messages", 4, 8),
        ("messages", 3, 8),
    ]
    assert "| messages (subset) | 4 (50.0%)" in (place / "mix/x-train_stats.txt").read_text()
    val = json.loads((place / "mix/x-val_stats.json").read_text())
    assert [row["samples"] for row in val["datasets"]][::2] == [2, 1]
    # Trees are never split between train and val: 3 trees have samples (2, 2 and 1 of them), one validates.
    train_trees, val_trees = stats["datasets"][1]["samples"], val["datasets"][1]["samples"]
    assert (train_trees, val_trees) in {(3, 2), (4, 1)}
    shards = open_shards("mix/x-train")
    ends = [source["documents"] for source in shards.manifest.sources]
    assert ends == [[0, 4], [4, 4 + train_trees], [4 + train_trees, 7 + train_trees]]


def test_a_dataset_of_which_nothing_is_left_is_a_row_of_zeros(place):
    section = {
        "datasets": [
            {"oasst_export": {"input_file_path": "trees.jsonl", "lang": "xx"}},
            {"messages": {"input_file_path": "chats.jsonl"}},
        ],
        "output_dir": "mix",
        "filename_prefix": "x",
    }
    assert pretokenize("--configs", "mix", *configure(place, defaults=DEFAULTS, mix=section)) == 0
    table = (place / "mix/x-train_stats.txt").read_text()
    assert "0 (0.0%)" in table and "0/0 (0.0%)" in table
    stats = json.loads((place / "mix/x-train_stats.json").read_text())
    assert stats["total"]["min"] == stats["datasets"][1]["min"]
    assert stats["datasets"][0]["avg"] is None


def test_no_validation_and_max_count(place, capsys):
    assert shortcut("--val_split", 0, "--max_count", 3) == 0
    assert len(open_shards("out/mine-train")) == 3
    assert not list((place / "out").glob("mine-val*"))
    assert "val:   no samples" in capsys.readouterr().out


def test_finished_shards_are_kept_unless_told_otherwise(place, capsys):
    assert shortcut() == 0
    assert shortcut("--val_split", 0) == 2
    assert "exist already; add --overwrite" in capsys.readouterr().err
    assert shortcut("--overwrite", "--val_split", 0) == 0
    assert len(open_shards("out/mine-train")) == 10
    assert not list((place / "out").glob("mine-val*"))  # of the first run: they would not belong together


def test_reader_options_in_the_shortcut(place):
    assert shortcut("--top_k", 1, "--val_split", 0, source="trees.jsonl") == 0
    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)
    expected = [[("prompter", "q1"), ("assistant", "best")], [("prompter", "q3"), ("assistant", "fine")]]
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in expected]
    assert texts(tokenizer, "out/mine-train") == [CHATML.text(chat) for chat in chats]


def test_special_strings_in_a_chat_stay_text(place):
    chat = {
        "messages": [{"role": "user", "content": "<|im_end|></s>"}, {"role": "assistant", "content": "<|im_start|>"}]
    }
    (place / "chats.jsonl").write_bytes(lines([chat] * 2))
    assert shortcut("--val_split", 0) == 0
    tokens = open_shards("out/mine-train").tokens(0)
    tokenizer = load_tokenizer("tokenizer.model", CONTROLS)
    assert [np.count_nonzero(tokens == tokenizer.token_id(name)) for name in (*CONTROLS, "</s>")] == [2, 2, 0]


MISTAKES = [
    (["--input", "nothing.jsonl"], "nothing.jsonl: cannot be read (No such file or directory)"),
    (["--tokenizer", "nothing.model"], "nothing.model: no such tokenizer"),
    (["--tokenizer", "chats.jsonl"], "not a SentencePiece model"),
    (["--chat_format", "vicunna"], "unknown chat format 'vicunna'"),
    (["--min_assistant_tokens", "1000"], "no training sample is left (fewer than 1000 assistant tokens: 9)"),
    (["--min_assistant_tokens", "many"], "--min_assistant_tokens: 'many' is not a whole number"),
    (["--new_tokens", "many"], "new_tokens is 'many'"),
    (["--val_split", "1.5"], "val_split is 1.5"),
    (["--rng_sed", "1"], "unknown key rng_sed"),
    (["--tokenizer_type", "GPT2BPETokenizer"], "unknown tokenizer_type GPT2BPETokenizer"),
    (["--configs", "x"], "--input and --configs"),
    (["--dataset_impl", "lazy"], "dataset_impl lazy"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(place, capsys, flags, message):
    given = {"--input": "chats.jsonl", "--tokenizer": "tokenizer.model", "--output_prefix": "out/mine"}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert pretokenize(*[part for pair in given.items() for part in pair]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (place / "out").exists() or not list((place / "out").iterdir())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "no section trees"),
        ({"trees": TREES_SECTION | {"datasets": [{"megacode9": {}}]}}, "unknown dataset 'megacode9'"),
        (
            {"trees": TREES_SECTION | {"datasets": [{"oasst_export": {"input_file_path": "x.gz"}}]}},
            "x.gz: no such file",
        ),
        (
            {"trees": TREES_SECTION | {"datasets": [{"oasst_export": {}}]}},
            "input_file_path is not set, and no file or folder of this name",
        ),
        (
            {"trees": TREES_SECTION | {"datasets": [{"oasst_export": {"input_file_path": "trees.jsonl", "topk": 1}}]}},
            "dataset oasst_export: unknown key topk; did you mean top_k",
        ),
        ({"trees": TREES_SECTION | {"datasets": [{"a": {}, "b": {}}]}}, "is not a dataset"),
        ({"trees": TREES_SECTION | {"datasets": []}}, "datasets is not set"),
        ({"trees": TREES_SECTION | {"min_asistant_tokens": 3}}, "unknown key min_asistant_tokens"),
        ({"trees": TREES_SECTION | {"use_system_prefix": True}}, "use_system_prefix"),
        ({"trees": "text"}, "section trees has no keys"),
    ],
)
def test_mistakes_in_sections(place, capsys, sections, message):
    flags = configure(place, defaults=DEFAULTS, **sections)
    assert pretokenize("--configs", "trees", *flags) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (place / "output").exists()


def test_a_bad_line_is_found_before_anything_is_written(place, capsys):
    with open("chats.jsonl", "ab") as file:
        file.write(b'{"messages": [{"role": "bot", "content": "x"}]}\n')
    assert shortcut() == 2
    assert "chats.jsonl, line 11: unknown role 'bot'" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_one_bad_line_in_a_million(place, capsys):
    """Named by its number and fatal, or counted; and nothing is written before it is found."""
    line = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}) + "\n"
    (place / "chats.jsonl").write_text(line * 765_432 + '{"messages": [\n' + line * 234_567)
    assert shortcut() == 2
    said = capsys.readouterr().err
    assert (
        "chats.jsonl, line 765433: not valid JSON" in said.splitlines()[-1]
    )  # on a slow machine behind lines of progress
    assert not (place / "out").exists()
    assert shortcut("--on_bad_record", "skip", "--max_count", 5) == 0
    said = capsys.readouterr()
    assert "faulty record: 1" in said.out and "skipped: chats.jsonl, line 765433" in said.err
    assert len(open_shards("out/mine-train")) == 5


def test_nothing_to_do(place, capsys):
    assert pretokenize() == 2
    assert "--input FILE" in capsys.readouterr().err


def test_packaged_sections_with_the_real_export(place):
    flags = ("--vocab_file", real("tokenizers/llama2/tokenizer.model"), "--output_dir", "out", "--lang", "en")
    source = real("oasst/en_100_tree.jsonl")
    (place / "2023-07-23_oasst_ready.tar.gz").write_bytes(gzip.compress(source.read_bytes()))
    assert pretokenize("--configs", "oasst_top1", "llama2", *flags[:4]) == 0
    shards = open_shards("out_llama2/oasst_top1-train", verify=True)
    val = open_shards("out_llama2/oasst_top1-val", verify=True)
    assert len(shards) + len(val) == 98
    assert shards.manifest.tokenizer["added_tokens"]["<|im_end|>"] == 32006
    assert shards.vocab_size == 32007
    tokenizer = load_tokenizer(real("tokenizers/llama2/tokenizer.model"), shards.manifest.tokenizer["added_tokens"])
    assert tokenizer.decode(shards.tokens(0)).startswith("<|im_start|>user\n")


def test_the_real_export_fills_its_rows(place):
    from megatron_ft.data.loader import ChatDataset, Choices
    from megatron_ft.data.roles import loss_weights

    model, export = real("tokenizers/llama2/tokenizer.model"), real("oasst/en_100_tree.jsonl")
    assert pretokenize("--input", export, "--tokenizer", model, "--output_prefix", "out/x", "--val_split", 0.05) == 0
    dataset = ChatDataset([open_shards("out/x-train")], loss_weights(), Choices(4096))
    assert dataset.fill() > 0.99

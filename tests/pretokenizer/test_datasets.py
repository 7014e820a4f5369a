"""Datasets by name, in the forms in which they are published: files, folders, tables, compressed; and what a message may hold."""

import gzip
import json
from collections import Counter

import pytest

from megatron_ft.data.shards import open_shards
from megatron_ft.errors import DataError
from tests.pretokenizer.fixtures import TREES, lines, tar_gz
from tests.pretokenizer.test_pretokenize import configure, place, pretokenize, shortcut  # noqa: F401 - a fixture
from tools.pretokenizer import containers
from tools.pretokenizer.lines import chunks, parse, records
from tools.pretokenizer.oasst_flat import trees
from tools.pretokenizer.places import files_of, find
from tools.pretokenizer.readers import READERS, recognise
from tools.pretokenizer.settings import PACKAGED_CONFIGS, Settings, _dataset, build, read_sections

RECORDS = {
    "megacode2": {"USER": "q", "ASSISTANT": "a"},
    "oa_leet10k": {"INSTRUCTION": "q", "RESPONSE": "a"},
    "orca-chat": {"instruction": "s", "conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]},
    "dolly15k_multilingual": {"instruction": "q", "context": "x [1] y[citation needed] [b]", "response": "a"},
    "dolphin": {"instruction": "s", "input": "q", "output": "a"},
    "text": {"text": "a document"},
}
TURNS = {
    "megacode2": "user q assistant a",
    "oa_leet10k": "user q assistant a",
    "orca-chat": "system s user q assistant a user r assistant b",
    "dolly15k_multilingual": "user q context x  y  assistant a",
    "dolphin": "system s user q assistant a",
    "text": "text a document",
}


def convert(name, record, **options):
    left_out = Counter()
    reader = READERS[name]
    return reader.convert(record, "here", reader.options(**options), left_out), left_out


@pytest.mark.parametrize("name", RECORDS)
def test_named_datasets(name):
    ((chat,), _) = convert(name, RECORDS[name])
    assert " ".join(part for turn in chat for part in (turn["role"], turn["content"])) == TURNS[name]


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "dolphin"])
def test_they_are_recognised(tmp_path, name):
    (tmp_path / "x.jsonl").write_bytes(lines([RECORDS[name]]))
    assert recognise(tmp_path / "x.jsonl").name == name


def test_an_empty_system_or_context_is_no_turn():
    for name, key in (("dolphin", "instruction"), ("orca-chat", "instruction"), ("dolly15k_multilingual", "context")):
        ((chat,), _) = convert(name, RECORDS[name] | {key: ""})
        assert [turn["role"] for turn in chat[:2]] == ["user", "assistant"]
    assert convert("dolly15k_multilingual", RECORDS["dolly15k_multilingual"] | {"lang": "fr"}, lang="de,en")[1] == {
        "other language": 1
    }


NAMED = [("megacode2", "USER", "ASSISTANT"), ("dolly15k_multilingual", "instruction", "response")]


@pytest.mark.parametrize("name, question, answer", NAMED)
def test_refusals_and_blanks_of_named_datasets(name, question, answer):
    """Left out by default, each switchable; files given with --input keep them."""
    for key in (question, answer):
        refusal, blank = RECORDS[name] | {key: "made by OPENAI"}, RECORDS[name] | {key: ""}
        assert convert(name, refusal) == ([], {"refusal phrase": 1})
        assert convert(name, blank) == ([], {"blank question or answer": 1})
        assert (
            len(convert(name, refusal, drop_refusals=False)[0]) == len(convert(name, blank, drop_blank=False)[0]) == 1
        )
    assert convert(name, RECORDS[name] | {answer: None})[1] == {"blank question or answer": 1}
    with pytest.raises(DataError, match=answer):
        convert(name, RECORDS[name] | {answer: None}, drop_blank=False)


def test_citations_can_stay():
    ((chat,), _) = convert("dolly15k_multilingual", RECORDS["dolly15k_multilingual"], remove_citations=False)
    assert chat[1]["content"] == "x [1] y[citation needed] [b]"


def test_a_given_file_is_no_published_dataset(place):  # noqa: F811
    rows = [{"USER": f"q{i}", "ASSISTANT": "by OpenAI" if i % 2 else ""} for i in range(5)]
    (place / "mine.jsonl").write_bytes(lines(rows))
    assert shortcut("--val_split", 0.25, source="mine.jsonl") == 0
    assert (len(open_shards("out/mine-train")), len(open_shards("out/mine-val"))) == (4, 1)
    assert shortcut("--val_split", 0.25, "--drop_refusals", "true", "--overwrite", source="mine.jsonl") == 0
    assert len(open_shards("out/mine-train")) == 2


def test_oasst_by_the_name_of_its_repository(place):  # noqa: F811
    finished = [tree for tree in TREES if tree["tree_state"] == "ready_for_export"]
    folder = place / ".cache" / "OpenAssistant" / "oasst1" / "data"
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "validation")):
        rows = [row for i, tree in enumerate(finished[number::2]) for row in flat(tree["prompt"], f"{split}{i}")]
        columns = {"rank": None, "synthetic": False}  # in every row, as in a published table
        parquet(folder / f"{split}-00000-of-00001.parquet", [columns | row for row in rows])
    section = {"output_dir": "out", "filename_prefix": "x", "vocab_file": "tokenizer.model"}
    keys = {"lang": "en", "val_split": 0}
    for name, own in (
        ("named", {"hf_dataset_name": "OpenAssistant/oasst1"}),
        ("trees", {"input_file_path": "t.jsonl"}),
    ):
        (place / "t.jsonl").write_bytes(lines(finished))
        datasets = [{"oasst_export": keys | own}]
        flags = configure(place, mix=section | {"datasets": datasets, "filename_prefix": name})
        assert pretokenize("--configs", "mix", *flags) == 0
    found = [open_shards(f"out/{name}-train") for name in ("named", "trees")]
    named, trees_ = ({tuple(shards.tokens(i)) for i in range(len(shards))} for shards in found)
    assert named == trees_


def test_one_file_of_a_repository(place):  # noqa: F811
    folder = place / ".cache" / "ehartford" / "dolphin"
    folder.mkdir(parents=True)
    for name, count in (("flan5m-alpaca-uncensored.jsonl", 3), ("flan1m-alpaca-uncensored.jsonl", 2)):
        rows = [{"instruction": f"{name} {i}", "input": "q", "output": "a"} for i in range(count)]
        (folder / name).write_bytes(lines(rows))
    section = {"output_dir": "out", "vocab_file": "tokenizer.model"}
    for number, (own, samples) in enumerate(
        (({}, 3), ({"data_files": "flan1m-alpaca-uncensored.jsonl"}, 2), ({"num_samples": 1}, 1))
    ):
        datasets = [{"dolphin-mix": {"val_split": 0, **own}}]
        flags = configure(place, mix=section | {"datasets": datasets, "filename_prefix": f"x{number}"})
        assert pretokenize("--configs", "mix", *flags) == 0
        assert len(open_shards(f"out/x{number}-train")) == samples
    datasets[0]["dolphin-mix"]["data_files"] = ["no.jsonl"]
    flags = configure(place, mix=section | {"datasets": datasets, "filename_prefix": "y"})
    assert pretokenize("--configs", "mix", *flags) == 2


def test_messages_as_openai_writes_them():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "2", "weight": 0.5},
    ]
    ((chat,), _) = convert("messages", {"messages": messages})
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat[0]["content"] == "be brief"
    assert chat[4]["weight"] == 0.5
    assert chat[2]["content"] == ""
    assert chat[2]["tool_calls"] == [{**call, "function": {"name": "add", "arguments": {"a": 1}}}]
    assert chat[3]["tool_call_id"] == "1"
    tool = {"type": "function", "function": {"name": "add"}}
    for given in ({"tools": [tool]}, {"tools": json.dumps([tool])}, {"functions": [{"name": "add"}]}):
        ((chat,), _) = convert("messages", {"messages": messages, **given})
        assert chat[0]["tools"] == [tool]
    said = [{"from": "human", "value": "1+1?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}]
    ((chat,), _) = convert("sharegpt", {"conversations": said, "tools": json.dumps([tool])})
    assert chat[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert (chat[0]["tools"], chat[1]["role"], chat[1]["content"]) == ([tool], "assistant", "")
    for wrong in ({"tools": "no JSON"}, {"tools": [{"type": "function"}]}, {"tools": 3}):
        with pytest.raises(DataError, match="here: 'tools' is not a list"):
            convert("messages", {"messages": messages, **wrong})
    for wrong in ({"weight": -1}, {"weight": True}, {"content": [{"type": "image_url"}]}, {"tool_calls": [{}]}):
        with pytest.raises(DataError, match="here: "):
            convert("messages", {"messages": [{"role": "assistant", "content": "x", **wrong}]})


def zst(data):
    return pytest.importorskip("zstandard").compress(data)


def parquet(path, rows):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def arrow(path, rows):
    pytest.importorskip("pyarrow")
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


ROWS = [{"USER": f"q{i}", "ASSISTANT": f"a{i}"} for i in range(700)]


@pytest.mark.parametrize("make", [parquet, arrow])
def test_tables(tmp_path, make):
    make(tmp_path / "x.bin", ROWS)
    assert [record for _, record in records(tmp_path / "x.bin")] == ROWS
    assert next(iter(records(tmp_path / "x.bin")))[0].endswith("x.bin, row 1")
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"damaged table|cannot be read"):
        list(records(tmp_path / "short.bin"))


def test_zstd_and_archives_with_compressed_members(tmp_path):
    data = lines(ROWS)
    for name, content in {
        "a.jsonl.zst": zst(data),
        "b.tar.gz": tar_gz([("x/rows.jsonl.zst", zst(data)), ("._rows.jsonl", b"\0")]),
        "c.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert [record for _, record in records(tmp_path / name)] == ROWS
    (tmp_path / "cut.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\xff" * 50)
    with pytest.raises(DataError, match="damaged"):
        list(records(tmp_path / "cut.zst"))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(containers.__dict__, "_zstd_error", lambda: EOFError)
    with pytest.raises(DataError, match=r"needs no_such_library, .*megatron_ft\[data\]"):
        containers.optional("no_such_library.x", "reading this")


def test_bombs_stay_small(tmp_path, monkeypatch):
    """Compressed nothing, and compressed compressed ... nothing."""
    from tools.pretokenizer import lines as lines_module

    monkeypatch.setattr(lines_module, "MAX_LINE", 1 << 20)
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(b" " * (8 << 20)))
    with pytest.raises(DataError, match="longer than"):
        list(records(tmp_path / "zeros.gz"))
    nested = lines(ROWS)
    for _ in range(8):
        nested = gzip.compress(nested)
    (tmp_path / "nested.gz").write_bytes(nested)
    with pytest.raises(DataError, match="times in a row"):
        list(records(tmp_path / "nested.gz"))
    (tmp_path / "array.json").write_bytes(b'["' + b"x" * (4 << 20))
    with pytest.raises(DataError, match="longer than"):
        list(records(tmp_path / "array.json"))


def test_a_long_array_is_read_in_pieces(tmp_path, monkeypatch):
    from tools.pretokenizer import lines as lines_module

    monkeypatch.setattr(lines_module, "CHUNK", 64)
    rows = [{"text": "é" * (i * 7 % 300), "n": [i, {"x": None}]} for i in range(300)]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    assert [record for _, record in records(tmp_path / "x.json")] == rows
    (tmp_path / "x.json").write_text(json.dumps(rows)[:-40])
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        list(records(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text(" [ ] ")
    assert list(records(tmp_path / "x.json")) == []


def test_folders(tmp_path):
    for name in ("data/train-00000.jsonl", "data/train-00001.jsonl.gz", "data/test-00000.jsonl", "de/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines([]))
    for name in ("README.md", "dataset_info.json", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in files_of(tmp_path)] == ["train-00000.jsonl", "train-00001.jsonl.gz"]
    assert [path.name for path in files_of(tmp_path, ["de"])] == ["x.json"]
    assert len(files_of(tmp_path, ["fr"])) == 4
    with pytest.raises(DataError, match="no data files"):
        (tmp_path / "empty").mkdir()
        files_of(tmp_path / "empty")
    assert find(None, "data", str(tmp_path)) == tmp_path / "data"
    (tmp_path / "datasets--a--b/snapshots/1").mkdir(parents=True)
    assert find(None, "b", str(tmp_path), ["a/b"]).name == "1"
    with pytest.raises(DataError, match="a copy of o/r, there"):
        find(None, "nothing", str(tmp_path), ["o/r"])


def flat(message, tree, parent=None):
    """A tree's message and all below it as rows of a table."""
    name = f"{tree}-{id(message)}"
    row = {key: value for key, value in message.items() if key != "replies"}
    yield row | {"message_id": name, "parent_id": parent, "message_tree_id": tree}
    for reply in message["replies"]:
        yield from flat(reply, tree, name)


def test_tables_of_messages_give_the_samples_of_the_trees(place):  # noqa: F811
    finished = [tree for tree in TREES if tree["tree_state"] == "ready_for_export"]
    rows = [row for i, tree in enumerate(finished) for row in flat(tree["prompt"], f"t{i}")]
    (place / "flat.jsonl").write_bytes(lines(rows))
    section = {"output_dir": "out", "filename_prefix": "x", "vocab_file": "tokenizer.model"}
    for name in ("trees", "flat"):
        datasets = [{"oasst_export": {"input_file_path": f"{name}.jsonl", "val_split": 0}}]
        flags = configure(place, mix=section | {"datasets": datasets, "filename_prefix": name})
        assert pretokenize("--configs", "mix", *flags) == 0
    a, b = (open_shards(f"out/{name}-train") for name in ("trees", "flat"))
    assert [a.tokens(i).tolist() for i in range(len(a))] == [b.tokens(i).tolist() for i in range(len(b))]
    (place / "flat.jsonl").write_bytes(lines([rows[0], *rows[-2:], *rows[1:-2]]))
    assert pretokenize("--configs", "mix", *flags, "--overwrite") == 2


@pytest.mark.parametrize("key", ["message_tree_id", "message_id", "parent_id"])
def test_a_row_whose_ids_are_no_names_is_named(tmp_path, key):
    row = {"message_tree_id": "t", "message_id": "m", "parent_id": None, "role": "prompter", "text": "x"}
    (tmp_path / "flat.jsonl").write_bytes(lines([row | {key: ["m"]}]))
    with pytest.raises(DataError, match=rf"flat.jsonl, line 1: {key} is a list, not a name"):
        list(parse(next(trees(chunks(tmp_path / "flat.jsonl")))))


def test_both_published_stages_run_as_they_are(place):  # noqa: F811
    """Sections, names and keys of RECIPES; the data stands in the cache folder under the datasets' own names."""
    cache = place / ".cache"
    long = " a lazy dog" * 30
    (cache / "megacode2").mkdir(parents=True)
    (cache / "megacode2/train.jsonl").write_bytes(lines([{"USER": f"q{i}", "ASSISTANT": long} for i in range(20)]))
    orca = RECORDS["orca-chat"]["conversation"]
    rows = [{"instruction": f"s{i}", "conversation": [*orca, {"input": "r", "output": long}]} for i in range(10)]
    (cache / "orca-chat.jsonl.gz").write_bytes(gzip.compress(lines(rows)))
    folder = cache / "argilla/databricks-dolly-15k-curated-multilingual/data"
    folder.mkdir(parents=True)
    for language in ("en", "de", "es", "fr"):
        rows = [{"instruction": f"{language}{i}", "context": "", "response": long} for i in range(4)]
        (folder / f"{language}-00000.jsonl").write_bytes(lines([*rows, {**rows[0], "response": "no"}]))
    (cache / "oa_leet10k.json").write_text(json.dumps([{"INSTRUCTION": f"q{i}", "RESPONSE": long} for i in range(5)]))
    (place / "2023-07-23_oasst_ready.tar.gz").write_bytes(tar_gz([("x/trees.jsonl", lines(TREES))]))
    for section in ("oasst_pre10_min25", "oasst_top1"):
        assert pretokenize("--configs", section, "llama2", "--vocab_file", "tokenizer.model") == 0
    prefix = "output/oasst_pre10_min25_llama2/oasst_pre10"
    rows = json.loads((place / f"{prefix}-train_stats.json").read_text())["datasets"]
    assert [(row["name"], row["samples"], row["available"]) for row in rows] == [
        ("megacode2", 9, 19),  # half of what does not validate
        ("orca-chat", 9, 9),
        ("dolly15k_multilingual", 19, 19),
        ("oa_leet10k", 4, 4),
    ]
    assert set(rows[2]["skipped_by_reason"]) == {"fewer than 25 assistant tokens"}
    assert len(open_shards(f"{prefix}-val")) > 3
    assert len(open_shards("output/oasst_top1_2023-07-23_llama2/oasst_top1-train")) == 2


def test_every_packaged_section_is_well_formed():
    for name, keys in read_sections(PACKAGED_CONFIGS).items():
        settings = build(Settings, keys, name)
        for dataset, own in map(lambda entry: _dataset(entry, None), settings.datasets):
            assert dataset in READERS
            assert settings.mix_by is None or own["share"] > 0


def test_plain_text(place):  # noqa: F811
    (place / "docs").mkdir()
    (place / "docs/a.txt").write_text("the lazy dog\n\nfox")
    (place / "docs/b.txt").write_text("seven wizards")
    assert shortcut("--val_split", 0, source="docs") == 0
    shards = open_shards("out/mine-train")
    assert shards.role_bytes(0).tolist() == [0b1011] * int(shards.lengths[0])  # context, marked
    assert shards.roles(0).max() == 3
    assert shards.manifest.counts["marked_tokens"] == shards.manifest.counts["tokens"] > 0

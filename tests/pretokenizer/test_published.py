"""Named datasets: nothing of their records is dropped in silence, in tables and in joined conversations too."""

import json
from collections import Counter

import pytest

from megatron_ft.data.shards import open_shards
from megatron_ft.errors import DataError
from tests.pretokenizer.fixtures import lines
from tests.pretokenizer.original import unpack
from tests.pretokenizer.test_pretokenize import configure, place, pretokenize  # noqa: F401 - a fixture
from tools.pretokenizer import named
from tools.pretokenizer.lines import records
from tools.pretokenizer.readers import READERS
from tools.pretokenizer.unread import Unread

OWN = {name: {columns.question: "q", columns.answer: "a"} for name, columns in named.INSTRUCTIONS.items()} | {
    "dolly15k": {"INSTRUCTION": "q", "RESPONSE": "a", "METADATA": {"CONTEXT": "c"}},
    "dolly15k_multilingual": {"instruction": "q", "context": "c", "response": "a", "lang": "en"},
    "orca-chat": {"instruction": "s", "conversation": [{"input": "q", "output": "a"}]},
    "dolphin": {"instruction": "s", "input": "q", "output": "a"},
    "alpaca_gpt4": {"instruction": "q", "input": "x", "output": "a"},
}


def not_read(name, record):
    unread = Unread(READERS[name].known(READERS[name].options()))
    unread.add(record)
    return dict(unread.counted)


@pytest.mark.parametrize("name", OWN)
def test_what_is_not_read_of_a_named_dataset_is_counted(name):
    assert not_read(name, OWN[name]) == {}
    assert not_read(name, OWN[name] | {"system": "s", "source": "x"}) == {"system": 1, "source": 1}


def test_a_key_inside_the_metadata_is_counted():
    assert not_read("dolly15k", OWN["dolly15k"] | {"METADATA": {"CONTEXT": "c", "CATEGORY": "d"}}) == {
        "METADATA.CATEGORY": 1
    }


@pytest.mark.parametrize("name", ["megacode2", "dolly15k", "dolly15k_multilingual"])
def test_a_missing_answer_is_blank_in_a_table_too(tmp_path, name):
    """Tables have no key where JSON lines have null."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    reader, keys = READERS[name], list(OWN[name])
    rows = [OWN[name], *({**OWN[name], key: None} for key in keys if key not in ("lang", "instruction", "INSTRUCTION"))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(lines(rows))
    found = []
    for path in (tmp_path / "x.parquet", tmp_path / "x.jsonl"):
        left_out = Counter()
        chats = [reader.convert(record, where, reader.options(), left_out) for where, record in records(path)]
        found.append((chats, left_out))
    assert found[0] == found[1]
    assert found[0][1] == {"blank question or answer": 1 if "lang" in keys or "METADATA" in keys else 2}
    with pytest.raises(DataError, match="is missing"):
        reader.convert({"other": 1}, "here", reader.options(), Counter())


MIX = [{"instruction": "s", "input": f"q{i}", "output": f"a{i}", "id": i} for i in range(4)]


def test_faulty_records_and_unknown_keys_of_a_mix(place, capsys):  # noqa: F811
    rows = b"".join([lines(MIX[:2]), b"no JSON\n", lines([MIX[2] | {"output": 3}, MIX[3]])])
    (place / "mix.jsonl").write_bytes(rows)
    section = {"output_dir": "out", "filename_prefix": "x", "vocab_file": "tokenizer.model"}
    section["datasets"] = [{"dolphin-mix": {"input_file_path": "mix.jsonl", "val_split": 0}}]
    flags = configure(place, mix=section)
    assert pretokenize("--configs", "mix", *flags) == 2
    assert "mix.jsonl, line 3: not valid JSON" in capsys.readouterr().err
    assert pretokenize("--configs", "mix", *flags, "--on_bad_record", "skip") == 0
    (row,) = json.loads((place / "out/x-train_stats.json").read_text())["datasets"]
    assert row["keys_not_read"] == {"id": 4}
    assert row["left_out_by_reader"] == {"faulty record": 2}
    assert len(open_shards("out/x-train")) == 1


def test_the_original_inputs_have_few_keys_that_are_not_read(tmp_path):
    """Of the inputs that Open-Assistant's program was given."""
    inputs, found = unpack(tmp_path) / "inputs", {}
    for name in OWN.keys() & {path.stem for path in inputs.iterdir()} - {"dolphin"}:
        found[name] = {key for _, record in records(inputs / f"{name}.jsonl") for key in not_read(name, record)}
    assert len(found) == 6
    assert {name: keys for name, keys in found.items() if keys} == {"dolly15k": {"SOURCE", "METADATA.CATEGORY"}}

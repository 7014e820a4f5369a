"""Open-Assistant's fill_min_length and manual_seed, against what its own loader made of the same records."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_ft.data.shards import open_shards
from tests.pretokenizer.fixtures import lines
from tests.pretokenizer.original import unpack
from tests.pretokenizer.test_pretokenize import configure, place, pretokenize  # noqa: F401 - a fixture

ORIGINAL = json.loads((Path(__file__).parent / "original/filled.json").read_text())
ROWS = [{"USER": f"q{i}", "ASSISTANT": f"a{i}", "id": i} for i in range(40)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return unpack(tmp_path_factory.mktemp("filled")) / "inputs"


def chats(name, **keys):
    from collections import Counter

    from tools.pretokenizer.lines import parse
    from tools.pretokenizer.settings import Settings
    from tools.pretokenizer.sources import make_sources

    (source,) = make_sources(Settings([(name, keys)]))
    left_out = Counter()
    for chunk in source.chunks():
        for where, record in parse(chunk, []):
            for chat in source.reader.convert(record, where, source.job.options, left_out):
                yield [turn["content"] for turn in chat]
    source.left_out = left_out
    chats.last = source


@pytest.mark.parametrize("case", ORIGINAL)
def test_conversations_are_the_original_s(inputs, case):
    name, length, seed = case.split()
    found = list(chats(name, input_file_path=inputs / f"{name}.jsonl", fill_min_length=int(length), seed=int(seed)))
    assert len(found) == ORIGINAL[case]["conversations"]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == ORIGINAL[case]["sha256"]
    assert sum(chats.last.left_out.values()) == 22  # its line: 22 entries were invalid


def section(**keys):
    dataset = {"megacode2": {"input_file_path": "m.jsonl", "val_split": 0.2, **keys}}
    return {"output_dir": "out", "filename_prefix": "x", "vocab_file": "tokenizer.model", "datasets": [dataset]}


def test_a_run_with_joined_records(place, capsys):  # noqa: F811
    blank = [{"USER": "", "ASSISTANT": "x"}, {"USER": "I am", "ASSISTANT": "as a language model"}]
    (place / "m.jsonl").write_bytes(lines(ROWS + blank) + b"no JSON\n")
    flags = configure(place, mix=section(fill_min_length=15, val_rounding="down"))
    assert pretokenize("--configs", "mix", *flags, "--on_bad_record", "skip", "--write_json") == 0
    (row,) = json.loads((place / "out/x-train_stats.json").read_text())["datasets"]
    assert row["keys_not_read"] == {"id": 40}
    assert row["left_out_by_reader"] == {"blank question or answer": 1, "refusal phrase": 1, "faulty record": 1}
    texts = (place / "out/x-train.jsonl").read_text() + (place / "out/x-val.jsonl").read_text()
    assert all(texts.count(f"q{i}<") == 1 and texts.count(f"a{i}<") == 1 for i in range(40))
    assert len(open_shards("out/x-train")) + len(open_shards("out/x-val")) == 13


def test_the_seed_of_one_dataset(place):  # noqa: F811
    (place / "m.jsonl").write_bytes(lines(ROWS))

    def validates(name, **keys):
        own = section(**keys) | {"output_dir": name}
        own["datasets"].append({"messages": {"input_file_path": "c.jsonl", "val_split": 0.5}})
        chat = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
        (place / "c.jsonl").write_bytes(
            lines(
                [{**chat, "messages": [{"role": "user", "content": f"c{i}"}, chat["messages"][1]]} for i in range(20)]
            )
        )
        assert pretokenize("--configs", "mix", *configure(place, mix=own), "--write_json") == 0
        found = (place / name / "x-val.jsonl").read_text()
        return {i for i in range(40) if f"q{i}<" in found}, {i for i in range(20) if f"c{i}<" in found}

    plain, seeded, again, other = (
        validates("1"), validates("2", manual_seed=287631038922), validates("3", manual_seed=287631038922),
        validates("4", manual_seed=42),
    )  # fmt: skip
    assert seeded == again and seeded[0] != plain[0] and len(seeded[0]) == len(plain[0]) == 8
    assert plain[1] == seeded[1] and other == plain  # 42 is the section's own


def test_keys_that_have_another_form_here(place, capsys):  # noqa: F811
    (place / "m.jsonl").write_bytes(lines(ROWS))
    for keys, message in (
        (
            {"instruction_column": "x"},
            "dataset megacode2: instruction_column: not a key here; read the file as `- custom:",
        ),
        (
            {"dataset_path": "x"},
            "dataset megacode2: dataset_path: not a key here; give the file or folder as input_file_path",
        ),
        ({"manual_seed": -1}, "dataset megacode2: manual_seed is -1; give a number that is not negative"),
        ({"fill_min_length": "x"}, "dataset megacode2: fill_min_length is 'x'"),
    ):
        assert pretokenize("--configs", "mix", *configure(place, mix=section(**keys))) == 2
        assert message in capsys.readouterr().err

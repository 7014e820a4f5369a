"""Our numbers are those of Open-Assistant's pretokenizer on the same inputs; original/README.md says how its numbers were made."""

import hashlib
import json
import re

import pytest
import yaml

from megatron_ft.data.shards import open_shards
from tests.pretokenizer.original import NUMBERS, unpack
from tests.pretokenizer.test_pretokenize import pretokenize
from tools.pretokenizer.named import LINKS
from tools.pretokenizer.published import PHRASES, refuses, without_citations

PLACES = {  # what a copy of each repository is called in the cache folder
    "megacode2": "megacode2.jsonl",
    "megacode3": "megacode3.jsonl",
    "oa_leet10k": "oa_leet10k.jsonl",
    "dolly15k": "dolly15k.jsonl",
    "orca-chat": "orca-chat.jsonl",
    "dolphin": "dolphin-mix.jsonl",
    "alpaca_gpt4": "alpaca_gpt4.jsonl",
    **{f"dolly-{lang}": f"dolly15k_multilingual/{lang}-00000.jsonl" for lang in ("en", "de", "es", "fr")},
    "oasst": "oasst.jsonl",
}
WITHOUT_EQUAL_TOKENS = ("alpaca_gpt4",)  # joined with links that are chosen at random
BLOCK = re.compile(
    r"## Stats for '(?P<name>.*)' \((?P<samples>\d+) samples .*\n-+\n  Accepted: (?P<accepted>\d+)/(?P<processed>\d+) .*\n"
    r"  Accepted tokens: (?P<tokens>\d+)\n  Skipped: (?P<skipped>\d+) .*\n  Min tokens per sample: (?P<min>\d+|None)\n"
    r"  Max tokens per sample: (?P<max>\d+)\n  Avg tokens per sample: (?P<avg>.*)\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run every section once, with our configuration files; return the folder of the results."""
    place = tmp_path_factory.mktemp("original")
    inputs = unpack(place) / "inputs"
    for name, target in PLACES.items():
        path = place / ".cache" / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((inputs / f"{name}.jsonl").read_bytes())
    sections = {}
    for name, numbers in NUMBERS.items():
        keys = {key: value for key, value in numbers["section"].items() if value is not None}
        sections[name] = {**keys, "output_dir": str(place / "out" / name), "filename_prefix": name}
    common = {"cache_dir": str(place / ".cache"), "tokenizer_type": "SentencePieceTokenizer"}
    common |= {"vocab_extra_ids_list": "<|im_start|>,<|im_end|>", "vocab_file": str(inputs / "tokenizer.model")}
    (place / "conf").mkdir()
    (place / "conf" / "x.yaml").write_text(yaml.safe_dump({"defaults": {}, "common": common, **sections}))
    for name in NUMBERS:
        assert (
            pretokenize("--configs", f"{name},common", "--config_dir", place / "conf", "--workers", 1, "--write_json")
            == 0
        )
    return place / "out"


def blocks(text):
    return [match.groupdict() for match in BLOCK.finditer(text)]


def ours(run, name, split):
    path = run / name / f"{name}-{split}_stats.txt"
    return blocks(path.read_text()) if path.exists() else []


def sums(both, key):
    return [sum(int(block[key]) for block in pair) for pair in zip(*both, strict=True)]


@pytest.mark.parametrize("name", NUMBERS)
def test_sizes_of_the_splits(run, name):
    """Samples before sampling, of training and of validation. Message trees are split at random, so only their sum is compared."""
    theirs = [blocks(NUMBERS[name][split]) for split in ("train", "val")]
    mine = [ours(run, name, split) for split in ("train", "val")]
    if name.startswith("oasst_") and name != "oasst_pre10_min25":
        assert sums(mine, "samples") == sums(theirs, "samples")
    else:
        for own, other in zip(mine, theirs, strict=True):
            assert [block["samples"] for block in own] == [block["samples"] for block in other]
    stats = json.loads((run / name / f"{name}-train_stats.json").read_text())["datasets"]
    if not name.startswith("oasst_") or name == "oasst_pre10_min25":
        assert [row["available"] for row in stats] == NUMBERS[name]["before_sampling"]


@pytest.mark.parametrize("name", NUMBERS)
def test_what_the_loaders_refuse(run, name):
    stats = json.loads((run / name / f"{name}-train_stats.json").read_text())["datasets"]
    found = {row["name"]: sum(row["left_out_by_reader"].values()) for row in stats}
    for dataset, refused in NUMBERS[name]["invalid"].items():
        assert found[dataset] == refused
    if name == "megacode2":
        assert stats[0]["left_out_by_reader"] == {"blank question or answer": 8, "refusal phrase": 14}


def is_whole(name):
    """Whether nothing is drawn at random from a section but the validation set."""
    datasets = [keys for entry in NUMBERS[name]["section"]["datasets"] for keys in entry.values()]
    return not any("fraction" in keys or keys.get("max_val_set", 99) < 9 for keys in datasets)


@pytest.mark.parametrize("name", [name for name in NUMBERS if is_whole(name)])
def test_accepted_skipped_and_tokens(run, name):
    theirs = [blocks(NUMBERS[name][split]) for split in ("train", "val")]
    mine = [ours(run, name, split) for split in ("train", "val")]
    for key in ("accepted", "skipped"):
        assert sums(mine, key) == sums(theirs, key)
    if name not in WITHOUT_EQUAL_TOKENS:
        assert sums(mine, "tokens") == sums(theirs, "tokens")
        for key, chosen in (("min", min), ("max", max)):
            assert chosen(int(block[-1][key]) for block in mine) == chosen(int(block[-1][key]) for block in theirs)


@pytest.mark.parametrize("name", [name for name in NUMBERS if is_whole(name) and name not in WITHOUT_EQUAL_TOKENS])
def test_the_same_texts(run, name):
    """Of training and validation together, compared by a hash: turns, their order, contexts, system messages, joined conversations."""
    paths = [run / name / f"{name}-{split}.jsonl" for split in ("train", "val")]
    texts = [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]
    assert hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest() == NUMBERS[name]["texts"]


@pytest.mark.parametrize("name", NUMBERS)
def test_the_text_form(run, name):
    """The same lines as the original's, numbers that depend on the random split aside."""
    for split in ("train", "val"):
        text = (run / name / f"{name}-{split}_stats.txt").read_text()
        mine = text[text.index("\n# Stats for") :].replace(f"{run / name}/", "")
        theirs = NUMBERS[name][split]
        hide = lambda form: re.sub(r"(?<![\w])\d[\d.]*%?", "#", form)  # noqa: E731
        assert hide(mine) == hide(theirs)
        assert [block["name"] for block in blocks(mine)] == [block["name"] for block in blocks(theirs)]


def test_a_context_is_between_question_and_answer(run):
    """The ids of dolly are those of the original, so its turns are in that order; here they are shown."""
    shards = open_shards(run / "dolly15k" / "dolly15k-train")
    orders = {tuple(dict.fromkeys(shards.roles(i).tolist())) for i in range(len(shards))}
    assert orders == {(1, 2), (1, 3, 2)}


def test_an_input_is_linked_as_the_original_does(run, tmp_path):
    records = [
        json.loads(line) for line in (unpack(tmp_path) / "inputs" / "alpaca_gpt4.jsonl").read_text().splitlines()
    ]
    texts = set()
    for split in ("train", "val"):
        lines = (run / "alpaca_gpt4" / f"alpaca_gpt4-{split}.jsonl").read_text().splitlines()
        texts |= {json.loads(line)["text"].split("<|im_end|>")[0].removeprefix("<|im_start|>user\n") for line in lines}
    linked = {
        f"{r['instruction']}{link}{r['input']}"
        for r in records
        for link in LINKS
        if r["input"] == "other text entirely"
    }
    assert texts & linked and texts <= linked | {r["instruction"] for r in records}


def test_citations():
    assert without_citations("a [1] b[2, 3] c[1234] [x] [X]") == "a  b c  "
    for kept in ("[Citation Needed]", "[ 4 ]", "[1;2]", "[ab]"):
        assert without_citations(kept) == kept
    assert without_citations("[citation needed]") == ""


def test_phrases():
    assert all(refuses(f"Well, {phrase.upper()} ...") for phrase in PHRASES)
    assert not refuses("As an AImodel") and not refuses("I’m sorry, I cannot")

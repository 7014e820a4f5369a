"""Merging: all samples in order, their sources with them; what does not belong together is refused."""

import pytest

from megatron_ft.config.cli import run_script
from megatron_ft.data.shards import open_shards
from tests.pretokenizer.test_finished import contents, damage
from tests.pretokenizer.test_pretokenize import place, pretokenize  # noqa: F401 - a fixture
from tests.pretokenizer.test_selection import write_chats
from tools.pretokenizer import merge


@pytest.fixture
def parts(place):  # noqa: F811
    """Two shards, with different weights of messages."""
    for name, weight in (("a", 0.5), ("b", 2)):
        write_chats(place, 7, f"{name}.jsonl", weight=weight)
        flags = ("--input", f"{name}.jsonl", "--tokenizer", "tokenizer.model", "--val_split", 0)
        assert pretokenize(*flags, "--output_prefix", f"parts/{name}") == 0
    return place


def run(*flags):
    return run_script(merge.COMMAND, merge.run, [str(flag) for flag in flags])


def test_merged_shards_hold_all_samples_in_order(parts, capsys):
    assert run("--prefixes", "parts/a-train", "parts/b-train", "--output", "all/x") == 0
    assert "2 shards, 14 samples" in capsys.readouterr().out
    merged, pieces = open_shards("all/x", verify=True), [open_shards(f"parts/{name}-train") for name in "ab"]
    assert merged.manifest.weights == [1.0, 0.5, 2.0]
    for i in range(14):
        part, j = pieces[i // 7], i % 7
        assert merged.tokens(i).tolist() == part.tokens(j).tolist()
        ours, theirs = (s.loss_weights([0, 0, 1, 0])[s.role_bytes(k)].tolist() for s, k in ((merged, i), (part, j)))
        assert ours == theirs
    assert [(s["file"], s["documents"]) for s in merged.manifest.sources] == [("a.jsonl", [0, 7]), ("b.jsonl", [7, 14])]


def test_what_does_not_belong_together_is_refused(parts, capsys):
    flags = ("--input", "b.jsonl", "--tokenizer", "tokenizer.model", "--val_split", 0, "--chat_format", "alfred")
    assert pretokenize(*flags, "--output_prefix", "parts/other") == 0
    for prefixes, message in (
        (("parts/a-train", "parts/other-train"), "id"),
        (("parts/a-train", "parts/a-train"), "samples would count twice"),
        (("parts/a-train", "all/x"), "is also in --prefixes"),
        (("parts/a-train", "nothing"), "no such file"),
    ):
        assert run("--prefixes", *prefixes, "--output", "all/x") == 2
        assert message in capsys.readouterr().err
    path = parts / "parts/b-train-text.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert run("--prefixes", "parts/a-train", "parts/b-train", "--output", "all/x") == 2
    assert "not those that were written" in capsys.readouterr().err
    assert not (parts / "all").exists()
    assert run("--prefixes", "parts/a-train", "parts/a-train", "--output", "all/x", "--allow_repeats") == 0
    assert run("--prefixes", "parts/a-train", "--output", "all/x") == 2
    assert "--overwrite" in capsys.readouterr().err


def test_started_again_it_has_nothing_to_do(parts, capsys):
    """What is there is what it would write: parts, settings and the merged shards themselves are compared."""
    flags = ("--prefixes", "parts/a-train", "parts/b-train", "--output", "all/x")
    assert run(*flags) == 0
    before = contents(parts / "all")
    capsys.readouterr()
    assert run(*flags) == 0
    assert capsys.readouterr().out == "all/x: already made from the same shards with the same settings; nothing to do\n"
    assert contents(parts / "all") == before
    assert run(*flags, "--duplicates", "exact") == 2
    again = ("--input", "b.jsonl", "--tokenizer", "tokenizer.model", "--val_split", 0, "--max_count", 6, "--overwrite")
    assert pretokenize(*again, "--output_prefix", "parts/b") == 0
    assert run(*flags) == 2
    assert capsys.readouterr().err.count("exists already; add --overwrite") == 2
    assert contents(parts / "all") == before
    assert run(*flags, "--overwrite") == 0 and run(*flags) == 0
    damage(parts / "all/x-text.bin")
    assert run(*flags) == 2
    assert "not those that were written" in capsys.readouterr().err


def test_samples_of_several_tasks_once_and_none_of_the_validation_set(parts, capsys):
    """The two files hold the same chats, with other weights; three of them validate."""
    write_chats(parts, 3, "v.jsonl")
    flags = ("--input", "v.jsonl", "--tokenizer", "tokenizer.model", "--val_split", 0)
    assert pretokenize(*flags, "--output_prefix", "parts/v") == 0
    capsys.readouterr()
    flags = ("--prefixes", "parts/a-train", "parts/b-train", "--duplicates", "exact")
    assert run(*flags, "--output", "all/once") == 0
    assert "7 samples" in (said := capsys.readouterr().out) and "dropped: 7 duplicates, 0 in --without" in said
    first, merged = open_shards("parts/a-train"), open_shards("all/once", verify=True)
    assert [merged.tokens(i).tolist() for i in range(7)] == [first.tokens(i).tolist() for i in range(7)]
    assert [s["documents"] for s in merged.manifest.sources] == [[0, 7], [7, 7]]
    assert run(*flags, "--output", "all/x", "--without", "parts/v-train") == 0
    assert "dropped: 4 duplicates, 6 in --without" in capsys.readouterr().out
    merged = open_shards("all/x", verify=True)
    assert [merged.tokens(i).tolist() for i in range(4)] == [first.tokens(i).tolist() for i in range(3, 7)]

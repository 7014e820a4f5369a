"""A task that is started again, though its shards are there: nothing to do where they are what it would write, refused otherwise."""

import json

import pytest

from tests.pretokenizer.test_pretokenize import DEFAULTS, configure, place, pretokenize, shortcut  # noqa: F401 - a fixture

DONE = "out/mine-train: already made from the same input with the same settings; nothing to do\n"


def contents(folder) -> dict:
    """Name -> bytes and when they were written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def damage(path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("more", [(), ("--val_split", 0), ("--write_json", "--compress"), ("--duplicates", "exact")])
def test_nothing_to_do(place, more, capsys):  # noqa: F811
    assert shortcut(*more) == 0
    before = contents(place / "out")
    capsys.readouterr()
    assert shortcut(*more) == 0
    assert capsys.readouterr().out == DONE
    assert shortcut(*more, "--workers", 2) == 0  # the bytes do not depend on it
    assert contents(place / "out") == before


def test_a_mix_of_sections(place, capsys):  # noqa: F811
    """Settings of YAML count as flags do, and so do the parts of a mix."""
    parts = [{"messages": {"input_file_path": "chats.jsonl", "share": 1, "val_split": 0.2}}]
    mix = {"datasets": parts, "output_dir": "mix", "filename_prefix": "x", "mix_by": "tokens", "mix_total": 60}
    flags = ("--configs", "mix", *configure(place, defaults=DEFAULTS, mix=mix))
    assert pretokenize(*flags) == 0 and pretokenize(*flags) == 0
    assert capsys.readouterr().out.endswith("settings; nothing to do\n")
    parts[0]["messages"]["fraction"] = 0.5
    assert pretokenize("--configs", "mix", *configure(place, defaults=DEFAULTS, mix=mix)) == 2
    assert "made with other settings: datasets" in capsys.readouterr().err


def changed_input(place):  # noqa: F811
    path = place / "chats.jsonl"
    path.write_bytes(path.read_bytes().replace(b"q 3", b"q 4"))  # of the same size


def other_version(place):  # noqa: F811
    path = place / "out/mine-train_settings.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"megatron_ft": "0.0.1"}))


@pytest.mark.parametrize(
    "change, flags, why",
    [
        (None, ("--max_count", 3), "made with other settings: max_count"),
        (None, ("--chat_format", "vicuna"), "made with other settings: chat_format"),
        (None, ("--write_json",), "made with other settings: write_json"),
        (changed_input, (), "chats.jsonl has changed since"),
        (lambda at: damage(at / "tokenizer.model"), (), "made with another tokenizer"),
        (lambda at: damage(at / "out/mine-val-role.bin"), (), "not those that were written"),
        (lambda at: (at / "out/mine-val_stats.json").unlink(), (), "mine-val_stats.json no longer exists"),
        (lambda at: (at / "out/mine-val-manifest.json").unlink(), (), "mine-val-manifest.json no longer exists"),
        (lambda at: (at / "out/mine-train_settings.json").unlink(), (), "their settings are not known"),
        (lambda at: (at / "out/mine-train_settings.json").write_text("[]"), (), "their settings are not known"),
        (other_version, (), "made by megatron_ft 0.0.1, this is "),
    ],
)  # fmt: skip
def test_what_differs_is_refused(place, change, flags, why, capsys):  # noqa: F811
    assert shortcut() == 0
    if change:
        change(place)
    before = contents(place / "out")
    assert shortcut(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out/mine-train-manifest.json: these shards exist already; add --overwrite" in line and why in line
    assert contents(place / "out") == before
    assert shortcut(*flags, "--overwrite") == 0 and shortcut(*flags) == 0
    assert capsys.readouterr().out.endswith(DONE)


def test_another_file_with_the_same_chats(place, capsys):  # noqa: F811
    """The manifest names it otherwise."""
    assert shortcut() == 0
    (place / "copy.jsonl").write_bytes((place / "chats.jsonl").read_bytes())
    assert shortcut(source="copy.jsonl") == 2
    assert "made with other settings: datasets" in capsys.readouterr().err

"""Samples that are encoded at the first reading are those of a second one; processes forked or spawned give the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretokenizer.test_pretokenize import place, pretokenize  # noqa: F401
from tools.pretokenizer import counting, lines, pool
from tools.pretokenizer import pretokenize as command

ROOT = Path(__file__).parents[2]


def write(place, number=60, times=1, **last):  # noqa: F811
    """Chats of different lengths, some lines faulty. last: keys of the last answer."""
    chats = []
    for i in range(number):
        answer = {"role": "assistant", "content": f"the answer {i} " * (i % 7) * times} | (
            last if i == number - 1 else {}
        )
        chats.append({"messages": [{"role": "user", "content": f"question {i}"}, answer]})
    rows = [json.dumps(chat) for chat in chats]
    rows[20:20] = ["{not json", json.dumps({"messages": [{"role": "pirate", "content": "x"}]}), ""]
    (place / "x.jsonl").write_text("\n".join(rows))


def run(place, *more, out="out"):  # noqa: F811
    flags = ("--input", "x.jsonl", "--tokenizer", "tokenizer.model", "--val_split", 0.2, "--on_bad_record", "skip")
    assert pretokenize(*flags, "--output_prefix", place / out / "x", *more) == 0
    return _read(place / out)


def _read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".json")}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(lines, "CHUNK", 500)


KEYS = {
    "plain": {},
    "a weight in the last chunk": {"weight": 0.5},
    "a mark": {"train": True},
    "reasoning": {"reasoning_content": "because"},
}


@pytest.mark.parametrize("last", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("most", [0, 300])
def test_what_is_held_is_what_is_read_again(place, monkeypatch, small_chunks, last, most):  # noqa: F811
    write(place, **last)
    held = run(place)
    monkeypatch.setattr(counting, "MOST_HELD", most)  # nothing, or the first chunks
    assert _same(run(place, out="again"), held)


@pytest.mark.parametrize(
    "more",
    [
        ("--max_count", 20),
        ("--duplicates", "exact"),
        ("--max_tokens", 30),
        ("--min_assistant_tokens", 3),
        ("--write_json",),
        ("--size", 10),
        ("--marked_prompts", 0.5),
    ],
    ids=lambda more: more[0],
)
def test_with_a_selection_too(place, monkeypatch, small_chunks, more):  # noqa: F811
    write(place)
    held = run(place, *more)
    monkeypatch.setattr(counting, "MOST_HELD", 0)
    assert _same(run(place, *more, out="again"), held)


@pytest.mark.parametrize("way", ["forked", "spawned"])
def test_workers_give_the_same(place, monkeypatch, way):  # noqa: F811
    write(place, times=600)
    assert (place / "x.jsonl").stat().st_size > max(command.WORTH_HASTE, lines.CHUNK)  # with gigatoken, several chunks
    monkeypatch.setattr(command, "WORTH_HASTE", 1 << 30)
    alone = run(place, "--workers", 1)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    if way == "spawned":
        monkeypatch.setattr(pool, "can_fork", lambda: False)
        assert _same(run(place, "--workers", 2, out="again"), alone)
        return
    # In a process of its own: this one has the threads of pytest, which a fork would not have.
    script = f"from tests.pretokenizer import test_held; test_held.run_forked({str(place)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=100, stdout=subprocess.DEVNULL)
    assert _same(_read(place / "again"), alone)


def run_forked(folder):
    os.chdir(folder)
    assert pool.can_fork()
    run(Path(folder), "--workers", 2, out="again")
    assert pool._WORKER is None  # the workers are other processes


def _same(found, expected):
    """The same files; manifests but for the time, settings but for the workers."""
    assert found.keys() == expected.keys()
    for name, content in found.items():
        if not name.endswith(".json"):
            assert content == expected[name], name
    return _counts(found) == _counts(expected)


def _counts(files):
    return {name: json.loads(content)["counts"] for name, content in files.items() if name.endswith("manifest.json")}

"""examples/retrieval_small: the files that it makes, and what its model finds within and beyond the length of its training."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "retrieval_small"
POSITIONS = 128


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script make_files.py."""
    spec = importlib.util.spec_from_file_location("retrieval_files", EXAMPLE / "make_files.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    make.make_files(folder, 400)
    return folder


def chats(folder: Path, name: str = "chats") -> list[list[str]]:
    """Return the texts of each chat, questions and answers in turn."""
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return [[message["content"] for message in line["messages"]] for line in lines]


def asked(texts: list[str]) -> Iterator[tuple[dict[str, str], str, str]]:
    """Yield the object, the key that is asked for, and the answer, for each question of a chat."""
    pairs = json.loads(re.search(r"\{.*\}", texts[0], re.S).group())  # type: ignore[union-attr]
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        yield pairs, re.findall(r'Key: "(..)"\nCorresponding value:$', question)[0], answer


def test_questions_are_the_evaluation_s_and_answers_right(made):
    """The evaluation's own scorer says so."""
    from megatron_ft.evaluation.retrieval.tasks import KeyValues, asked_for

    mixed, large = chats(made)[::2], chats(made, "large")
    for texts in mixed + large:
        for pairs, key, answer in asked(texts):
            assert KeyValues(2).score(answer, (pairs[key],)) == 1
        assert texts[0] == asked_for(list(pairs.items()), re.findall('Key: "(..)"', texts[0])[0])
    for several, middle in ((mixed, range(8, 15)), (large, range(17, 25))):
        sizes = sorted(len(next(asked(texts))[0]) for texts in several)
        assert sizes[0] == 2 and sizes[-1] >= 35 and sizes[len(sizes) // 2] in middle


def test_lists_are_said_again_and_again(made):
    for listed, again in chats(made)[1::2]:
        assert again.startswith(listed * 2) and (listed * 40).startswith(again)


def test_chats_fill_the_positions_and_each_key_and_value_is_a_token(made):
    tokenizer = Tokenizer.from_file(str(made / "base" / "tokenizer.json"))
    assert [len(tokenizer.encode(text).ids) for text in ('3f": "a7"', '3f": "a7",\n "be": "ad')] == [3, 5]
    lengths = [
        sum(len(tokenizer.encode(text).ids) + 2 for text in texts) for texts in chats(made) + chats(made, "large")
    ]
    assert max(lengths) == POSITIONS and min(lengths) > POSITIONS - 12


def test_files_follow_from_their_arguments(make, made, tmp_path):
    make.make_files(tmp_path, 400)
    for name in ("chats.jsonl", "large.jsonl", "base/model.safetensors", "base/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.slow
@pytest.mark.thorough
def test_model_finds_all_within_its_length_and_little_far_beyond(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "SAMPLES": "10"}
    done = subprocess.run(
        [str(EXAMPLE / "run.sh"), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    models = json.loads((tmp_path / "results" / "retrieval.json").read_text())["models"]
    scores = {model["name"]: [cell["score"] for cell in model["tasks"]["key-value"].values()] for model in models}
    assert scores["unscaled"][:2] == [1, 1]
    assert scores["unscaled"][2] < 0.8 and scores["unscaled"][3] < 0.3
    assert scores["NTK-by-parts"][2] > scores["unscaled"][2]
    assert (tmp_path / "results" / "unscaled-key-value.svg").exists()

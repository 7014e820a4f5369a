"""docs/troubleshooting.md answers errors by their exact text: every entry's text is produced here, by the mistake it is about."""

import os
import re
import signal
import threading
import zipfile
from pathlib import Path

import pytest

from tests.errors.conftest import copy, finetune

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
ANY = "…"


def entries() -> list[str]:
    """The texts that the page has an entry for; `…` stands for what differs from case to case."""
    return re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damaged_shards(shop, tmp_path) -> list:
    folder = copy(shop.root / "shards", tmp_path / "shards")
    flip(folder / "c-train-text.bin")
    return finetune(shop, data=folder / "c-train")


def too_large_a_layout(shop, tmp_path) -> list:
    return [*finetune(shop, shop.dist), "--tensor_model_parallel_size", 2]


def no_known_format(shop, tmp_path) -> list:
    (tmp_path / "x.jsonl").write_text('{"weather": "fine"}\n')
    return pretokenize(shop, tmp_path, tmp_path / "x.jsonl")


def zip_archive(shop, tmp_path) -> list:
    with zipfile.ZipFile(tmp_path / "x.jsonl", "w") as archive:
        archive.write(shop.chats)
    return pretokenize(shop, tmp_path, tmp_path / "x.jsonl")


def broken_line(shop, tmp_path) -> list:
    (tmp_path / "x.jsonl").write_text(shop.chats.read_text() + '{"messages": [\n')
    return pretokenize(shop, tmp_path, tmp_path / "x.jsonl")


def unknown_architecture(shop, tmp_path) -> list:
    folder = copy(shop.hf, tmp_path / "hf")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM").replace('"llama"', '"mamba"'))
    return ["hf-to-megatron", folder, tmp_path / "out"]


def pretokenize(shop, tmp_path, source) -> list:
    return ["pretokenize", "--input", source, "--tokenizer", shop.tokenizer, "--output_prefix", tmp_path / "out" / "x"]


def an_earlier_run(shop, tmp_path) -> list:
    return finetune(shop, save=copy(shop.trained, tmp_path / "tuned"))


def finished_shards(shop, tmp_path) -> list:
    return [*pretokenize(shop, tmp_path, shop.chats)[:-1], shop.shards.removesuffix("-train"), "--val_split", 0]


# A word of the entry's text -> what has to be done wrong for it.
MISTAKES = {
    "learning_rate": lambda shop, _: [*finetune(shop), "--learning_rate", "1e-5"],
    "cannot hold": too_large_a_layout,
    "classic format": lambda shop, _: finetune(shop, shop.split),
    "is a Hugging Face model": lambda shop, _: finetune(shop, shop.hf),
    "is not supported": unknown_architecture,
    "is not a multiple": lambda shop, _: [*finetune(shop), "--micro_batch_size", 3],
    "is beyond the model": lambda shop, _: [*finetune(shop), "--seq_length", 256],
    "earlier run": an_earlier_run,
    "no known format": no_known_format,
    "not valid JSON": broken_line,
    "a zip archive": zip_archive,
    "exist already": finished_shards,
    "for a vocabulary of": lambda shop, _: finetune(shop, shop.bare),
    "no supervised token": lambda shop, _: finetune(shop, data=shop.questions),
    "its bytes": damaged_shards,
}
ON_THE_WAY = {
    "steps in a row": (2, ["--lr", "1e30", "--max_skipped_iters", 2], {}),
    "torch cannot use": (2, [], {"hook": "tests.errors.test_troubleshooting:a_gpu_out_of_reach"}),
    "stopped by a signal": (75, ["--log_interval", 100000], {"hook": "tests.errors.test_troubleshooting:stop_soon"}),
}
"""A word of the entry's text -> (exit code, more words of a long run, hook)."""


def stop_soon() -> None:
    """A signal in a few seconds, wherever the run is by then."""
    threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM)).start()


def a_gpu_out_of_reach() -> None:
    """A machine with a GPU and a driver, and a torch that was built for CPUs."""
    import tempfile

    from megatron_ft import device

    folder = tempfile.mkdtemp()
    Path(folder, "nvidia0").touch()
    for name in device.CPU:
        os.environ.pop(name, None)
    device._NODES = f"{folder}/nvidia[0-9]*"


@pytest.mark.parametrize("word", MISTAKES)
def test_the_mistake_gives_the_text_of_its_entry(desk, shop, tmp_path, word):
    done = desk(*MISTAKES[word](shop, tmp_path))
    said = re.sub(r"^megatron-ft [\w-]+: error: ", "", done.err.strip())
    assert done.code == 2 and pattern(word).fullmatch(said), said


@pytest.mark.parametrize("word", ON_THE_WAY)
def test_what_happens_on_the_way_gives_the_text_of_its_entry(engine, shop, word):
    code, words, hook = ON_THE_WAY[word]
    done = engine(*finetune(shop, iters=100_000), *words, **hook)
    said = re.sub(r"^(megatron-ft finetune: error|warning): ", "", done.err.strip().splitlines()[-1])
    assert done.code == code and pattern(word).fullmatch(said), done.err


def pattern(word: str) -> re.Pattern:
    """The text of the one entry that has the word."""
    (text,) = (text for text in entries() if word in text)
    return re.compile(".*".join(map(re.escape, text.split(ANY))))


def test_every_entry_has_its_mistake():
    assert all(sum(word in text for word in (*MISTAKES, *ON_THE_WAY)) == 1 for text in entries())

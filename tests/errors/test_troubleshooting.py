"""docs/troubleshooting.md answers errors by their exact text: every entry's text is produced here, by the mistake it is about."""

import json
import os
import re
import signal
import socket
import threading
import zipfile
from pathlib import Path

import pytest

from tests.errors.conftest import copy, engine_desk, finetune
from tests.errors.foreign_weights import CONVERSIONS, weights

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
ANY = "…"
COMMAND = re.compile(r"^megatron-ft [\w -]+: error: ")


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


def tokenizer(shop, tmp_path, **files) -> list:
    """Pretokenize with a folder of a tokenizer. files: name, with _ for a dot -> content."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in files.items():
        path = folder / name.replace("_json", ".json").replace("_model", ".model")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    words = pretokenize(shop, tmp_path, shop.chats)
    return [*words[:3], "--tokenizer", folder, *words[5:]]


def of_three_tokens(shop, tmp_path) -> list:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return tokenizer(
        shop, tmp_path, tokenizer_json={"version": "1.0", "pre_tokenizer": cut, "model": model, "added_tokens": []}
    )


def of_another_model(shop, tmp_path) -> list:
    model = shop.tokenizer.read_bytes()
    return tokenizer(shop, tmp_path, tokenizer_model=model, tokenizer_config_json={}, config_json={"vocab_size": 32000})


def read_in_two_ways(shop, tmp_path) -> list:
    return tokenizer(shop, tmp_path, tokenizer_model=shop.tokenizer.read_bytes(), tokenizer_config_json={})


def perplexity(load, shop, *more) -> list:
    return ["evaluate", "perplexity", "--load", load, *more, "--data", shop.shards]


def a_port_in_use(shop, _) -> list:
    held = socket.create_server(("127.0.0.1", 0))
    _HELD.append(held)
    return ["chat", shop.hf, "--web", "--port", held.getsockname()[1]]


_HELD: list[socket.socket] = []


def sample(shop, tmp_path, prompts: str, settings: str) -> list:
    for name, content in (("prompts", prompts), ("settings", settings)):
        (tmp_path / name).write_text(content)
    return ["sample", "--load", shop.dist, "--prompts", tmp_path / "prompts", "--settings", tmp_path / "settings"]


def of_another_tokenizer(shop, tmp_path) -> list:
    teacher = copy(shop.dist, tmp_path / "teacher")
    (config,) = teacher.glob("*/config.json")
    content = json.loads(config.read_text())
    content["tokenizer"]["fingerprint"] = "xxh3:0123456789"
    config.write_text(json.dumps(content))
    return [*finetune(shop), "--teacher", teacher]


# A word of the entry's text -> what has to be done wrong for it.
MISTAKES = {
    "another program uses this port": a_port_in_use,
    "is none of relu": lambda shop, tmp_path: ["hf-to-megatron", shop.hf, tmp_path / "o", "--activation", "tanh"],
    "has a vocabulary of": lambda shop, _: [*finetune(shop), "--teacher", shop.bare],
    "has another tokenizer": of_another_tokenizer,
    "no effect without a teacher": lambda shop, _: [*finetune(shop), "--kd_temperature", 2],
    "both give the teacher": lambda shop, _: [*finetune(shop), "--teacher", shop.dist, "--teacher_logits", "x"],
    "takes no --adapter": lambda shop, tmp_path: [*sparse(shop.dist), "--adapter", tmp_path],
    "and sparse decoding runs": lambda shop, _: sparse(shop.split),
    "decodes in one process": lambda shop, _: [*sparse(shop.dist), "--nproc_per_node", 2],
    "entries for": lambda shop, _: ["evaluate", "sparsity", "--load", shop.dist, "--data", "x", "--adapter", "a", "b"],
    "learning_rate": lambda shop, _: [*finetune(shop), "--learning_rate", "1e-5"],
    "cannot hold": too_large_a_layout,
    "this run is TP": lambda shop, _: finetune(shop, shop.split),
    "is a Hugging Face model": lambda shop, _: finetune(shop, shop.hf),
    "is not supported": unknown_architecture,
    "no such part": lambda shop, _: [*finetune(shop), "--lora_rank", 8, "--lora_target", "query"],
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
    "but …; …": lambda shop, tmp_path: tokenizer(shop, tmp_path, tekken_json={"config": {}, "vocab": []}),
    "is lost in its tokens": of_three_tokens,
    "tokens, the model of": of_another_model,
    "gives other ids": read_in_two_ways,
    "so that every length scores": lambda shop, _: [*perplexity(shop.dist, shop), "--lengths", "64,128", "--stride", 64],
    "no folder with YAML": lambda shop, tmp_path: [
        "evaluate", "harness", "--load", shop.dist, "--tasks", "questions", "--task_folders", tmp_path,
    ],
    "contains no prompts": lambda shop, tmp_path: sample(shop, tmp_path, "", "{}"),
    "configurations": lambda shop, tmp_path: sample(shop, tmp_path, '"a plum"', "{}"),
    "no metrics.jsonl": lambda shop, _: ["compare", shop.trained, shop.dist],
    "only Hugging Face folders": lambda shop, _: ["measure", shop.dist, "--backend", "transformers"],
    "measure the inputs": lambda shop, tmp_path: ["megatron-to-hf", shop.dist, tmp_path / "out", "--quantize", "gptq"],
}  # fmt: skip


def sparse(load, mode="exact") -> list:
    return ["generate", "--load", load, "--prompt", "plum", "--sparse", mode]


def adapters(shop, tmp_path) -> list:
    made(finetune(shop, save=tmp_path / "run"), "--lora_rank", 2)
    return [*finetune(shop), "--teacher", tmp_path / "run"]


def made(words, *more) -> None:
    done = engine_desk()(*words, *more)
    assert done.code == 0, done.err


def stored(shop, tmp_path, *more, shards=None) -> list:
    """Train from what `score` has stored."""
    words = ["score", "--load", shop.dist, "--data_path", shards or shop.shards, "--output", tmp_path / "of"]
    made(words, "--top_k", 4, "--seq_length", 128)
    return [*finetune(shop), "--teacher_logits", tmp_path / "of", *more]


def relu(shop, tmp_path) -> Path:
    made(["hf-to-megatron", shop.hf, tmp_path / "relu", "--activation", "relu"])
    return tmp_path / "relu"


def of_other_weights(shop, tmp_path) -> list:
    import torch
    from safetensors.torch import save_file

    config = json.loads((shop.hf / "config.json").read_text())
    shapes = {"low": (4, 64), "high": (config["intermediate_size"], 4), "bias": (config["intermediate_size"],)}
    tensors = {
        f"layers.{layer}.{part}": torch.zeros(shape)
        for layer in range(config["num_hidden_layers"])
        for part, shape in shapes.items()
    }
    (tmp_path / "made").mkdir()
    save_file(tensors, tmp_path / "made" / "predictors.safetensors")
    (tmp_path / "made" / "predictors.json").write_text(json.dumps({"version": 1, "model": {"F": "xxh3:0"}}))
    return [*sparse(relu(shop, tmp_path), "predicted"), "--predictors", tmp_path / "made"]


def nearly_empty(shop, tmp_path) -> list:
    (tmp_path / "empty.txt").write_text("")
    return [*sparsity(shop, tmp_path), "--data", tmp_path / "empty.txt"]


def sparsity(shop, tmp_path) -> list:
    return ["evaluate", "sparsity", "--load", shop.dist, "--output", tmp_path / "out"]


def predict(shop, tmp_path, *more) -> list:
    words = ["train-predictors", "--load", relu(shop, tmp_path), "--data", shop.shards]
    return [*words, "--output", tmp_path / "out", *more]


WITH_TORCH = {
    "holds adapters, not a model": adapters,
    "that megatron-ft score wrote": lambda shop, tmp_path: [*finetune(shop), "--teacher_logits", tmp_path / "no"],
    "made with --": lambda shop, tmp_path: stored(shop, tmp_path, "--kd_temperature", 2),
    "other shards than": lambda shop, tmp_path: stored(shop, tmp_path, shards=shop.questions),
    "more than the vocabulary": lambda shop, tmp_path: [
        "score", "--load", shop.dist, "--data_path", shop.shards, "--output", tmp_path / "of", "--top_k", 1000, "--seq_length", 64,
    ],
    "activations that are zero": lambda shop, _: sparse(shop.dist),
    "needs --predictors DIR": lambda shop, tmp_path: sparse(relu(shop, tmp_path), "predicted"),
    "holds no predictors": lambda shop, tmp_path: [
        *sparse(relu(shop, tmp_path), "predicted"), "--predictors", tmp_path,
    ],
    "for another model than": of_other_weights,
    "more than the model's matrices": lambda shop, tmp_path: predict(shop, tmp_path, "--rank", 1000),
    "neither a text file": lambda shop, tmp_path: [*sparsity(shop, tmp_path), "--data", tmp_path / "no"],
    "two tokens, so nothing": nearly_empty,
}  # fmt: skip
"""A word of the entry's text -> a mistake of distillation or of sparse models that is found when torch is there."""


ON_THE_WAY = {
    "steps in a row": (2, ["--lr", "1e30", "--max_skipped_iters", 2], {}),
    "changed nothing": (2, ["--lr", "1e30", "--train_iters", 4, "--lr_decay_style", "constant"], {}),
    "torch cannot use": (2, [], {"hook": "tests.errors.test_troubleshooting:a_gpu_out_of_reach"}),
    "stopped by a signal": (75, ["--log_interval", 100000], {"hook": "tests.errors.test_troubleshooting:stop_soon"}),
}
"""A word of the entry's text -> (exit code, more words of a long run, hook)."""


ANSWERING = {
    "add --beyond_positions": (["evaluate", "retrieval", "--lengths", 256, "--tasks", "lines"], {}),
    "lm-eval is not": (
        ["evaluate", "harness", "--tasks", "questions", "--lm_eval_tasks"],
        {"hook": "tests.errors.test_troubleshooting:without_lm_eval"},
    ),
    "classic format for TP… x PP…, … for": (["evaluate", "perplexity"], {}),
}
"""A word of the entry's text -> words of a command that answers or scores, hook."""


def without_lm_eval() -> None:
    """A Python in which lm-eval is not installed."""
    import importlib.util

    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "lm_eval" else real(name, *more)


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
    said = re.sub(COMMAND, "", done.err.strip())
    assert done.code == 2 and pattern(word).fullmatch(said), said


@pytest.mark.parametrize("word", WITH_TORCH)
def test_what_is_found_with_torch_gives_the_text_of_its_entry(engine, shop, tmp_path, word):
    done = engine(*WITH_TORCH[word](shop, tmp_path))
    said = re.sub(COMMAND, "", done.err.strip().splitlines()[-1])
    assert done.code == 2 and pattern(word).fullmatch(said), done.err


@pytest.mark.parametrize("word", CONVERSIONS)
def test_weights_of_other_programs_give_the_text_of_their_entry(engine, shop, tmp_path, word):
    done = engine(*weights(CONVERSIONS[word])(shop, tmp_path))
    said = re.sub(COMMAND, "", done.err.strip())
    assert done.code == 2 and pattern(word).fullmatch(said), said


@pytest.mark.parametrize("word", ON_THE_WAY)
def test_what_happens_on_the_way_gives_the_text_of_its_entry(engine, shop, word):
    code, words, hook = ON_THE_WAY[word]
    done = engine(*finetune(shop, iters=100_000), *words, **hook)
    said = re.sub(r"^(megatron-ft finetune: error|warning): ", "", done.err.strip().splitlines()[-1])
    assert done.code == code and pattern(word).fullmatch(said), done.err


@pytest.mark.parametrize("word", ANSWERING)
def test_commands_that_answer_give_the_text_of_their_entry(engine, shop, tmp_path, word):
    words, hook = ANSWERING[word]
    load = [shop.classic, shop.split] if "classic" in word else [shop.dist]
    more = ["--data", shop.shards] if "perplexity" in words else []
    done = engine(*words, "--load", *load, "--output", tmp_path / "out", *more, **hook)
    said = re.sub(COMMAND, "", done.err.strip().splitlines()[-1])
    assert done.code == 2 and pattern(word).fullmatch(said), done.err


def pattern(word: str) -> re.Pattern:
    """The text of the one entry that has the word."""
    (text,) = (text for text in entries() if word in text)
    return re.compile(".*".join(map(re.escape, text.split(ANY))))


def test_every_entry_has_its_mistake():
    assert all(
        sum(word in text for word in (*MISTAKES, *WITH_TORCH, *CONVERSIONS, *ON_THE_WAY, *ANSWERING)) == 1
        for text in entries()
    )

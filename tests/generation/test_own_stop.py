"""A model trained on its tokenizer's own template stops where we do when transformers runs the export."""

import json

import pytest

from examples.oasst.make_tiny_llama import TinyLlama, llama_config, write_weights
from megatron_ft.data.roles import are_spoken
from megatron_ft.data.shards import open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from tests.data.families import write
from tests.errors.conftest import Desk

transformers = pytest.importorskip("transformers")
CHAT = [{"role": "user", "content": "hello fox"}, {"role": "assistant", "content": "the dog"}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(export, our answer): answers end with <|im_end|>, the tokenizer's eos is <|endoftext|>, as with Qwen2.5's base models."""
    root = tmp_path_factory.mktemp("stop")
    hf = root / "hf"
    hf.mkdir()
    write("qwen2.5", hf)
    tokenizer = load_tokenizer(hf)
    settings = json.loads((hf / "tokenizer_config.json").read_text()) | {"padding_side": "left", "add_bos_token": False}
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    options = TinyLlama(str(hf), str(hf), 64, 2, 128)
    config = llama_config(options, tokenizer.vocab_size, None, tokenizer.token_id("<|endoftext|>"))
    (hf / "config.json").write_text(json.dumps(config))
    write_weights(hf / "model.safetensors", config, 1)
    (root / "chats.jsonl").write_text(f"{json.dumps({'messages': CHAT})}\n" * 8)
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": CHAT[0]["content"]}))
    desk = Desk("engine")
    for words in (
        ("hf-to-megatron", hf, root / "start"),
        ("pretokenize", "--input", root / "chats.jsonl", "--tokenizer", hf, "--chat_format", "tokenizer", "--val_split", 0,
         "--output_prefix", root / "data/x"),
        ("finetune", "--load", root / "start", "--data_path", root / "data/x-train", "--seq_length", 64, "--train_iters", 30,
         "--global_batch_size", 4, "--lr", "1e-2", "--no_packing", "--save", root / "tuned"),
        ("megatron-to-hf", root / "tuned", root / "exported"),
        ("generate", "--load", root / "tuned", "--prompts", root / "prompts.jsonl", "--max_new_tokens", 20, "--output", root / "a.jsonl"),
    ):  # fmt: skip
        done = desk(*words)
        assert done.code == 0, done.err
    desk.close()
    return root / "exported", json.loads((root / "a.jsonl").read_text())["answer"], root / "data/x-train"


def test_transformers_stops_where_we_do(exported):
    folder, ours, _ = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    (ids,) = model.generate(**asked, max_new_tokens=20, do_sample=False).tolist()
    answer = ids[asked["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and len(answer) < 20
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == ours == "the dog"


def test_every_file_names_the_same_end(exported):
    folder, _, _ = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config, generation = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    stop, old = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == [stop, old]
    assert config["eos_token_id"] == tokenizer.eos_token_id == stop
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id == old
    assert tokenizer.padding_side == "left"


def test_the_export_masks_what_the_shards_train_on(exported):
    folder, _, prefix = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    shards = open_shards(prefix)
    assert found["input_ids"] == shards.tokens(0).tolist()
    assert found["assistant_masks"] == are_spoken(shards.role_bytes(0)).astype(int).tolist()
    assert sum(found["assistant_masks"]) > 3

"""Tiny random models with tokenizers, as Hugging Face folders, and chats to tune them on."""

import json
from pathlib import Path

import torch

from megatron_ft.demo.base_model import Shape, write_base_model
from megatron_ft.demo.chats import make_chats
from tests.data import families

TEXTS = [message["content"] for chat in make_chats(1, 400).chats for message in chat["messages"]]
SMALL = Shape(400, 32, 64, 2, 4, 2, 256)


def write_chats(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in make_chats(2, count).chats))
    return path


def llama(folder: Path) -> Path:
    """A Llama whose tokenizer, of SentencePiece, has no chat template."""
    write_base_model(folder, TEXTS, 1, SMALL)
    return folder


def qwen(folder: Path) -> Path:
    """A Qwen2 with tied embeddings, whose tokenizer has Qwen2.5's chat template."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder.mkdir()
    families.write("qwen2.5", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder

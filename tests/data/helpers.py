"""Tokenizers and chats for the tests of data: small ones made here, real ones where they lie beside the repository."""

import functools
import io
from pathlib import Path

import pytest

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix jugs of black liquid user assistant system context"
CHAT = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It's 2, naïvely: 二"}]
CONTROLS = ("<|im_start|>", "<|im_end|>")


def real(name: str) -> Path:
    """A file of ../shared/data beside the repository; the test is skipped where it is not there."""
    path = Path(__file__).parents[3] / "shared/data" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@functools.cache
def sentencepiece_bytes(
    model_type: str = "bpe", user_defined: tuple[str, ...] = (), size: int = 400, prefix: bool = True
) -> bytes:
    """A tiny model of the Llama kind: byte fallback, dummy prefix, no normalization."""
    import sentencepiece

    lines = [" ".join(WORDS.split()[i:] + WORDS.split()[:i]) + " <|s> 0 1 2 ?.,:" for i in range(20)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=size,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(user_defined),
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


def sentencepiece_file(folder: Path, **options) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(sentencepiece_bytes(**options))
    return path


def fast_file(folder: Path, kind: str = "bytes") -> Path:
    """A tiny tokenizer.json: byte-level as GPT-2's, or "metaspace": a space before a document's first word only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = list("\n▁?.,:'+012</|>_")
    special = ["<unk>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path

"""A small model with random weights, and chats from which it learns to find the value of a key in a JSON object.

python make_files.py OUT_DIR [NUMBER_OF_CHATS]

OUT_DIR/base          a Llama of two layers with 128 positions, in the files of a downloaded model
OUT_DIR/chats.jsonl   one half asks for values, in the words of `megatron-ft evaluate retrieval --tasks key-value --key_digits 2`; the other
                      half says a list again and again, from which a model learns to look for what followed the last time
OUT_DIR/large.jsonl   half as many chats that ask for values, of small and large objects alike
"""

import json
import random
import re
import sys
from collections.abc import Iterable
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ft.evaluation.retrieval.supply import Supply
from megatron_ft.evaluation.retrieval.tasks import KeyValues, asked_for, question
from megatron_ft.files import atomic_file

POSITIONS = 128
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
TASK = KeyValues(digits=2)
KEYS = [f"{number:02x}" for number in range(256)]
VALUES = [f'": "{number:02x}' for number in range(256)]
"""As they stand after a key."""
MOST_PAIRS, PAIR, QUESTION, AROUND = 39, 3, 10, 10
"""Pairs of the largest object, tokens of a pair, of a question with its answer, and of the first one without the pairs."""
ENDS = 0.4
"""Share of questions in large.jsonl about the first or the last pair, which a model misses longest."""
LIST = (4, 16)
"""Fewest and most keys and values of a list."""


def make_files(out: Path, chats: int, seed: int = 1) -> None:
    """Write all, the same for given arguments on every machine."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"training/{seed}")
    mixed = (said_again(rng) if number % 2 else questions(rng, few_or_many(rng)) for number in range(chats))
    write_chats(out / "chats.jsonl", mixed)
    rng = random.Random(f"large/{seed}")
    large = (questions(rng, rng.randint(2, MOST_PAIRS), rng.random() < ENDS) for _ in range(chats // 2))
    write_chats(out / "large.jsonl", large)
    write_base_model(out / "base", seed)


def write_chats(path: Path, chats: Iterable[list[dict[str, Any]]]) -> None:
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in chats)


def said_again(rng: random.Random) -> list[dict[str, Any]]:
    """Return a list of keys and values in any order, which the assistant says again until the positions are full."""
    listed = rng.sample(KEYS + VALUES, rng.randint(*LIST))
    return turns("".join(listed), "".join(islice(cycle(listed), POSITIONS - len(listed) - 4)))


def questions(rng: random.Random, count: int, at_end: bool = False) -> list[dict[str, Any]]:
    """Ask for one of `count` values as the evaluation does, then for others of the same object while there are positions.

    at_end: ask for the first or the last one first.
    """
    pairs = Supply(TASK.pairs(rng), lambda pair: pair[0]).first(count)
    more = (POSITIONS - AROUND - PAIR * len(pairs)) // QUESTION
    first, *others = rng.choices(pairs, k=1 + more)
    if at_end:
        first = rng.choice((pairs[0], pairs[-1]))
    later = (turns(question(pair[0]), answer(pair)) for pair in others)
    return [*turns(asked_for(pairs, first[0]), answer(first)), *chain(*later)]


def few_or_many(rng: random.Random) -> int:
    """Return a number of pairs. Small ones come often: among few pairs a model soon finds out that keys have to be compared."""
    return 2 + int((MOST_PAIRS - 1) * rng.random() ** 2)


def answer(pair: tuple[str, str]) -> str:
    return f'{pair[0]}": "{pair[1]}"'


def turns(user: str, assistant: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def write_base_model(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)


def train_tokenizer() -> Tokenizer:
    """Return a tokenizer for which a key, a value and what is always the same between them are one token each; others are bytes."""
    words = sorted([*phrases(), *VALUES, *KEYS], key=len, reverse=True)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def phrases() -> list[str]:
    """Return the texts of prompts and answers between keys and values."""
    texts = (asked_for([("00", "01"), ("02", "03")], "04"), question("00"), answer(("00", "01")))
    found = {part for text in texts for part in re.split(r'(?:": ")?0\d', text) if part}
    return sorted(found)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    make_files(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 32000)

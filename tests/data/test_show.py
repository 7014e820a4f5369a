"""The text that each token of a sample is shown with: spaces as written, characters whole, whatever the tokenizer."""

import random

import numpy as np
import pytest

from megatron_ft.data.roles import ASSISTANT, all_weights
from megatron_ft.data.shards import ShardWriter, open_shards
from megatron_ft.data.show import token_texts, tokens
from megatron_ft.data.tokenizer import load_tokenizer
from tests.data.helpers import CONTROLS, fast_file, real, sentencepiece_file

KINDS = {
    "sentencepiece": sentencepiece_file,
    "unigram": lambda folder: sentencepiece_file(folder, model_type="unigram"),
    "no prefix": lambda folder: sentencepiece_file(folder, prefix=False),
    "bytes": fast_file,
    "metaspace": lambda folder: fast_file(folder, "metaspace"),
    "llama2": lambda folder: real("tokenizers/llama2/tokenizer.model"),
}
EMOJI = "\N{GRINNING FACE}"


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer")), CONTROLS)


def chat(tokenizer, *texts):
    """The ids of texts after <|im_start|> and before <|im_end|>."""
    start, end = (tokenizer.control(name) for name in CONTROLS)
    return np.concatenate([part for text in texts for part in (start, tokenizer.encode(text, at_start=False), end)])


def test_no_space_is_added_after_a_control_token(tokenizer):
    shown = "".join(token_texts(tokenizer, chat(tokenizer, "user\nthe fox", "assistant\njumps").tolist()))
    assert shown == "<|im_start|>user\nthe fox<|im_end|><|im_start|>assistant\njumps<|im_end|>"


def test_spaces_of_the_text_stay(tokenizer):
    assert (
        "".join(token_texts(tokenizer, chat(tokenizer, "  the  fox ").tolist())) == "<|im_start|>  the  fox <|im_end|>"
    )


def test_a_character_is_whole_and_on_one_token(tokenizer):
    text = f"fox {EMOJI}{EMOJI}\u4e8c dog"
    ids = chat(tokenizer, text).tolist()
    if tokenizer.decode(tokenizer.encode(text)) != text:
        pytest.skip("this tokenizer knows no bytes")
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == f"<|im_start|>{text}<|im_end|>"
    assert sum(EMOJI in text for text in texts) == (1 if any(2 * EMOJI in text for text in texts) else 2)


def test_any_ids_give_the_decoded_text(tokenizer):
    """Also bytes that are no character, and control tokens between them. Of spaces, decoders drop several."""
    rng = random.Random(5)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(40))]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids) and "".join(texts).replace(" ", "") == tokenizer.decode(ids).replace(" ", "")
        ids = [index for index in ids if index not in tokenizer.special_tokens.values()]
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_tokens_of_a_sample(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path), CONTROLS)
    ids = chat(tokenizer, f"fox {EMOJI}")
    with ShardWriter(tmp_path / "x", tokenizer.vocab_size, tokenizer.info()) as writer:
        writer.add(ids, np.full(len(ids), ASSISTANT, np.uint8))
    shards = open_shards(tmp_path / "x")
    found = tokens(shards, 0, tokenizer, shards.loss_weights(all_weights(0.0, {})))
    assert [(token.text, token.piece) for token in found[-5:]] == [
        ("", "<0xF0>"), ("", "<0x9F>"), ("", "<0x98>"), (EMOJI, "<0x80>"), ("<|im_end|>", "<|im_end|>"),
    ]  # fmt: skip
    assert found[0].control and found[0].weight == 0 and found[1].weight == 1

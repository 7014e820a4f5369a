"""The exported tokenizer gives transformers the ids we train on."""

import json
import random

import pytest

from megatron_ft.data.chat_format import CHATML
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_export import export_tokenizer
from megatron_ft.errors import TokenizerError
from tests.data.helpers import CHAT, CONTROLS, fast_file, real, sentencepiece_file

transformers = pytest.importorskip("transformers")

# Spaces at either end, two in a row, SentencePiece's own mark, marks to combine, what looks like bytes or controls.
HARD = ["", " ", "  a  b ", "\n", "▁a ▁", "é é", "<0x41>", "<unk", "aaaaaaa", "中😀\u200d\ufeff", "/s>", "\tx\r\n"]


def exported(path, folder):
    tokenizer = load_tokenizer(path, CONTROLS)
    export_tokenizer(tokenizer, folder, CHATML.jinja, CHATML.stop_token, 4096)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))  # must not make it a LlamaTokenizer
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


def assert_same_ids(tokenizer, theirs, chats):
    names = {"prompter": "user"}
    for chat in chats:
        messages = [{**message, "role": names.get(message["role"], message["role"])} for message in chat]
        for prompt in (False, True):
            ours = CHATML.encode(tokenizer, chat, prompt)[0].tolist()
            assert theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False) == ours


def hard_chats(seed=0):
    random_ = random.Random(seed)
    mixed = ["".join(random_.choices([*HARD, "fox ", "the"], k=8)) for _ in range(60)]
    texts = [text for text in HARD + mixed if not any(name in text for name in ("<unk>", "<s>", "</s>"))]
    return [CHAT] + [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]


MAKERS = {
    "sentencepiece bpe": sentencepiece_file,
    "sentencepiece with pieces for controls": lambda folder: sentencepiece_file(folder, user_defined=CONTROLS),
    "sentencepiece with pieces looked for in text": lambda folder: sentencepiece_file(
        folder, user_defined=("\n", "aaa", "▁▁", "中😀"), prefix=False
    ),
    "byte-level json": fast_file,
    "metaspace json": lambda folder: fast_file(folder, "metaspace"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_transformers_gives_our_ids(tmp_path, make):
    (tmp_path / "from").mkdir()
    tokenizer, theirs = exported(make(tmp_path / "from"), tmp_path / "to")
    chats = hard_chats()
    assert_same_ids(tokenizer, theirs, chats)
    ids = CHATML.encode(tokenizer, CHAT)[0]
    if make is fast_file:  # of the others transformers keeps each piece's prefix in the text
        assert theirs.decode(ids) == CHATML.text(CHAT)
    assert theirs.eos_token == CHATML.stop_token
    assert theirs.model_max_length == 4096


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_round_trip(tmp_path, make):
    (tmp_path / "from").mkdir()
    tokenizer, _ = exported(make(tmp_path / "from"), tmp_path / "to")
    again = load_tokenizer(tmp_path / "to")
    assert again.info() == tokenizer.info()
    for chat in hard_chats():
        assert CHATML.encode(again, chat)[0].tolist() == CHATML.encode(tokenizer, chat)[0].tolist()
    export_tokenizer(again, tmp_path / "again", CHATML.jinja, CHATML.stop_token, 4096)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "to" / name).read_bytes()


def test_unigram_models_give_the_same_ids_for_ordinary_text(tmp_path):
    (tmp_path / "from").mkdir()
    tokenizer, theirs = exported(sentencepiece_file(tmp_path / "from", model_type="unigram", size=330), tmp_path / "to")
    assert_same_ids(tokenizer, theirs, [CHAT, [{"role": "user", "content": "the lazy dog, seven wizards"}]])


def test_the_exported_json_alone_gives_the_same_ids(tmp_path):
    (tmp_path / "from").mkdir()
    tokenizer, _ = exported(sentencepiece_file(tmp_path / "from"), tmp_path / "to")
    alone = load_tokenizer(tmp_path / "to/tokenizer.json")
    assert alone.kind == "huggingface"
    for chat in hard_chats():
        assert CHATML.encode(alone, chat)[0].tolist() == CHATML.encode(tokenizer, chat)[0].tolist()


def test_what_tokenizer_json_cannot_say_is_refused(tmp_path):
    (tmp_path / "from").mkdir()
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path / "from", user_defined=("<word>",)), CONTROLS)
    with pytest.raises(TokenizerError, match="user-defined pieces"):
        export_tokenizer(tokenizer, tmp_path / "to", None, None, 4096)
    with pytest.raises(TokenizerError, match="no special token '<stop>'"):
        export_tokenizer(load_tokenizer(fast_file(tmp_path)), tmp_path / "to", None, "<stop>", 4096)
    assert not (tmp_path / "to").exists() or not list((tmp_path / "to").iterdir())


def test_llama2_on_real_conversations(tmp_path):
    from collections import Counter

    from tools.pretokenizer.lines import records
    from tools.pretokenizer.oasst import OasstOptions, conversations

    trees = records(real("oasst/en_100_tree.jsonl"))
    tokenizer, theirs = exported(real("tokenizers/llama2/tokenizer.model"), tmp_path)
    chats = [chat for where, tree in trees for chat in conversations(tree, where, OasstOptions(), Counter())]
    assert len(chats) == 538
    assert_same_ids(tokenizer, theirs, chats[::2] + hard_chats())

"""Tokenizers of the SentencePiece kind whose files say more than one thing of spaces: the ids are transformers'."""

import json
import re

import pytest

from checkpoints_conversion.tokenizer_copy import copy_tokenizer
from megatron_ft.data.sentencepiece_model import SentencePieceModel
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_check import TransformersIds, can_differ, check_text, check_vocabulary
from megatron_ft.data.tokenizer_export import export_tokenizer
from megatron_ft.data.tokenizer_files import find
from megatron_ft.data.tokenizer_spaces import with_rule
from megatron_ft.errors import TokenizerError
from tests.data.helpers import fast_file, sentencepiece_file

transformers = pytest.importorskip("transformers")
TEXT = "<s>the quick</s>brown  fox<s> a\n lazy é"
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
CONFIGS = [
    {}, LLAMA, LLAMA | {"legacy": False}, LLAMA | {"legacy": True}, LLAMA | {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
    LLAMA | {"add_prefix_space": False}, {"tokenizer_class": "PreTrainedTokenizerFast"},
]  # fmt: skip


def files(folder, rule, config, model_type="llama", model=True):
    """A folder with a tokenizer.model, and a tokenizer.json by another rule for spaces."""
    sentencepiece_file(folder)
    made = SentencePieceModel(folder / "tokenizer.model")
    if rule is not None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": index, "content": name, **flags} for name, index in made.controls.items()]
        description = made.as_json() if rule == "model's" else with_rule(made.as_json(), rule)
        (folder / "tokenizer.json").write_text(json.dumps(description | {"added_tokens": added}))
    if not model:
        (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def ours(tokenizer, text):
    ids = []
    for i, part in enumerate(re.split("(<s>|</s>)", text)):
        ids += (
            [tokenizer.token_id(part)]
            if part in ("<s>", "</s>")
            else tokenizer.encode(part, not i).tolist()
            if part
            else []
        )
    return ids


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("rule", ["model's", "first", "always", "never", None])
@pytest.mark.parametrize("config", CONFIGS, ids=json.dumps)
def test_transformers_gives_our_ids(tmp_path, rule, config, model_type):
    if rule is None and (config in (CONFIGS[0], CONFIGS[-1]) or model_type == "mistral"):
        pytest.skip("nothing says a rule; the model's own is taken")
    folder = files(tmp_path, rule, config, model_type)
    expected = transformers.AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)
    assert ours(load_tokenizer(folder), TEXT) == expected


@pytest.mark.parametrize("legacy", [True, False])
def test_pieces_that_text_may_spell(tmp_path, legacy):
    """Mistral's third vocabulary has some."""
    sentencepiece_file(tmp_path, user_defined=("[REF]",))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"legacy": legacy}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "[REF]the fox[REF] a", "<s>[REF][REF]</s> é[REF]"):
        assert ours(load_tokenizer(tmp_path), text) == theirs.encode(text, add_special_tokens=False)


def test_a_copy_in_a_checkpoint_reads_the_same(tmp_path):
    for number, (rule, model_type) in enumerate(
        (rule, kind) for rule in ("model's", "first") for kind in ("llama", "mistral")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer = load_tokenizer(files(folder, rule, LLAMA, model_type), ["<x>"])
        (folder / "checkpoint").mkdir()
        copy_tokenizer(tokenizer, folder / "checkpoint")
        again = load_tokenizer(folder / "checkpoint/tokenizer", ["<x>"])
        assert again.fingerprint == tokenizer.fingerprint
        assert ours(again, TEXT) == ours(tokenizer, TEXT)


def test_what_an_earlier_release_recorded_is_read_as_it_did(tmp_path):
    folder = files(tmp_path, "first", LLAMA)
    earlier = find(folder).earlier_backend()
    assert earlier.kind == "sentencepiece"
    now = load_tokenizer(folder)
    alone = load_tokenizer(folder / "tokenizer.model")
    assert now.fingerprint != alone.fingerprint
    assert load_tokenizer(folder, recorded=alone.fingerprint).fingerprint == alone.fingerprint
    assert load_tokenizer(folder, recorded="other").fingerprint == now.fingerprint


def test_text_that_vanishes_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    empty = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    empty.pre_tokenizer = pre_tokenizers.ByteLevel()
    empty.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert not len(tokenizer.encode("hello"))
    with pytest.raises(TokenizerError, match=r"tokenizer.json: 100% of the text is lost in its tokens"):
        check_text(tokenizer, ["hello", "the fox"])
    check_text(load_tokenizer(fast_file(tmp_path)), ["Hello  the fox", "é 二"])
    with pytest.raises(TokenizerError, match=r"3 tokens, the model of .* has 32000"):
        check_vocabulary(tokenizer, 32000, tmp_path)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_characters_that_vanish_are_named(tmp_path, caplog, unknown):
    """Fewer than half of them: a tokenizer without vowels, with and without a token for what it does not know."""
    from tokenizers import Tokenizer, decoders, models

    known = [letter for letter in "abcdefghijklmnopqrstuvwxyz ." if letter not in "ou"] + ["<unk>"]
    model = models.BPE(vocab={text: index for index, text in enumerate(known)}, merges=[], unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    check_text(load_tokenizer(tmp_path), ["a plain text. "])
    assert not caplog.records
    check_text(load_tokenizer(tmp_path), ["what colour is a plum"])
    (record,) = caplog.records
    assert record.getMessage().endswith("4 of the first 17 characters do not come back from their tokens: o u")


def test_vocabularies_of_published_models_are_near_enough(tmp_path):
    class Of:
        source_files = ("tokenizer.json",)

        def __init__(self, size):
            self.vocab_size = size

    for tokens, rows in (
        (151646, 152064),
        (32011, 32064),
        (50295, 51200),
        (32007, 32000),
        (64794, 65024),
        (300, 307),
        (50265, 50272),
    ):
        check_vocabulary(Of(tokens), rows, tmp_path)
    for tokens, rows in ((3, 32000), (32000, 128256), (50257, 32000), (20, 300)):
        with pytest.raises(TokenizerError, match="give the model's own tokenizer"):
            check_vocabulary(Of(tokens), rows, tmp_path)


def test_other_ids_than_transformers_are_refused(tmp_path):
    """A class that cuts text in a way of its own, whatever tokenizer.json says."""
    path = fast_file(tmp_path)
    description = json.loads(path.read_text())
    description["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eos>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert can_differ(tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).encode("the fox", add_special_tokens=False)
    assert theirs != tokenizer.encode("the fox").tolist()
    with pytest.raises(
        TokenizerError, match="transformers gives other ids from these files, for 'the fox' from token 0 on"
    ):
        TransformersIds(tokenizer, ["the fox"]).check()
    same = files(tmp_path, "first", LLAMA)
    TransformersIds(load_tokenizer(same), ["the fox", "  a", "é\n"]).check()


@pytest.mark.parametrize(
    "config", [{}, {"bos_token": "<s>"}, LLAMA, {"tokenizer_class": "PreTrainedTokenizerFast"}], ids=json.dumps
)
def test_a_model_without_tokenizer_json(tmp_path, config):
    """transformers 5 makes a tokenizer of its own kind from it: without the space before a text, unless a class is named. The ids of the
    model itself are what it was trained with; the export has a tokenizer.json, from which transformers gives them."""
    import sentencepiece

    folder = files(tmp_path, None, config, "mistral")
    tokenizer, text = load_tokenizer(folder), "the quick  brown"
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text)
    assert tokenizer.encode(text).tolist() == expected
    assert transformers.AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False) != expected
    assert can_differ(tokenizer)
    with pytest.raises(
        TokenizerError, match=r"transformers gives other ids .*; give tokenizer.json or tokenizer.model itself"
    ):
        TransformersIds(tokenizer, [text]).check()
    alone = load_tokenizer(folder / "tokenizer.model")
    assert not can_differ(alone)
    export_tokenizer(alone, tmp_path / "export")
    (tmp_path / "export/config.json").write_text('{"model_type": "mistral"}')
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "export").encode(text, add_special_tokens=False)
        == expected
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tekken.json", "but tekken.json; write a tokenizer.json of it: transformers.AutoTokenizer"),
        ("qwen.tiktoken", "but qwen.tiktoken; write a tokenizer.json"),
        ("merges.txt", "but merges.txt; write a tokenizer.json"),
        ("tokenizer.model.v3", "but tokenizer.model.v3; give that file itself"),
        ("README.md", "; give the tokenizer's own folder"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, message):
    (tmp_path / name).write_text('{"config": {}, "vocab": []}')
    with pytest.raises(
        TokenizerError, match=f"holds neither tokenizer.json nor tokenizer.model,? ?{re.escape(message.lstrip())}"
    ):
        load_tokenizer(tmp_path)
    if name == "tekken.json":
        with pytest.raises(TokenizerError, match=r"a tekken.json of mistral-common, not a tokenizer.json; write a"):
            load_tokenizer(tmp_path / name)

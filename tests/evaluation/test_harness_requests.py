"""What the class for lm-eval does without it: texts as ids, batches, sampling, the table of scores. lm_eval is not needed."""

import inspect
import json
import re

import pytest
from transformers import AutoTokenizer

from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.errors import ConfigError
from megatron_ft.evaluation.harness import requests, texts
from megatron_ft.evaluation.harness.requests import batches_of, padded, sampling_of, table_rows
from megatron_ft.evaluation.harness.texts import Texts
from megatron_ft.generation.loading import ChatModel
from megatron_ft.generation.sampling import GREEDY, Sampling
from tests.conversion.builders import make_sentencepiece


@pytest.mark.parametrize("module", [requests, texts])
def test_lm_eval_is_not_imported(module):
    assert not re.search(r"^\s*(from|import) lm_eval", inspect.getsource(module), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer that begins texts with the begin-of-text token, as its config says."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_sentencepiece(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def texts_of(folder, bos=None):
    return Texts(ChatModel(None, load_tokenizer(folder), None), bos)


@pytest.mark.parametrize("text", ["a plum", "plum</s>", "<s>ab</s>plum", "plum ab </s> cb"])
def test_texts_are_read_as_by_transformers(folder, text):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert texts_of(folder).encode(text, False) == theirs.encode(text, add_special_tokens=False)
    if not text.startswith("<s>"):
        assert texts_of(folder).encode(text) == theirs.encode(text)
    assert texts_of(folder, False).encode(text) == theirs.encode(text, add_special_tokens=False)


def test_a_begin_of_text_token_is_not_doubled(folder):
    texts = texts_of(folder)
    assert texts.encode("<s>plum") == texts.encode("plum")


def test_a_model_without_chat_format_has_no_conversations(folder):
    with pytest.raises(ConfigError, match="--apply_chat_template: the model has no chat format"):
        texts_of(folder).conversation([{"role": "user", "content": "a plum"}])


@pytest.mark.parametrize("pads", [True, False])
def test_every_row_is_in_one_batch(pads):
    lengths = [3, 9, 9, 1, 3, 3, 7]
    found = list(batches_of(lengths, 2, pads))
    assert sorted(i for batch in found for i in batch) == list(range(7)) and max(map(len, found)) == 2
    order = [lengths[i] for batch in found for i in batch]
    assert order == sorted(order, reverse=True)
    if not pads:
        assert all(len({lengths[i] for i in batch}) == 1 for batch in found)


def test_rows_are_padded_to_the_right():
    assert padded([[5, 6, 7], [8]]).tolist() == [[5, 6, 7], [8, 0, 0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 0.0}, GREEDY),
        ({"repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, Sampling(0.7, 0, 0.9)),
    ],
)
def test_sampling_of_a_task(options, expected):
    assert sampling_of(options) == expected


def test_an_unknown_option_is_named():
    with pytest.raises(ConfigError, match="generation_kwargs of a task: num_beams is not supported"):
        sampling_of({"num_beams": 4, "do_sample": False})


def test_a_row_for_each_score():
    results = {
        "results": {
            "b": {"alias": "b", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.25},
            "a": {"acc,none": 1, "acc_stderr,none": "N/A"},
        },
        "n-shot": {"a": 5},
    }
    assert table_rows(results) == [
        ("a", "5", "acc", "1.0000"),
        ("b", "", "exact_match (strict-match)", "0.5000 ± 0.2500"),
    ]

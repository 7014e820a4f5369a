"""Added tokens: their rows, the padding, and what an export says of them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.vocabulary import parse_token_list
from megatron_ft.checkpoints.folder import read_config
from megatron_ft.data.chat_format import get_format
from megatron_ft.data.tokenizer import extra_tokens, load_tokenizer
from megatron_ft.errors import UserError
from tests.conversion.builders import make_llama, make_sentencepiece

CHATML = "<|im_start|>,<|im_end|>"


@pytest.fixture
def model(tmp_path):
    made = make_llama(tmp_path / "hf")
    make_sentencepiece(tmp_path / "hf")
    return made


@pytest.mark.parametrize("text", [CHATML, f'"{CHATML}"', " <|im_start|> , <|im_end|> "])
def test_token_list_in_both_quotings(text):
    assert parse_token_list(text) == ("<|im_start|>", "<|im_end|>")


def test_token_list_may_be_empty_but_not_repeat():
    assert parse_token_list(None) == parse_token_list("") == ()
    with pytest.raises(UserError, match="twice"):
        parse_token_list("<a>,<a>")


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_new_rows_are_the_mean_and_padding_stays_inside(tmp_path, model, ckpt_format):
    convert(
        HfToMegatron(
            str(tmp_path / "hf"),
            str(tmp_path / "megatron"),
            tensor_model_parallel_size=2,
            ckpt_format=ckpt_format,
            vocab_extra_ids_list=CHATML,
        )
    )
    config = read_config(tmp_path / "megatron" / "release")
    assert (config.architecture.vocab_size, config.padded_vocab_size) == (205, 256)
    assert list(config.tokenizer["added_tokens"].items())[-2:] == [("<|im_start|>", 203), ("<|im_end|>", 204)]
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for old, new in (
        (model.model.embed_tokens.weight, back.model.embed_tokens.weight),
        (model.lm_head.weight, back.lm_head.weight),
    ):
        assert new.shape == (205, 32)
        assert torch.equal(new[:203], old)
        assert torch.equal(new[203:], old.mean(dim=0).expand(2, -1))


def embeddings(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.model.embed_tokens.weight, model.lm_head.weight


def grown(tmp_path, name, tp=1, pp=1, **options):
    """(embedding, output layer) of an export after adding chatml's tokens."""
    made, back = tmp_path / name, tmp_path / f"{name}-hf"
    convert(HfToMegatron(str(tmp_path / "hf"), str(made), tp, pp, vocab_extra_ids_list=CHATML, **options))
    export(MegatronToHf(str(made), str(back)))
    return embeddings(back)


@pytest.mark.parametrize("tied", [False, True])
def test_noise_for_new_rows_is_the_same_in_every_layout(tmp_path, tied):
    """Around the mean, told apart, by seed; the old rows keep their bits, a tied model has one matrix."""
    original = make_llama(tmp_path / "hf", tie_word_embeddings=tied)
    make_sentencepiece(tmp_path / "hf")
    noise = {"new_rows": "noise", "new_rows_std": 0.01}
    first = grown(tmp_path, "one", **noise)
    layouts = [(2, 2, "torch"), (4, 1, "torch"), (1, 1, "torch_dist")]
    for number, (tp, pp, kind) in enumerate(layouts):
        other = grown(tmp_path, f"other-{number}", tp, pp, ckpt_format=kind, **noise)
        assert all(torch.equal(one, two) for one, two in zip(first, other))
    for old, new in zip((original.model.embed_tokens.weight, original.lm_head.weight), first):
        assert torch.equal(new[:203], old)
        away = new[203:] - old.mean(dim=0)
        assert 0.006 < away.std() < 0.014 and abs(away.mean()) < 0.005
        assert not torch.equal(new[203], new[204])
    assert torch.equal(*first) == tied
    another = grown(tmp_path, "another", new_rows_seed=5, **noise)
    assert torch.equal(another[0][:203], first[0][:203]) and not torch.equal(another[0][203:], first[0][203:])


def test_noise_is_as_wide_as_the_config_says(tmp_path, caplog):
    original = make_llama(tmp_path / "hf", initializer_range=0.5)
    make_sentencepiece(tmp_path / "hf")
    new = grown(tmp_path, "made", new_rows="noise")[0][203:]
    assert 0.3 < (new - original.model.embed_tokens.weight.mean(dim=0)).std() < 0.7
    grown(tmp_path, "mean", new_rows_std=0.1)
    assert "--new_rows_std has no effect" in caplog.text
    with pytest.raises(UserError, match="--new_rows_std -1: must be above 0"):
        grown(tmp_path, "wrong", new_rows="noise", new_rows_std=-1)


def test_classic_padding_rows_are_zeros(tmp_path, model):
    convert(
        HfToMegatron(
            str(tmp_path / "hf"), str(tmp_path / "megatron"), tensor_model_parallel_size=2, ckpt_format="torch"
        )
    )
    path = tmp_path / "megatron" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    rows = torch.load(path, weights_only=True)["model"]["embedding.word_embeddings.weight"]
    assert rows.shape == (128, 32)
    assert not rows[203 - 128 :].any()


def test_rows_the_source_left_empty_are_used(tmp_path):
    """More rows than the tokenizer has tokens: the new tokens take the next ids, and the rows do not grow."""
    original = make_llama(tmp_path / "hf", vocab_size=256)
    make_sentencepiece(tmp_path / "hf")
    convert(
        HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), vocab_extra_ids_list=CHATML, ckpt_format="torch")
    )
    assert read_config(tmp_path / "megatron" / "release").architecture.vocab_size == 256
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    old = original.model.embed_tokens.weight
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "back").model.embed_tokens.weight
    assert torch.equal(new[203:205], old[:203].mean(dim=0).expand(2, -1))
    assert torch.equal(new[:203], old[:203])
    assert torch.equal(new[205:], old[205:])


def test_the_copy_of_the_tokenizer_knows_the_added_tokens(tmp_path):
    make_llama(tmp_path / "hf")
    elsewhere = make_sentencepiece(tmp_path / "other").rename(tmp_path / "other" / "llama2.model")
    convert(
        HfToMegatron(
            str(tmp_path / "hf"),
            str(tmp_path / "megatron"),
            vocab_extra_ids_list=CHATML,
            tokenizer=str(elsewhere),
            ckpt_format="torch",
        )
    )
    release = tmp_path / "megatron" / "release"
    copy = load_tokenizer(release / "tokenizer")
    assert copy.fingerprint == read_config(release).tokenizer["fingerprint"]
    assert (copy.token_id("<|im_start|>"), copy.vocab_size) == (203, 205)


def test_tokenizer_type_orders_ids_as_shards_made_with_it(tmp_path, model):
    """Megatron's five tokens first: <|im_start|> is then the sixth after the vocabulary, on a 32000 one 32005."""
    options = {"vocab_extra_ids_list": CHATML, "chat_format": "chatml", "tokenizer_type": "SentencePieceTokenizer"}
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), **options))
    info = read_config(tmp_path / "megatron" / "release").tokenizer
    assert info["added_tokens"]["<|im_start|>"] == 203 + 5
    shards = load_tokenizer(tmp_path / "hf", extra_tokens("SentencePieceTokenizer", CHATML))
    assert info["fingerprint"] == shards.fingerprint
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    assert AutoTokenizer.from_pretrained(tmp_path / "back").convert_tokens_to_ids("<|im_end|>") == 209


def test_adding_tokens_needs_a_tokenizer(tmp_path):
    make_llama(tmp_path / "hf")
    with pytest.raises(UserError, match="tokenizer"):
        convert(
            HfToMegatron(
                str(tmp_path / "hf"), str(tmp_path / "megatron"), vocab_extra_ids_list=CHATML, ckpt_format="torch"
            )
        )
    assert not (tmp_path / "megatron").exists()


def test_export_speaks_the_chat_format(tmp_path, model):
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), chat_format="chatml", ckpt_format="torch"))
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [204, 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    messages = [{"role": "user", "content": "a plum <|im_end|>"}, {"role": "assistant", "content": "ab ba"}]
    ours = load_tokenizer(tmp_path / "megatron" / "release" / "tokenizer")
    plain = [{**messages[0], "content": "a plum"}, messages[1]]
    for said, generate in ((plain, False), (plain[:1], True)):
        ids, _ = get_format("chatml").encode(ours, said, add_generation_prompt=generate)
        theirs = tokenizer.apply_chat_template(said, add_generation_prompt=generate, return_dict=False)
        assert theirs == ids.tolist()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.generation_config.eos_token_id == [204, 2]


@pytest.mark.parametrize("chat_format", [None, "chatml"])
def test_the_snippet_of_the_model_card_runs(tmp_path, model, chat_format, monkeypatch):
    convert(
        HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), chat_format=chat_format, ckpt_format="torch")
    )
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    card = (tmp_path / "back" / "README.md").read_text()
    assert ("apply_chat_template" in card) == bool(chat_format)
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python")[1].split("```")[0].replace("=100", "=3"), {})


TEMPLATE = "{{ messages[0].content }}!"


@pytest.mark.parametrize(
    "name, content",
    [
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        ("tokenizer_config.json", [{"name": "tool_use", "template": "?"}, {"name": "default", "template": TEMPLATE}]),
    ],
)
def test_a_template_that_came_along_stays(tmp_path, model, name, content):
    """Wherever its publisher put it."""
    path = tmp_path / "hf" / name
    if isinstance(content, list):
        content = json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), "chat_template": content})
    path.write_text(content)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), ckpt_format="torch"))
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab!"


def test_an_export_converts_again_without_growing(tmp_path, model):
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "megatron"), chat_format="chatml", ckpt_format="torch"))
    export(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    convert(HfToMegatron(str(tmp_path / "back"), str(tmp_path / "again"), chat_format="chatml", ckpt_format="torch"))
    first, second = (read_config(tmp_path / name / "release") for name in ("megatron", "again"))
    assert first.architecture.vocab_size == second.architecture.vocab_size == 205
    assert first.tokenizer["added_tokens"] == second.tokenizer["added_tokens"]

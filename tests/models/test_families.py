"""Every family of the table: configs and weights both ways, logits of transformers in every layout, training as one process."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.errors import UserError
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.families import family_for, family_of
from tests.conversion.builders import BASE, FAMILIES, logits, make_family, same_tensors
from tests.models.jobs import lima, many, packed, train
from tests.parallel.jobs import read_metrics

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
LENGTH = 48  # beyond every window, and beyond the original context of the scaled ropes


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, BASE["vocab_size"], (2, LENGTH))


def config_of(name) -> dict:
    model_type, changes = FAMILIES[name]
    return json.loads(AutoConfig.for_model(model_type, **{**BASE, **changes}).to_json_string(use_diff=False))


def layouts_of(arch):
    """Those that the heads and layers allow."""
    for layout in LAYOUTS:
        try:
            check_layout(arch, *layout)
            yield layout
        except UserError:
            pass


@pytest.mark.parametrize("name", FAMILIES)
def test_config_both_ways(name, tmp_path):
    original = config_of(name)
    family = family_for(original)
    arch = family.from_hf(original)
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch
    assert family.from_hf(family.to_hf(arch, "bfloat16")) == arch
    (tmp_path / "config.json").write_text(json.dumps(family.to_hf(arch, "float32")))
    exported = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
    exported["rope_parameters"].pop("type", None)  # version 4's older spelling of rope_type
    unlike = {key for key in original if exported.get(key) != original[key]}
    assert unlike <= {"_name_or_path", "transformers_version", "dtype", "architectures", "num_ln_in_parallel_attn"}


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_both_ways_in_every_layout(name, ckpt_format, tmp_path):
    original = make_family(tmp_path / "hf", name)
    arch = family_for(config_of(name)).from_hf(config_of(name))
    for tp, pp in layouts_of(arch):
        made, back = tmp_path / f"{tp}-{pp}", tmp_path / f"{tp}-{pp}-back"
        convert(HfToMegatron(str(tmp_path / "hf"), str(made), tp, pp, ckpt_format=ckpt_format))
        export(MegatronToHf(str(made), str(back)))
        exported = AutoModelForCausalLM.from_pretrained(back, dtype="auto")
        assert same_tensors(original, exported)
    assert torch.equal(logits(original, 203), logits(exported, 203))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (transformers' model, checkpoint in torch_dist, architecture)."""
    folder, made = tmp_path_factory.mktemp("families"), {}
    for number, name in enumerate(FAMILIES):
        hf, root = folder / f"hf-{number}", folder / f"megatron-{number}"
        model = make_family(hf, name)
        convert(HfToMegatron(str(hf), str(root), ckpt_format="torch_dist"))
        made[name] = model, str(root), family_for(config_of(name)).from_hf(config_of(name))
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids="TP{0[0]}xPP{0[1]}".format)
def test_logits_of_every_family(layout, models, four_ranks, tokens):
    names = [name for name in FAMILIES if layout in layouts_of(models[name][2])]
    roots = [models[name][1] for name in names]
    ranks = four_ranks.run(many, roots, layout, layout[0] > 1, tokens, 0)
    for number, name in enumerate(names):
        with torch.no_grad():
            expected = models[name][0](torch.from_numpy(tokens)).logits.numpy()
        ours = [rank[number][0] for rank in ranks if rank[number][0] is not None]
        assert ours
        for rank in ours:
            np.testing.assert_allclose(rank, expected, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "layout, names",
    [((2, 2), ["mistral", "qwen2, window from layer 2", "qwen3", "falcon 40b"]), ((1, 4), ["falcon 7b"])],
)
def test_decodes_as_transformers(layout, names, models, four_ranks, tokens):
    """Greedy, with a KV cache, past the window."""
    ranks = four_ranks.run(many, [models[name][1] for name in names], layout, False, tokens, 12)
    prompt = torch.from_numpy(tokens[:1, :20])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for number, name in enumerate(names):
        model = models[name][0]
        model.generation_config.eos_token_id = None
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 20:].tolist()
        for rank in ranks:
            assert rank[number][1] == expected, name


@pytest.fixture(scope="module")
def packed_rows(models, one_rank):
    """name -> (ids [s], position ids [s], our logits of the packed row, of its samples alone)."""
    lengths = [5, 40, 1, 12]  # beyond a window; beyond the positions from which dynamic and longrope stretch
    ids = np.random.default_rng(4).integers(0, BASE["vocab_size"], sum(lengths))
    (found,) = one_rank.run(packed, [models[name][1] for name in FAMILIES], lengths, ids)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return {name: (ids, positions, *both) for name, both in zip(FAMILIES, found, strict=True)}


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_samples_do_not_see_each_other(name, packed_rows):
    *_, together, alone = packed_rows[name]
    by_length = "dynamic" in name or "longrope" in name  # on the longest sample of a row, so alone differs
    assert (np.abs(together - alone).max() < 1e-5) != by_length


@pytest.mark.parametrize("name", [name for name in FAMILIES if "falcon" not in name])
def test_packed_rows_are_transformers_own(name, packed_rows, models):
    """transformers packs by position ids that begin again: no sample sees another, frequencies follow the longest. Its Falcon does not."""
    ids, positions, together, _ = packed_rows[name]
    model, ids, positions = models[name][0], torch.from_numpy(ids)[None], torch.from_numpy(positions)[None]
    with torch.no_grad():  # without a cache: with one it takes the row for one text
        model(ids[:, :1])  # its dynamic rope remembers the longest text it has seen, until there is a short one
        expected = model(ids, position_ids=positions, use_cache=False).logits[0]
    np.testing.assert_allclose(together, expected.numpy(), atol=1e-4)


def test_one_residual_dropout_that_rises_with_the_layers(models, one_rank):
    """LIMA's on a parallel block: none at the first layer; with p = 1 the last passes its input through."""
    ((first, last, passed),) = one_rank.run(lima, models["falcon 40b"][1])
    assert (first, last, passed) == (0.0, 1.0, True)


TRAINED = ["llama, relu, tied", "mistral", "qwen2", "qwen3", "falcon 7b", "falcon 40b"]


@pytest.mark.parametrize("name", TRAINED)
def test_trains_as_one_process(name, models, one_rank, four_ranks, shards, tmp_path):
    """Five steps of packed rows on TP2 x PP2; Falcon-7B, whose one query group cannot be cut, on PP2 x DP2."""
    root = models[name][1]
    one_rank.run(train, (1, 1), root, shards, str(tmp_path / "one"))
    four_ranks.run(train, (1 if name == "falcon 7b" else 2, 2), root, shards, str(tmp_path / "four"))
    one, four = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "four")
    assert len(set(one)) == 5
    np.testing.assert_allclose(four, one, rtol=1e-4)


@pytest.mark.parametrize("key", ["qkv_bias", "qk_norm", "parallel_block", "shared_norm", "sliding_window"])
def test_an_older_config_json_lacks_the_newer_fields(key):
    arch = family_for(config_of("llama")).from_hf(config_of("llama"))
    data = arch.to_dict()
    del data[key]
    assert Architecture.from_dict(data) == arch


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("falcon 7b", {"alibi": True}, "ALiBi"),
        ("falcon 7b", {"bias": True}, "biases in the linears"),
        ("falcon 7b", {"parallel_attn": False}, "one after the other"),
        ("falcon 7b", {"activation": "gelu_new"}, "activation 'gelu_new'.*gelu, relu"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("mistral", {"hidden_size": None}, "hidden_size"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_reason(name, changes, message):
    config = {key: value for key, value in {**config_of(name), **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        family_for(config).from_hf(config)


@pytest.mark.parametrize("tp", [2, 71])
def test_one_query_group_cannot_be_cut(tp):
    arch = family_for(config_of("falcon 7b")).from_hf(config_of("falcon 7b"))
    assert family_of(arch).rules(arch)
    with pytest.raises(UserError, match=r"num_query_groups 1|num_attention_heads 8"):
        check_layout(arch, tp, 1)


def test_published_shapes():
    """Falcon-7B and 40B as their repositories describe them, which leave out what transformers fills in."""
    shared = {"model_type": "falcon", "auto_map": {"AutoConfig": "x.y"}, "vocab_size": 65024, "bias": False}
    small = {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "multi_query": True}
    large = {"hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8}
    seven = family_for(shared).from_hf({**shared, **small, "new_decoder_architecture": False})
    forty = family_for(shared).from_hf({**shared, **large, "new_decoder_architecture": True})
    assert (seven.num_query_groups, seven.head_dim, seven.ffn_hidden_size, seven.shared_norm) == (1, 64, 18176, True)
    assert (forty.num_query_groups, forty.head_dim, forty.ffn_hidden_size, forty.shared_norm) == (8, 64, 32768, False)
    assert seven.tied_embeddings and forty.tied_embeddings

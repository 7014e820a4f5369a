"""Quantised checkpoints: made from plain models and from files of bitsandbytes, resharded, loaded, exported, verified, refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_conversion import reshard, verify
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert, planned
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.config.sections import Parallelism
from megatron_ft.errors import UserError
from tests.conversion.builders import make_family
from tests.quantization import jobs
from tests.quantization.made_by_bitsandbytes import FILES, hash_of, plain_llama

HASHES = json.loads((FILES / "dequantised.json").read_text())
KINDS = {"single": False, "double": True}
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The original of the models in FILES."""
    return plain_llama(tmp_path_factory.mktemp("plain") / "hf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "hf"
    make_family(folder, "llama", **SIZES)
    return folder


def to_nf4(source, target, tp=1, pp=1, **options):
    """Convert with --quantize nf4; returns the checkpoint's root."""
    convert(HfToMegatron(str(source), str(target), tp, pp, **{"quantize": "nf4", **options}))
    return target


def exported(root, target):
    export(MegatronToHf(str(root), str(target)))
    return load_file(target / "model.safetensors")


def weights(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.suffix in (".pt", ".distcp")}


@pytest.mark.parametrize("ckpt_format, tp", [("torch_dist", 1), ("torch", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_bitsandbytes_and_their_original_give_the_same(tmp_path, plain, kind, ckpt_format, tp):
    """The same bits in the checkpoint, and after its export what bitsandbytes dequantises."""
    ours = to_nf4(plain, tmp_path / "ours", tp, ckpt_format=ckpt_format, double_quant=KINDS[kind])
    theirs = to_nf4(FILES / kind, tmp_path / "theirs", tp, ckpt_format=ckpt_format, quantize=None)
    assert weights(ours) == weights(theirs)
    config = json.loads((theirs / "release/config.json").read_text())
    assert config["quantization"] == {"quant_type": "nf4", "block_size": 64, "double_quant": KINDS[kind]}
    tensors = exported(theirs, tmp_path / "export")
    expected = {key.split()[1]: value for key, value in HASHES.items() if key.startswith(f"{kind} ")}
    assert len(expected) == 7 and all(hash_of(tensors[name]) == value for name, value in expected.items())
    original = load_file(plain / "model.safetensors")
    assert all(torch.equal(tensors[name], original[name]) for name in set(original) - set(expected))
    exported_config = json.loads((tmp_path / "export/config.json").read_text())
    assert "quantization_config" not in exported_config
    assert "dequantised from NF4" in (tmp_path / "export/README.md").read_text()


def test_dequantised_at_conversion(tmp_path):
    root = to_nf4(FILES / "double", tmp_path / "plain", quantize="none")
    assert "quantization" not in json.loads((root / "release/config.json").read_text())
    tensors = exported(root, tmp_path / "export")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert hash_of(tensors[name]) == HASHES[f"double {name}"]


def test_codes_in_another_type_and_in_torch_files(tmp_path):
    """bnb_4bit_quant_storage bfloat16, as for FSDP; and pytorch_model.bin."""
    shutil.copytree(FILES / "double", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    matrices = [name for name in tensors if f"{name}.absmax" in tensors]
    stored = {
        name: value.reshape(-1).view(torch.bfloat16) if name in matrices else value for name, value in tensors.items()
    }
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(stored, tmp_path / "hf/pytorch_model.bin")
    expected = weights(to_nf4(FILES / "double", tmp_path / "expected", quantize=None))
    assert weights(to_nf4(tmp_path / "hf", tmp_path / "found", quantize=None)) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3, tied", "falcon 40b"])
@pytest.mark.parametrize("double", [False, True])
def test_resharded_is_as_if_converted_straight(tmp_path, family, double):
    sizes = {"hidden_size": 256, "ffn_hidden_size": 256, "num_attention_heads": 4} if "falcon" in family else SIZES
    make_family(tmp_path / "hf", family, **sizes)
    layouts = {
        "dist": ("torch_dist", 1, 1),
        "2x2": ("torch", 2, 2),
        "4": ("torch", 4, 1) if "falcon" not in family else ("torch", 1, 4),
    }
    straight = {
        name: to_nf4(tmp_path / "hf", tmp_path / name, tp, pp, ckpt_format=kind, double_quant=double)
        for name, (kind, tp, pp) in layouts.items()
    }
    for before, after in (("dist", "2x2"), ("2x2", "4"), ("4", "dist")):
        kind, tp, pp = layouts[after]
        target = tmp_path / f"{before} to {after}"
        reshard.convert(reshard.Reshard(str(straight[before]), str(target), tp, pp, ckpt_format=kind))
        assert weights(target) == weights(straight[after]), (before, after)


PARALLEL = {
    "TP4": Parallelism(4),
    "TP2 x PP2": Parallelism(2, 2, sequence_parallel=True),
    "PP2, interleaved": Parallelism(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "TP2 x DP2": Parallelism(2),
}


@pytest.mark.parametrize("double", [False, True])
def test_each_rank_holds_its_slice(tmp_path, llama, four_ranks, double):
    root = to_nf4(llama, tmp_path / "nf4", double_quant=double)
    for name, parallel in PARALLEL.items():
        right = four_ranks.run(jobs.held, str(root), parallel)
        stages = parallel.pipeline_model_parallel_size
        assert right == [2 * 16 // stages] * 4, name


def test_a_plain_checkpoint_that_is_frozen_where_it_is(tmp_path, llama, pair):
    dense, quantised = (to_nf4(llama, tmp_path / name, quantize=name, params_dtype="bf16") for name in ("none", "nf4"))
    assert pair.run(jobs.frozen_where_it_is, str(dense), str(quantised)) == [16, 16]


@pytest.fixture(scope="module")
def pair():
    from tests.ranks import Ranks

    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_logits_and_answers(tmp_path, llama, one_rank, four_ranks):
    """In every layout and format those of transformers with the dequantised weights."""
    tokens = np.random.default_rng(5).integers(0, 203, (2, 24))
    dist = to_nf4(llama, tmp_path / "dist", double_quant=True)
    classic = to_nf4(llama, tmp_path / "classic", 2, 2, ckpt_format="torch", double_quant=True)
    exported(dist, tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = [*one_rank.run(jobs.logits, [str(dist)], (1, 1), tokens)[0]]
    found += four_ranks.run(jobs.logits, [str(dist), str(classic)], (2, 2), tokens)[-1]
    assert len(found) == 3 and len({tuple(ids) for _, ids in found}) == 1 and len(found[0][1]) == 8
    for logits, _ in found:
        np.testing.assert_allclose(logits, expected, atol=2e-5 * abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_verify(tmp_path, plain, kind):
    """Against the original, the files of bitsandbytes and the export: what is compared is stated, and the logits agree."""
    root = to_nf4(plain, tmp_path / "nf4", double_quant=KINDS[kind])
    exported(root, tmp_path / "export")
    said = {
        plain: "12 tensors are the same: the linears quantised again, the others bit-identical",
        FILES / kind: "12 tensors are bit-identical, the linears dequantised",
        tmp_path / "export": "12 tensors are bit-identical, the linears dequantised",
    }
    with_logits = plain if kind == "single" else FILES / kind  # a process with the engine takes seconds
    for folder, words in said.items():
        options = verify.Verify(str(folder), str(root), tensor_model_parallel_size=2, logits=folder == with_logits)
        certificate = str(verify.verify(options))
        expected = "logits of 4 prompts in TP2 x PP1 differ by at most" if options.logits else "logits not compared"
        assert certificate.startswith(f"{words}, {expected}")
    export(MegatronToHf(str(root), str(tmp_path / "again"), require_certificate=True))
    assert f"{words}; logits not compared" in (tmp_path / "again/README.md").read_text()


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("double", [False, True])
def test_verify_notices_another_weight(tmp_path, plain, name, double):
    root = to_nf4(plain, tmp_path / "nf4", double_quant=double)
    shutil.copytree(plain, tmp_path / "other")
    tensors = load_file(plain / "model.safetensors")
    tensors[f"model.layers.0.{name}.weight"][5, 7] += 0.3
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="neither those of the checkpoint, dequantised, nor do they have its NF4"):
        verify.verify(verify.Verify(str(tmp_path / "other"), str(root), logits=False))


@pytest.mark.parametrize("double, bits", [(False, 4.5), (True, 4 + 8 / 64 + 32 / 64 / 256)])
def test_sizes_on_disk(tmp_path, double, bits):
    """Llama-2-13B, from its config.json alone."""
    from megatron_ft.planner.known import MODELS

    (tmp_path / "config.json").write_text(json.dumps({**MODELS["llama2-13b"], "dtype": "bfloat16"}))
    options = HfToMegatron(str(tmp_path), str(tmp_path / "out"), 4, 1, quantize="nf4", double_quant=double)
    text = planned(options).splitlines()
    linears = [line for line in text if "linear_" in line and "layer_norm" not in line]
    stored = sum(int(line.split()[-2].replace(",", "")) for line in linears)
    parameters = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824)
    assert stored * 8 / parameters == pytest.approx(bits, rel=1e-4)
    assert len(linears) == 40 * 4 * (3 if double else 2)


def test_without_the_flag_nothing_is_quantised(tmp_path, plain):
    root = to_nf4(plain, tmp_path / "plain", quantize=None)
    assert "quantization" not in (root / "release/config.json").read_text()


def refused(message, call, *args, **options):
    with pytest.raises(UserError, match=message) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit(tmp_path, plain, llama):
    out = tmp_path / "out"
    refused("--double_quant is about --quantize nf4", to_nf4, plain, out, quantize=None, double_quant=True)
    make_family(tmp_path / "wide", "llama", **SIZES | {"intermediate_size": 192})
    message = r"size 2: .*mlp.down_proj.weight has 192 columns, 96 on a rank, .*; sizes that fit: 1$"
    refused(message, to_nf4, tmp_path / "wide", out, 2)
    root = to_nf4(tmp_path / "wide", tmp_path / "narrow")
    refused(message, reshard.convert, reshard.Reshard(str(root), str(out), 2, ckpt_format="torch"))
    refused(message, verify.verify, verify.Verify(str(tmp_path / "wide"), str(root), tensor_model_parallel_size=2))
    root = to_nf4(llama, tmp_path / "nf4")
    options = reshard.Reshard(str(root), str(out), params_dtype="bf16")
    refused("--params_dtype bf16: .* holds NF4 of a model in fp32, which stays", reshard.convert, options)
    assert not out.exists()


def test_a_model_whose_rows_are_no_blocks(tmp_path):
    make_family(tmp_path / "hf", "llama")
    refused("q_proj.weight has 32 columns, no multiple of NF4's block of 64", to_nf4, tmp_path / "hf", tmp_path / "out")


def test_it_is_not_trained(tmp_path, llama, one_rank):
    from megatron_ft.checkpoints.folder import describe
    from megatron_ft.config.settings import TrainingSettings
    from megatron_ft.training.fit import check_model

    root = to_nf4(llama, tmp_path / "nf4")
    config = describe(root / "release")
    refused(
        "holds NF4 weights .* which cannot be trained", check_model, TrainingSettings.of(seq_length=64), config, root, 1
    )


@pytest.mark.parametrize("entry", [{"quant_type": "fp4"}, {"block_size": 128}, {"double_quant": 1}, 3, None])
def test_an_unknown_quantisation_in_the_description(tmp_path, plain, entry):
    from megatron_ft.checkpoints.folder import read_config

    folder = to_nf4(plain, tmp_path / "nf4") / "release"
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {**config["quantization"], **entry} if isinstance(entry, dict) else entry
    (folder / "config.json").write_text(json.dumps(config))
    refused("this version reads NF4 in blocks of 64", read_config, folder)


NAME = "model.layers.0.mlp.down_proj.weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"


def state_with(**entries):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].numpy()))
        text = json.dumps({**state, **entries}).encode()
        tensors[STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return change


DAMAGES = {
    "no scales": (lambda t: t.pop(NAME + ".absmax"), "lacks .*down_proj.weight.absmax"),
    "short scales": (lambda t: t.update({NAME + ".absmax": t[NAME + ".absmax"][1:]}), "has 127 entries of torch.uint8, not 128"),
    "scales in fp32": (lambda t: t.update({NAME + ".absmax": t[NAME + ".absmax"].float()}), "entries of torch.float32, not 128 of"),
    "short codes": (lambda t: t.update({NAME: t[NAME][2:]}), "has 4094 bytes, not those of"),
    "other levels": (lambda t: t[NAME + ".quant_map"].mul_(1.1), "are not the levels of NF4"),
    "other levels of scales": (lambda t: t[NAME + ".nested_quant_map"].mul_(1.1), "are not the levels of NF4"),
    "blocks of 128": (state_with(blocksize=128), "is nf4 in blocks of 128: only NF4 in blocks of 64"),
    "another shape": (state_with(shape=[64, 64]), r"down_proj.weight is \[64, 64\], config.json says \[64, 128\]"),
    "no shape": (state_with(shape=None), "is damaged"),
    "a type that is none": (state_with(dtype="int8"), "is damaged"),
    "an offset that is none": (state_with(nested_offset="x"), "is damaged"),
    "no JSON": (lambda t: t[STATE].fill_(7), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_bitsandbytes(tmp_path, damage):
    shutil.copytree(FILES / "double", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    change, message = DAMAGES[damage]
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "hf/model.safetensors")
    refused(message, to_nf4, tmp_path / "hf", tmp_path / "out", quantize=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("entry", [{"bnb_4bit_quant_type": "fp4"}, {"load_in_4bit": False}, {"quant_method": "gptq"}])
def test_other_quantised_models_are_refused(tmp_path, entry):
    shutil.copytree(FILES / "double", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config["quantization_config"].update(entry)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    refused(
        "quantised weights that megatron-ft does not read: give the unquantised model",
        to_nf4,
        tmp_path / "hf",
        tmp_path / "out",
    )

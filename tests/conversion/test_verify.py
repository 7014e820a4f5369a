"""verify: a certificate for what is the same, a reason for what is not, and exports that ask for one."""

import json
import multiprocessing

import pytest
import torch

from checkpoints_conversion import answers
from checkpoints_conversion import verify as command
from checkpoints_conversion.certificate import problem_with
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.layout_logits import differences
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.verify import Verify, verify
from megatron_ft.config.cli import run_script
from megatron_ft.errors import CheckpointError, UserError
from tests.conversion.builders import make_family, make_llama, make_sentencepiece
from tests.conversion.dialect import write_dialect


@pytest.fixture
def pair(tmp_path):
    make_llama(tmp_path / "hf")
    make_sentencepiece(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), 2, 2, chat_format="chatml", ckpt_format="torch"))
    return tmp_path


@pytest.fixture
def pool(monkeypatch, four_ranks):
    """verify asks four waiting ranks, in any layout they allow, instead of starting processes each time."""
    monkeypatch.setattr(
        answers, "differences_in_layout", lambda request, _: next(filter(None, four_ranks.run(differences, request)))
    )


def check(folder, **options):
    return verify(Verify(str(folder / "hf"), str(folder / "made"), **options))


def test_a_certificate(pair):
    """The logits are computed by four processes, as TP2 x PP2, and none of them is left."""
    content = check(pair).content
    assert not multiprocessing.active_children()
    assert json.loads((pair / "made" / "release" / "certificate.json").read_text()) == content
    assert content["weights"]["tensors"] == 39 and content["weights"]["added_rows"] == 2
    logits = content["logits"]
    assert logits["largest_difference"] < 1e-4 and logits["beyond_original_context"] and logits["tokens"][-1] == 160
    assert len(content["checkpoint"]) == 5 and all(
        value.startswith("xxh3:") for value in content["checkpoint"].values()
    )
    assert content["layout"]["tensor_model_parallel_size"] == 2
    assert (logits["tensor_model_parallel_size"], logits["pipeline_model_parallel_size"]) == (2, 2)
    assert logits["in_one_process_because"] is None
    assert problem_with(pair / "made" / "release") is None
    export(MegatronToHf(str(pair / "made"), str(pair / "back"), require_certificate=True))
    assert "differ by" in (pair / "back" / "README.md").read_text().split("parity")[1]


@pytest.mark.parametrize(
    "family", ["mistral", "qwen2, tied, multi-head, yarn", "qwen3", "falcon 7b", "falcon 40b, relu, untied, yarn"]
)
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_every_family_in_its_own_layout(tmp_path, pool, family, ckpt_format):
    make_family(tmp_path / "hf", family)
    layout = (1, 4) if family == "falcon 7b" else (2, 2)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), *layout, ckpt_format=ckpt_format))
    logits = check(tmp_path).content["logits"]
    assert (logits["tensor_model_parallel_size"], logits["pipeline_model_parallel_size"]) == layout
    assert logits["largest_difference"] < 1e-4


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_in_another_layout(pair, pool, ckpt_format):
    """torch_dist by the engine's own loading; classic files put together and cut anew. Rounded weights are compared rounded."""
    made = str(pair / "rounded")
    convert(HfToMegatron(str(pair / "hf"), made, 2, 1, ckpt_format=ckpt_format, params_dtype="bf16"))
    asked = Verify(str(pair / "hf"), made, tensor_model_parallel_size=1, pipeline_model_parallel_size=4)
    content = verify(asked).content
    assert content["layout"]["tensor_model_parallel_size"] == 2
    assert (content["logits"]["pipeline_model_parallel_size"], content["logits"]["tensor_model_parallel_size"]) == (
        4,
        1,
    )
    with pytest.raises(UserError, match="pipeline_model_parallel_size 3 does not divide"):
        check(pair, pipeline_model_parallel_size=3)


def test_megatron_llm(tmp_path, pool):
    write_dialect(make_llama(tmp_path / "hf"), tmp_path / "made", 2, 2, False, True, padded=256)
    content = check(tmp_path, true_vocab_size=203).content
    assert content["weights"]["tensors"] == 39 and content["logits"]["tensor_model_parallel_size"] == 2


def test_more_processes_than_sensible(pair, monkeypatch, capsys):
    """One process then, and report and certificate say so in words."""
    monkeypatch.setattr(answers, "_RANKS_PER_CORE", 0)
    arguments = ["--hf", str(pair / "hf"), "--megatron", str(pair / "made")]
    assert run_script(command.COMMAND, command.run, arguments) == 0
    assert "in one process, because 4 processes are too many for" in capsys.readouterr().out
    logits = json.loads((pair / "made" / "release" / "certificate.json").read_text())["logits"]
    assert logits["tensor_model_parallel_size"] == 1 and logits["largest_difference"] < 1e-4
    assert "4 processes are too many" in logits["in_one_process_because"]


def test_memory_for_some_processes_or_none(monkeypatch):
    monkeypatch.setattr(answers, "available_memory", lambda: 5 * 10**9)
    assert answers.layout_problem(8, 10**9) == "8 processes do not fit into 5.0 GB of free memory"
    assert answers.layout_problem(4, 10**9) is None
    with pytest.raises(UserError, match=r"28.0 GB of weights in fp32 do not fit into 5.0 GB .*--no_logits"):
        answers.layout_problem(1, 7 * 10**9)


def test_a_rank_that_cannot_read_its_file(pair):
    """What a rank finds wrong is the command's one line; a rank that dies is a bug with its traceback, not a hang."""
    path = pair / "made" / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    request = answers.Request(str(pair / "made" / "release"), 2, 2, [[1, 2, 3]], str(pair), 205)
    with pytest.raises(RuntimeError, match=r"(?s)rank 2 of 4 raised.*0.npy"):
        answers.differences_in_layout(request, pair)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng.pt is cut short"):
        answers.differences_in_layout(request, pair)


def test_a_stretched_export_is_the_stretched_checkpoint(tmp_path, pool):
    make_llama(tmp_path / "source", hidden_size=64)
    scaled = {"rope_scaling_type": "ntk-by-parts", "rope_scaling_factor": 4.0}
    convert(HfToMegatron(str(tmp_path / "source"), str(tmp_path / "made"), **scaled))
    export(MegatronToHf(str(tmp_path / "made"), str(tmp_path / "hf")))
    logits = check(tmp_path).content["logits"]
    assert logits["original_context"] == 128 and logits["beyond_original_context"]
    with pytest.raises(UserError, match=r"RoPE differs between .*source and "):
        verify(Verify(str(tmp_path / "source"), str(tmp_path / "made"), logits=False))


def test_one_other_bit_is_found(pair):
    path = pair / "made" / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["decoder.layers.1.mlp.linear_fc2.weight"].view(torch.int32)[3, 5] ^= 1
    torch.save(state, path)
    with pytest.raises(UserError, match=r"decoder.layers.3.mlp.linear_fc2.weight differs"):
        check(pair, logits=False, verify_checkpoint=False)
    assert not (pair / "made" / "release" / "certificate.json").exists()


def test_another_model(pair):
    make_llama(pair / "other", intermediate_size=64)
    with pytest.raises(UserError, match=r"ffn_hidden_size: 64 in .*other, 48 in"):
        verify(Verify(str(pair / "other"), str(pair / "made"), logits=False))


def test_logits_beyond_the_tolerance(pair, pool):
    with pytest.raises(UserError, match=r"above --tolerance 1e-12"):
        check(pair, tolerance=1e-12)
    assert not (pair / "made" / "release" / "certificate.json").exists()


def test_export_asks_for_a_certificate(pair):
    def back(name, **options):
        export(MegatronToHf(str(pair / "made"), str(pair / name), verify_checkpoint=False, **options))

    with pytest.raises(
        UserError, match=r"--require_certificate: .* has no certificate.json; make one: megatron-ft verify"
    ):
        back("refused", require_certificate=True)
    assert not (pair / "refused").exists()
    check(pair, logits=False)
    back("certified", require_certificate=True)
    card = (pair / "certified" / "README.md").read_text()
    assert "| parity with transformers | 39 tensors are bit-identical; logits not compared |" in card
    assert "| trained on | not recorded |" in card
    certificate = pair / "made" / "release" / "certificate.json"
    whole = certificate.read_text()
    certificate.write_text(whole.replace('"tensors": 39', '"tensors": 38'))
    with pytest.raises(UserError, match=r"certificate.json is damaged, or from an older version; run megatron-ft"):
        back("forged", require_certificate=True)
    certificate.write_text(whole)
    config = pair / "made" / "release" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match="belongs to other files"):
        back("changed", require_certificate=True)
    back("warned")


def test_command(pair, capsys):
    arguments = ["--hf", str(pair / "hf"), "--megatron", str(pair / "made"), "--no_logits"]
    assert run_script(command.COMMAND, command.run, arguments) == 0
    assert capsys.readouterr().out.startswith("39 tensors are bit-identical, logits not compared -> ")

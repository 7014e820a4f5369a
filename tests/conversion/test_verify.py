"""verify: a certificate for what is the same, a reason for what is not, and exports that ask for one."""

import json

import pytest
import torch

from checkpoints_conversion import verify as command
from checkpoints_conversion.certificate import problem_with
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.verify import Verify, verify
from megatron_ft.config.cli import run_script
from megatron_ft.errors import UserError
from tests.conversion.builders import make_family, make_llama, make_sentencepiece
from tests.ranks import Ranks


@pytest.fixture
def pair(tmp_path):
    make_llama(tmp_path / "hf")
    make_sentencepiece(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), 2, 2, chat_format="chatml"))
    return tmp_path


@pytest.fixture(scope="module")
def one_rank():
    """The engine runs in a process of its own: what it leaves in this one would follow other tests' ranks."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def check(folder, **options):
    return verify(Verify(str(folder / "hf"), str(folder / "made"), **options))


def test_a_certificate(pair, one_rank):
    content = one_rank.run(check, pair)[0].content
    assert json.loads((pair / "made" / "release" / "certificate.json").read_text()) == content
    assert content["weights"]["tensors"] == 39 and content["weights"]["added_rows"] == 2
    logits = content["logits"]
    assert logits["largest_difference"] < 1e-4 and logits["beyond_original_context"] and logits["tokens"][-1] == 160
    assert len(content["checkpoint"]) == 5 and all(
        value.startswith("xxh3:") for value in content["checkpoint"].values()
    )
    assert content["layout"]["tensor_model_parallel_size"] == 2
    assert problem_with(pair / "made" / "release") is None


@pytest.mark.parametrize(
    "family", ["mistral", "qwen2, tied, multi-head, yarn", "qwen3", "falcon 7b", "falcon 40b, relu, untied, yarn"]
)
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_every_family(tmp_path, one_rank, family, ckpt_format):
    make_family(tmp_path / "hf", family)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), ckpt_format=ckpt_format))
    assert one_rank.run(check, tmp_path)[0].content["logits"]["largest_difference"] < 1e-4


def test_a_stretched_export_is_the_stretched_checkpoint(tmp_path, one_rank):
    make_llama(tmp_path / "source", hidden_size=64)
    scaled = {"rope_scaling_type": "ntk-by-parts", "rope_scaling_factor": 4.0}
    convert(HfToMegatron(str(tmp_path / "source"), str(tmp_path / "made"), **scaled))
    export(MegatronToHf(str(tmp_path / "made"), str(tmp_path / "hf")))
    logits = one_rank.run(check, tmp_path)[0].content["logits"]
    assert logits["original_context"] == 128 and logits["beyond_original_context"]
    with pytest.raises(UserError, match=r"the rope of .*source and of .* differ"):
        verify(Verify(str(tmp_path / "source"), str(tmp_path / "made"), logits=False))


def test_one_other_bit_is_found(pair):
    path = pair / "made" / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["decoder.layers.1.mlp.linear_fc2.weight"].view(torch.int32)[3, 5] ^= 1
    torch.save(state, path)
    with pytest.raises(UserError, match=r"decoder.layers.3.mlp.linear_fc2.weight differs"):
        check(pair, logits=False, digests=False)
    assert not (pair / "made" / "release" / "certificate.json").exists()


def test_another_model(pair):
    make_llama(pair / "other", intermediate_size=64)
    with pytest.raises(UserError, match=r"ffn_hidden_size: 64 in .*other, 48 in"):
        verify(Verify(str(pair / "other"), str(pair / "made"), logits=False))


def strict(pair):
    with pytest.raises(UserError, match=r"more than --tolerance 1e-12"):
        check(pair, tolerance=1e-12)


def test_logits_beyond_the_tolerance(pair, one_rank):
    one_rank.run(strict, pair)


def test_export_asks_for_a_certificate(pair):
    def back(name, **options):
        export(MegatronToHf(str(pair / "made"), str(pair / name), digests=False, **options))

    with pytest.raises(
        UserError, match=r"--require_certificate: .* has no certificate.json; make one: megatron-ft verify"
    ):
        back("refused", require_certificate=True)
    assert not (pair / "refused").exists()
    check(pair, logits=False)
    back("certified", require_certificate=True)
    config = pair / "made" / "release" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match="is of other files"):
        back("changed", require_certificate=True)
    back("warned")


def test_command(pair, capsys):
    arguments = ["--hf", str(pair / "hf"), "--megatron", str(pair / "made"), "--no_logits"]
    assert run_script(command.COMMAND, command.run, arguments) == 0
    assert capsys.readouterr().out.startswith("39 tensors equal bit for bit, logits not compared -> ")

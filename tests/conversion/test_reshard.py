"""Any Megatron checkpoint to any other layout and format, Megatron-LLM's dialect included: the same bits, the same logits."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion import reshard
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.reshard import Reshard
from megatron_ft.checkpoints.folder import is_complete, read_config
from megatron_ft.errors import UserError
from tests.conversion.builders import make_family, make_llama, make_sentencepiece, same_tensors
from tests.conversion.dialect import write_dialect
from tests.parallel.conftest import checkpoint, llama, shards  # noqa: F401
from tests.parallel.jobs import read_metrics
from tests.parallel.test_resume import steps

LAYOUTS = [("torch", 1, 1), ("torch", 4, 2), ("torch", 2, 4), ("torch_dist", 1, 1)]


def bits(folder):
    """Every file's content, the json ones aside."""
    return {
        p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.pt")) + sorted(folder.rglob("*.distcp"))
    }


@pytest.mark.parametrize("before, after", list(itertools.permutations(LAYOUTS, 2)), ids=str)
def test_as_if_converted_straight(tmp_path, before, after):
    tied = LAYOUTS.index(before) % 2 == 0
    make_llama(tmp_path / "hf", tie_word_embeddings=tied)
    for name, (kind, tp, pp) in (("first", before), ("straight", after)):
        convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / name), tp, pp, ckpt_format=kind))
    kind, tp, pp = after
    reshard.convert(Reshard(str(tmp_path / "first"), str(tmp_path / "second"), tp, pp, ckpt_format=kind))
    assert is_complete(tmp_path / "second" / "release")
    assert bits(tmp_path / "second") == bits(tmp_path / "straight")
    configs = [read_config(tmp_path / name / "release") for name in ("second", "straight")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", ["qwen2", "qwen3, tied", "falcon 40b"])
def test_other_families(tmp_path, family):
    original = make_family(tmp_path / "hf", family)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "a"), 2, 2, ckpt_format="torch"))
    reshard.convert(Reshard(str(tmp_path / "a"), str(tmp_path / "b"), 4, 1, params_dtype="fp32", ckpt_format="torch"))
    export(MegatronToHf(str(tmp_path / "b"), str(tmp_path / "back")))
    assert same_tensors(original, AutoModelForCausalLM.from_pretrained(tmp_path / "back"))


def test_the_tokenizer_travels(tmp_path):
    make_llama(tmp_path / "hf")
    make_sentencepiece(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "a"), 2, 1, chat_format="chatml", ckpt_format="torch"))
    reshard.convert(Reshard(str(tmp_path / "a"), str(tmp_path / "b"), 1, 2, ckpt_format="torch"))
    export(MegatronToHf(str(tmp_path / "b"), str(tmp_path / "back")))
    assert read_config(tmp_path / "b" / "release").chat_format == "chatml"
    assert (tmp_path / "back" / "tokenizer.model").is_file()


def test_training_state_stays_in_torch_dist(tmp_path):
    make_llama(tmp_path / "hf")
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "a"), ckpt_format="torch_dist"))
    (tmp_path / "a" / "release" / "__9_0.distcp").write_bytes(b"moments")
    reshard.convert(Reshard(str(tmp_path / "a"), str(tmp_path / "b"), 2, 2, ckpt_format="torch_dist"))
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    config = read_config(tmp_path / "b" / "release")
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (2, 2)


DIALECTS = [  # family, TP, PP, trained, flat embeddings
    ("llama", 1, 1, False, True),
    ("llama", 4, 2, True, False),
    ("llama, relu, tied", 2, 2, False, False),
    ("falcon 40b", 2, 2, True, True),
    ("falcon 7b", 1, 2, False, False),
]


@pytest.mark.parametrize("family, tp, pp, trained, flat", DIALECTS)
@pytest.mark.parametrize("target", ["hf", "torch", "torch_dist"])
def test_megatron_llm(tmp_path, family, tp, pp, trained, flat, target):
    changes = {"hidden_act": "silu"} if family.startswith("llama") else {}
    original = make_family(tmp_path / "hf", family, **changes)
    write_dialect(original, tmp_path / "old", tp, pp, trained, flat, padded=256)
    source = tmp_path / "old"
    if target != "hf":
        other = {"tensor_model_parallel_size": 1 if family == "falcon 7b" else 2, "true_vocab_size": 203}
        reshard.convert(Reshard(str(source), str(tmp_path / "new"), ckpt_format=target, **other))
        assert is_complete(tmp_path / "new" / ("iter_0000042" if trained else "release"))
        export(MegatronToHf(str(tmp_path / "new"), str(tmp_path / "back")))
    else:
        export(MegatronToHf(str(source), str(tmp_path / "back"), true_vocab_size=203))
    assert same_tensors(original, AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto"))


@pytest.fixture
def old(tmp_path):
    write_dialect(make_llama(tmp_path / "hf"), tmp_path / "old", 2, 1, False, True, padded=256)
    return tmp_path / "old"


def refused(old, message, **options):
    with pytest.raises(UserError, match=message):
        reshard.convert(Reshard(str(old), str(old.parent / "new"), **{"true_vocab_size": 203, **options}))
    assert not (old.parent / "new").exists() and not list(old.parent.glob(".new*"))


def change(old, edit):
    path = old / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_payload_in_args_does_not_run(old):
    change(old, lambda state: state.update(args=argparse.Namespace(evil=Payload(old / "ran"))))
    refused(old, r"names (io|_io|builtins).open")
    assert not (old / "ran").exists()


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.pop("args"), "args lacks num_layers"),
        (lambda s: s.pop("model"), "no model.language_model"),
        (lambda s: setattr(s["args"], "ffn_hidden_size", 64), r"args have \[64, 32\]"),
        (lambda s: setattr(s["args"], "use_bias", True), "biases"),
        (lambda s: s["model"]["language_model"].pop("lm_head"), "lacks output_layer.weight"),
        (lambda s: s["model"]["language_model"].update(pooler=1), "language_model.pooler"),
        (lambda s: s["model"]["language_model"]["transformer"].update({"x.weight": torch.ones(1)}), "unknown to llama"),
    ],
)
def test_what_is_wrong_in_an_old_file(old, edit, message):
    change(old, edit)
    refused(old, message)


def test_what_the_old_format_does_not_say(old):
    refused(old, "--tokenizer or --true_vocab_size", true_vocab_size=None)
    refused(old, "vocabulary of 300 in 256 padded rows", true_vocab_size=300)
    (old / "release" / "mp_rank_01").rename(old / "release" / "mp_rank_02")
    refused(old, "2 rank folders for TP3")


def test_training_goes_on_in_the_other_layout(tmp_path, four_ranks, checkpoint, shards):  # noqa: F811
    """Optimizer state travels: from TP2 x PP2, resharded for TP4, the losses are those of the run that never stopped."""
    four_ranks.run(steps, (2, 2), checkpoint, shards, str(tmp_path / "straight"), 10, 0.0)
    four_ranks.run(steps, (2, 2), checkpoint, shards, str(tmp_path / "run"), 5, 0.0)
    reshard.convert(Reshard(str(tmp_path / "run"), str(tmp_path / "new"), 4, 1, ckpt_format="torch_dist"))
    config = read_config(tmp_path / "new" / "iter_0000005")
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (4, 1)
    four_ranks.run(steps, (4, 1), str(tmp_path / "new"), shards, str(tmp_path / "new"), 10, 0.0)
    reshard.convert(Reshard(str(tmp_path / "new"), str(tmp_path / "classic"), 1, 1, ckpt_format="torch"))
    for number, made in enumerate(("new", "classic")):
        export(MegatronToHf(str(tmp_path / made), str(tmp_path / f"hf{number}")))
        card = (tmp_path / f"hf{number}" / "README.md").read_text()
        assert "| trained on | chats-train: 120 samples, " in card and "`xxh3:" in card
    straight, went_on = read_metrics(tmp_path / "straight"), read_metrics(tmp_path / "new")
    assert len(went_on) == 5
    np.testing.assert_allclose(went_on, straight[5:], rtol=1e-5)

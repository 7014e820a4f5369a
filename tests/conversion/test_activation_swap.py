"""--activation: the model of transformers with that activation, in every layout and wherever its MLP is computed; recorded everywhere."""

import json
import logging
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints_conversion import answers, hf_to_megatron
from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert, planned
from checkpoints_conversion.layout_logits import differences
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.reshard import Reshard
from checkpoints_conversion.reshard import convert as reshard
from checkpoints_conversion.verify import Verify, verify
from megatron_ft.checkpoints.folder import describe, find_checkpoint
from megatron_ft.config.cli import run_script
from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models import falcon
from megatron_ft.models.activation_swap import before_swap, swap_activation, swap_of
from megatron_ft.models.families import parse_hf_config
from megatron_ft.models.hf_config import ActivationEntry
from tests.conversion.builders import BASE, make_family
from tests.conversion.test_gptq_export import perplexity, write_shards
from tests.models.jobs import many

KEYS = {"llama": "hidden_act", "mistral": "hidden_act", "qwen2": "hidden_act", "qwen3": "hidden_act"} | {
    "falcon 40b": "activation"
}
ACTIVATIONS = ("relu", "relu2", "silu", "gelu")
TOKENS = np.random.default_rng(3).integers(0, BASE["vocab_size"], (2, 32))


def swapped(folder, family, name, **changes):
    """transformers' model of a saved one, with another activation."""
    config = AutoConfig.from_pretrained(folder)
    setattr(config, KEYS[family], name)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> folder of a random model."""
    folder = tmp_path_factory.mktemp("swap")
    for family in KEYS:
        make_family(folder / family.replace(" ", "_"), family)
    return lambda family: folder / family.replace(" ", "_")


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """(family, activation) -> checkpoint in torch_dist."""
    folder, known = tmp_path_factory.mktemp("made"), {}

    def of(family, activation):
        if (family, activation) not in known:
            root = folder / f"{len(known)}"
            convert(HfToMegatron(str(models(family)), str(root), activation=activation, ckpt_format="torch_dist"))
            known[family, activation] = str(root)
        return known[family, activation]

    return of


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids="TP{0[0]}xPP{0[1]}".format)
def test_logits_of_transformers_with_that_activation(layout, models, made, one_rank, four_ranks):
    cases = [(family, activation) for family in KEYS for activation in ACTIVATIONS]
    pool = one_rank if layout == (1, 1) else four_ranks
    ranks = pool.run(many, [made(*case) for case in cases], layout, layout[0] > 1, TOKENS, 0)
    found = {}
    for number, (family, activation) in enumerate(cases):
        with torch.no_grad():
            expected = swapped(models(family), family, activation)(torch.from_numpy(TOKENS)).logits.numpy()
        ours = [rank[number][0] for rank in ranks if rank[number][0] is not None]
        assert ours and all(abs(one - expected).max() < 1e-5 for one in ours), (family, activation)
        found.setdefault(family, []).append(expected)
    for family, logits in found.items():  # else the test could not tell one from another
        assert all(abs(one - other).max() > 1e-3 for i, one in enumerate(logits) for other in logits[:i]), family


@pytest.mark.parametrize("family", ["llama", "falcon 40b"])
def test_decodes_with_it(family, models, made, one_rank):
    """Greedy, with a KV cache."""
    (ours,) = one_rank.run(many, [made(family, "relu")], (1, 1), False, TOKENS, 10)
    model, prompt = swapped(models(family), family, "relu"), torch.from_numpy(TOKENS[:1, :20])
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    assert ours[0][1] == model.generate(prompt, **options)[0, 20:].tolist()


@pytest.mark.parametrize("family, entry", [("llama", "hidden_act"), ("falcon 40b", "activation")])
def test_the_record_goes_everywhere(family, entry, models, tmp_path, monkeypatch, four_ranks):
    """Checkpoint, other layout, certificate, export and model card; and the export is that model."""
    monkeypatch.setattr(
        answers, "differences_in_layout", lambda request, _: next(filter(None, four_ranks.run(differences, request)))
    )
    hf, made, again, back = models(family), tmp_path / "made", tmp_path / "again", tmp_path / "back"
    original = json.loads((hf / "config.json").read_text())[entry]
    record = {"from": original, "to": "relu"}
    report = convert(HfToMegatron(str(hf), str(made), 2, 2, activation="relu", ckpt_format="torch"))
    assert f"activation {original} -> relu" in str(report)
    certificate = verify(Verify(str(hf), str(made)))
    assert certificate.content["activation_swap"] == record and f"swapped ({original} -> relu)" in str(certificate)
    logits = certificate.content["logits"]
    assert logits["largest_difference"] < 1e-5 and logits["tensor_model_parallel_size"] == 2
    reshard(Reshard(str(made), str(again)))
    export(MegatronToHf(str(again), str(back)))
    config = json.loads((back / "config.json").read_text())
    assert (config[entry], config["activation_swap"]) == ("relu", record)
    assert f"| activation | relu in place of {original} (config.json: {entry}) |" in (back / "README.md").read_text()
    with torch.no_grad():
        ids = torch.from_numpy(TOKENS)
        theirs = AutoModelForCausalLM.from_pretrained(back)(ids).logits
        assert torch.equal(theirs, swapped(hf, family, "relu")(ids).logits)
    assert (
        verify(Verify(str(back), str(again))).content["activation_swap"] == record
    )  # the export is the checkpoint too
    convert(HfToMegatron(str(back), str(tmp_path / "third")))
    assert swap_of(describe(find_checkpoint(tmp_path / "third")).architecture) == (original, "relu")


def test_a_swap_back_leaves_no_record(models, tmp_path):
    arch = parse_hf_config(json.loads((models("llama") / "config.json").read_text()))[1]
    relu = swap_activation(arch, "relu")
    assert (relu.activation, swap_of(relu)) == ("reglu", ("silu", "relu"))
    gelu = swap_activation(relu, "gelu")
    assert swap_of(gelu) == ("silu", "gelu")
    assert [before_swap(one, gelu) for one in (arch, relu, gelu)] == [("silu", "gelu"), ("relu", "gelu"), None]
    assert before_swap(relu, arch) is None  # no record says so
    assert swap_activation(relu, "silu") == arch and swap_activation(arch, "silu") == arch


@pytest.mark.parametrize(
    "record", [None, "relu", {"from": 1, "to": "relu"}, {"from": "silu"}, {"from": "silu", "to": "gelu"}]
)
def test_a_record_of_another_swap_does_not_count(models, record):
    config = json.loads((models("llama") / "config.json").read_text())
    arch = parse_hf_config({**config, "hidden_act": "relu", "activation_swap": record})[1]
    assert swap_of(arch) is None and before_swap(parse_hf_config(config)[1], arch) is None


def test_verify_still_tells_activations_apart(models, made, tmp_path):
    """A checkpoint without the record, and one whose record is of another activation."""
    gelu = tmp_path / "gelu"
    shutil.copytree(models("llama"), gelu)
    config = json.loads((gelu / "config.json").read_text())
    (gelu / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match=r"activation: geglu in .* reglu in"):
        verify(Verify(str(gelu), made("llama", "relu"), logits=False))


def test_a_family_that_cannot_say_it(models, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(falcon, "ACTIVATION", ActivationEntry("activation", {"gelu": "gelu"}))
    target = tmp_path / "made"
    command = ["--input_dir", str(models("falcon 40b")), "--output_dir", str(target), "--activation", "relu"]
    assert run_script(hf_to_megatron.COMMAND, hf_to_megatron.run, command) == 2
    said = capsys.readouterr().err.strip()
    assert (
        "\n" not in said and "--activation relu: config.json of a falcon model cannot say it" in said and "gelu" in said
    )
    assert not target.exists()
    with pytest.raises(ConfigError, match="cannot say it"):
        planned(HfToMegatron(*command[1:4:2], activation="relu", plan=True))


def test_an_unknown_activation(models, tmp_path, capsys):
    command = ["--input_dir", str(models("llama")), "--output_dir", str(tmp_path / "made"), "--activation", "mish"]
    assert run_script(hf_to_megatron.COMMAND, hf_to_megatron.run, command) == 2
    assert "mish" in capsys.readouterr().err and not (tmp_path / "made").exists()


@pytest.mark.parametrize("family", ["llama", "falcon 40b"])
def test_weights_in_4_bits(family, tmp_path, monkeypatch, four_ranks):
    monkeypatch.setattr(
        answers, "differences_in_layout", lambda request, _: next(filter(None, four_ranks.run(differences, request)))
    )
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    make_family(tmp_path / "hf", family, **sizes)
    convert(HfToMegatron(str(tmp_path / "hf"), str(tmp_path / "made"), 2, 2, quantize="nf4", activation="relu"))
    logits = verify(Verify(str(tmp_path / "hf"), str(tmp_path / "made"))).content["logits"]
    assert logits["largest_difference"] < 1e-4 and logits["tensor_model_parallel_size"] == 2


def test_layers_that_are_quantised_one_by_one(models, made, tmp_path):
    """GPTQ's loss before it: that of the swapped model."""
    write_shards(tmp_path / "shards")
    given = {
        "group_size": 16,
        "calibration_rows": 20,
        "calibration_length": 64,
        "calibration": str(tmp_path / "shards"),
    }
    export(MegatronToHf(made("falcon 40b", "relu"), str(tmp_path / "out"), quantize="gptq", **given))
    card = (tmp_path / "out" / "README.md").read_text()
    before = float(re.search(r"\| perplexity \| ([\d.]+) before", card)[1])
    relu, gelu = (
        perplexity(swapped(models("falcon 40b"), "falcon 40b", name), tmp_path / "shards") for name in ("relu", "gelu")
    )
    assert before == pytest.approx(relu, rel=1e-4) and abs(relu - gelu) > 1e-2


def test_adapters_of_a_swapped_model(models, made, shards, one_rank, tmp_path, caplog):
    """Merged and verified against base and adapters; the PEFT export names no model, because the original has another activation."""
    from checkpoints_conversion.merge_adapter import Merge, merge
    from tests.parallel.jobs import finetune

    run = str(tmp_path / "run")
    settings = {
        "load": made("llama", "relu"),
        "data_path": [shards],
        "save": run,
        "train_iters": 2,
        "lr_warmup_iters": 0,
    }
    one_rank.run(partial(finetune, (1, 1), lora_rank=2, report=False, **settings))
    merge(Merge(run, str(tmp_path / "merged")))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["hidden_act"], config["activation_swap"]) == ("relu", {"from": "silu", "to": "relu"})
    verify(Verify(str(tmp_path / "merged"), run))
    with caplog.at_level(logging.WARNING):
        export(MegatronToHf(run, str(tmp_path / "adapter"), adapter_only=True))
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "name one with --base_model_name" in caplog.text and not adapter.get("base_model_name_or_path")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("shards") / "chats"
    write_shards(prefix)
    return str(prefix)

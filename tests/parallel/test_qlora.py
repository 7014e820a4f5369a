"""Adapters on a base in NF4: layouts, stops, the base they belong to, answers, and what merging adds them to."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from tests.parallel.jobs import make_llama, read_metrics
from tests.parallel.test_lora import cases, lora_of, measure
from tests.parallel.test_lora_runs import LORA, go, hashes, run_with
from tests.quantization.jobs import dequantise_in_place, freeze
from tests.quantization.test_frozen import FALCON, LLAMA, TOLERANCE
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def pools(one_rank, four_ranks):
    two = Ranks(2)
    yield {1: one_rank, 2: two, 4: four_ranks}
    two.close()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora") / "hf"
    return make_llama(folder, hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.fixture(scope="module")
def roots(hf):
    """The same model in bf16: plain, NF4, NF4 with scales in 8 bits."""
    flags = {"plain": {}, "nf4": {"quantize": "nf4"}, "double": {"quantize": "nf4", "double_quant": True}}
    for name, more in flags.items():
        convert(HfToMegatron(str(hf), str(hf.parent / name), params_dtype="bf16", **more))
    return {name: str(hf.parent / name) for name in flags}


@pytest.fixture(scope="module")
def two_steps(roots, four_ranks, shards, tmp_path_factory):
    """(base, flags) -> a copy of the run of two steps in TP2 x PP2; made when first asked for."""
    made = {}

    def copy(load, save, **flags):
        key = (load, *flags.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("two") / "run"
            go(four_ranks, roots[load], shards, made[key], 2, **LORA, **flags)
        return shutil.copytree(made[key], save)

    return copy


def prepared(arch, case, lora, numerics, prepare):
    from megatron_ft.training import invariance

    return invariance.measure(invariance.Problem(arch, lora=lora, numerics=numerics), case, prepare)


LAYOUTS = ("TP2", "TP4 + sequence parallel", "PP4", "PP2, interleaved", "TP2 x PP2 + sequence parallel", "DP2")


@pytest.mark.parametrize(
    "arch, names, numerics", [(LLAMA, LAYOUTS, {}), (FALCON, LAYOUTS[-2:], {"recompute_granularity": "full"})]
)
@pytest.mark.works("NF4 base", "dropout", "packing", ["SP", "PP", "VPP", "DP"])
@pytest.mark.works("NF4 base", "Falcon", "recompute", "dropout", ["SP", "PP", "DP"])
def test_every_layout_trains_the_same_adapters(arch, names, numerics, pools):
    """As one process whose plain linears have the dequantised weights; in one process the bits are the same."""
    from megatron_ft.config.sections import Numerics
    from megatron_ft.training.invariance import Case, compare

    lora, numerics = lora_of(arch, dropout=0.1), Numerics(hidden_dropout=0.1, **numerics)
    plain, frozen = (
        pools[1].run(prepared, arch, Case("one", 1), lora, numerics, how)[0] for how in (dequantise_in_place, freeze)
    )
    assert compare(plain, frozen).largest == 0
    unquantised = pools[1].run(measure, arch, Case("one", 1), lora, numerics)[0]
    assert compare(unquantised, frozen).gradient > 1e-2
    for case in cases(arch, names):
        found = pools[case.processes].run(prepared, arch, case, lora, numerics, freeze)[0]
        assert compare(plain, found).largest < TOLERANCE, case.name


def test_a_quantised_base_and_one_that_is_quantised_when_it_is_loaded(roots, four_ranks, shards, tmp_path):
    """The same losses; a stop changes no bit, also where only the checkpoint knows the precision; the base stays as it is."""
    before = {name: hashes(root) for name, root in roots.items()}
    go(four_ranks, roots["nf4"], shards, tmp_path / "nf4", 4, **LORA)
    go(four_ranks, roots["plain"], shards, tmp_path / "loaded", 4, **LORA, base_precision="nf4")
    go(four_ranks, roots["plain"], shards, tmp_path / "plain", 4, **LORA)
    losses = {name: read_metrics(tmp_path / name) for name in ("nf4", "loaded", "plain")}
    assert losses["nf4"] == losses["loaded"] != losses["plain"]
    assert parameters(tmp_path / "nf4") == parameters(tmp_path / "loaded") == parameters(tmp_path / "plain")
    for name, load, flags in (("nf4", "nf4", {}), ("loaded", "plain", {"base_precision": "nf4"})):
        save = tmp_path / f"{name} again"
        go(four_ranks, roots[load], shards, save, 2, **LORA, **flags)
        go(four_ranks, roots[load], shards, save, 4, auto_resume=True)
        assert read_metrics(save) == losses["nf4"]
    assert {name: hashes(root) for name, root in roots.items()} == before
    assert not [name for name in hashes(tmp_path / "nf4") if "_lora." not in name and "rng" not in name]


def parameters(folder) -> list[int]:
    """Those of each rank, as the record of the run has them."""
    from megatron_ft.report.run_page import read_starts

    return [rank["parameters"] for rank in read_starts(folder)[-1]["ranks"]]


@pytest.mark.parametrize(
    ("base", "flags"), [("double", "--bf16 --tensor_model_parallel_size 2"), ("plain", "--bf16 --base_precision nf4")]
)
def test_a_rehearsal_has_a_quantised_base_too(base, flags, roots, shards, tmp_path):
    """Whether it was quantised before or is when it is loaded; the small model has whole blocks in every slice."""
    from tests.generation.test_adapters import command

    words = f"--data_path {shards} --seq_length 32 --train_iters 3 --lora_rank 4 --nproc_per_node 2 --rehearse {flags}"
    done = command("finetune", "--load", roots[base], *words.split())
    assert done.code == 0, done.err
    assert "rehearsal passed" in done.out and "rank 4, on a base in NF4" in done.out
    assert "hidden 128 -> 32" not in done.out  # half a block: the plain small model's width


@pytest.mark.works("NF4 base", "resume", "SP", "PP")
def test_ten_steps_with_a_stop_after_five(roots, four_ranks, shards, tmp_path):
    for name, until in (("straight", (10,)), ("resumed", (5, 10))):
        for steps in until:
            go(four_ranks, roots["double"], shards, tmp_path / name, steps, **LORA, auto_resume=True)
    losses = read_metrics(tmp_path / "straight")
    assert len(losses) == 10 and losses == read_metrics(tmp_path / "resumed")
    assert hashes(tmp_path / "straight") == hashes(tmp_path / "resumed")


@pytest.mark.parametrize(
    ("base", "layout", "processes"),
    [
        pytest.param("nf4", (4, 1), 4, marks=pytest.mark.thorough),
        ("double", (4, 1), 4),
        ("nf4", (1, 2), 2),
        ("double", (1, 1), 1),
    ],
    ids=["TP4", "TP4, double", "PP2", "one process, double"],
)
@pytest.mark.works("NF4 base", "resume in another layout", ["TP", "PP"])
@pytest.mark.works("NF4 base", "Hugging Face export")
def test_another_layout_and_the_merged_model(
    base, layout, processes, roots, two_steps, pools, four_ranks, shards, tmp_path
):
    """TP2 x PP2 -> others; merged onto the dequantised base."""
    from checkpoints_conversion.megatron_to_hf import MegatronToHf
    from checkpoints_conversion.megatron_to_hf import convert as export
    from checkpoints_conversion.merge_adapter import Merge, run

    two_steps(base, tmp_path / "run")
    two_steps(base, tmp_path / "stays")
    go(four_ranks, roots[base], shards, tmp_path / "stays", 4, auto_resume=True)
    go(pools[processes], roots[base], shards, tmp_path / "run", 4, layout, auto_resume=True)
    np.testing.assert_allclose(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "stays"), rtol=1e-5)
    run(Merge(str(tmp_path / "run"), str(tmp_path / "merged"), params_dtype="fp32"))
    export(MegatronToHf(roots[base], str(tmp_path / "dequantised"), params_dtype="fp32"))
    merged, dequantised = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "dequantised"))
    changed = {name for name in merged if not torch.equal(merged[name], dequantised[name])}
    assert len(changed) == 7 * 4 and all("proj" in name for name in changed)
    step = max(float((merged[name] - dequantised[name]).abs().max()) for name in changed)
    assert 0 < step < 0.5


def test_another_base_is_refused(roots, two_steps, four_ranks, shards, tmp_path):
    """Adapters of the quantised weights do not belong to the plain ones."""
    two_steps("nf4", tmp_path / "run")
    said = four_ranks.run(run_with, str(tmp_path / "run"), shards, None, 4, (2, 2), {"base": roots["plain"]})
    assert all("is not the model that the adapters were trained with" in one for one in said)


def test_what_does_not_fit(roots, hf, tmp_path, four_ranks, shards):
    said = four_ranks.run(run_with, roots["plain"], shards, None, 2, (2, 2), {"base_precision": "nf4"})
    assert set(said) == {"--base_precision nf4 is for adapters: add --lora_rank, or drop it"}
    said = four_ranks.run(run_with, roots["nf4"], shards, None, 2, (2, 2), {})
    assert all("holds NF4 weights" in one and "cannot be trained" in one for one in said)
    narrow = make_llama(tmp_path / "narrow")
    convert(HfToMegatron(str(narrow), str(tmp_path / "small")))
    said = four_ranks.run(run_with, str(tmp_path / "small"), shards, None, 2, (2, 2), LORA | {"base_precision": "nf4"})
    assert all("no multiple of NF4's block of 64" in one for one in said)


def adapted_logits(folder, tokens):
    """Logits of base and adapters, in fp32."""
    from pathlib import Path

    from megatron_ft.adapters.adapted import build_adapted
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import BuildOptions
    from tests.models import jobs

    found = find_checkpoint(Path(folder))
    config = describe(found)
    with process_groups(ParallelSizes(2, 2)) as layout, torch.no_grad():
        model = build_adapted(found, config, layout, BuildOptions()).eval()
        return jobs.logits(model, torch.from_numpy(tokens), config.architecture.vocab_size, layout)


def opened_logits(folder, adapter, tokens):
    """Logits of what `generate --load EXPORT --adapter RUN` answers with, in fp32; this model has no tokenizer."""
    from pathlib import Path
    from types import SimpleNamespace
    from unittest import mock

    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation import loading
    from tests.models import jobs

    without = {"load_tokenizer": lambda _: SimpleNamespace(eos_id=None), "_select_chat_format": lambda *_: None}
    with process_groups(ParallelSizes(2, 2)) as layout, torch.no_grad(), mock.patch.multiple(loading, **without):
        model = loading.open_chat_model(Path(folder), layout, adapter=Path(adapter)).decoder.model
        return jobs.logits(model, torch.from_numpy(tokens), 203, layout)


def test_an_export_is_quantised_for_adapters_that_saw_it_so(roots, two_steps, four_ranks, tmp_path):
    """Whether the model is the checkpoint or a Hugging Face folder, its adapters answer on NF4."""
    from checkpoints_conversion.megatron_to_hf import MegatronToHf
    from checkpoints_conversion.megatron_to_hf import convert as export

    export(MegatronToHf(roots["plain"], str(tmp_path / "export")))
    tokens = np.random.default_rng(5).integers(0, 203, (2, 24))
    found = {}
    for name, flags in (("nf4", {"base_precision": "nf4"}), ("plain", {})):
        two_steps("plain", tmp_path / name, **flags)
        found[name] = four_ranks.run(adapted_logits, str(tmp_path / name), tokens)[-1]
        other = four_ranks.run(opened_logits, str(tmp_path / "export"), str(tmp_path / name), tokens)[-1]
        assert np.array_equal(other, found[name]), name
    assert not np.array_equal(found["nf4"], found["plain"])


@pytest.mark.works("NF4 base", "generate", "TP", "PP")
def test_answers_and_verify(two_steps, four_ranks, tmp_path):
    """Base and adapters compute what the merged model does, whether the base was quantised before or is when it is loaded."""
    from transformers import AutoModelForCausalLM

    from checkpoints_conversion.merge_adapter import Merge, run
    from checkpoints_conversion.verify import Verify, verify

    two_steps("double", tmp_path / "run")
    run(Merge(str(tmp_path / "run"), str(tmp_path / "merged"), params_dtype="fp32"))
    tokens = np.random.default_rng(5).integers(0, 203, (2, 24))
    found = four_ranks.run(adapted_logits, str(tmp_path / "run"), tokens)[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())
    said = str(verify(Verify(str(tmp_path / "merged"), str(tmp_path / "run"), tolerance=1e-3)))
    assert said.startswith("the base is unchanged, ") and "logits of 4 prompts in" in said
    for name, load, flags in (("nf4", "nf4", {}), ("loaded", "plain", {"base_precision": "nf4"})):
        two_steps(load, tmp_path / name, **flags)
    one, other = (four_ranks.run(adapted_logits, str(tmp_path / name), tokens)[-1] for name in ("nf4", "loaded"))
    assert np.array_equal(one, other)


def merge_onto(root, folder, onto=None, base=None, **more) -> dict[str, torch.Tensor]:
    from checkpoints_conversion.merge_adapter import Merge, merge

    found = merge(Merge(str(root), str(folder), onto=onto, base=base, **more))
    assert (" onto the original weights" if onto == "original" else " onto the dequantised NF4") in str(found)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("load, flags", [("nf4", {}), ("double", {}), ("plain", {"base_precision": "nf4"})])
def test_merged_onto_what_is_chosen(load, flags, hf, roots, two_steps, tmp_path):
    """Onto the dequantised weights by default; onto the original ones by choice, which must be those that were quantised. PEFT adds the
    same to the original model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from checkpoints_conversion.adapter_export import export_adapter
    from checkpoints_conversion.megatron_to_hf import MegatronToHf
    from checkpoints_conversion.verify import Verify, verify
    from megatron_ft.errors import UserError
    from megatron_ft.files import read_json

    run = two_steps(load, tmp_path / "run", **flags)
    plain = merge_onto(run, tmp_path / "original", "original", roots["plain"], params_dtype="bf16")
    usual = merge_onto(run, tmp_path / "usual")
    if load != "plain":
        chosen = merge_onto(run, tmp_path / "dequantized", "dequantized", roots["plain"], params_dtype="bf16")
        assert all(torch.equal(usual[name], chosen[name]) for name in usual)
    assert not all(torch.equal(usual[name], plain[name]) for name in usual)
    export_adapter(MegatronToHf(str(run), str(tmp_path / "peft"), adapter_only=True), None)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(model, tmp_path / "peft").merge_and_unload().state_dict()
    assert all(torch.equal(plain[name], theirs[name]) for name in plain)
    assert "merged onto the original weights" in (tmp_path / "original" / "README.md").read_text()
    assert "merged onto the dequantised NF4" in (tmp_path / "usual" / "README.md").read_text()

    for name, onto, base in (("original", "original", roots["plain"]), ("usual", None, None)):
        made = verify(
            Verify(str(tmp_path / name), str(run), base=base, onto=onto, logits=load == "nf4", tolerance=1e-3)
        )
        said = "the original weights" if onto else "the dequantised NF4 weights"
        assert read_json(made.path)["base"]["merged_onto"].startswith(said)
    with pytest.raises(UserError, match="differs between"):
        verify(Verify(str(tmp_path / "original"), str(run), logits=False))

    other = make_llama(tmp_path / "other", initializer_range=0.05, hidden_size=128, intermediate_size=256, head_dim=32)
    convert(HfToMegatron(str(other), str(tmp_path / "another"), params_dtype="bf16"))
    wrong = "not the model that" if load == "plain" else "is not the original of the model"
    with pytest.raises(UserError, match=wrong):
        merge_onto(run, tmp_path / "never", "original", str(tmp_path / "another"))
    assert not (tmp_path / "never").exists()


def test_a_choice_that_there_is_not(two_steps, tmp_path):
    from megatron_ft.errors import UserError

    two_steps("nf4", tmp_path / "nf4")
    with pytest.raises(UserError, match="is quantised: give the checkpoint of the original model with --base"):
        merge_onto(tmp_path / "nf4", tmp_path / "never", "original")
    two_steps("plain", tmp_path / "plain")
    for onto in ("original", "dequantized"):
        with pytest.raises(UserError, match="trained on weights that are not quantised: drop it"):
            merge_onto(tmp_path / "plain", tmp_path / "never", onto)
    assert not (tmp_path / "never").exists()

"""Adapters of PEFT here and ours in PEFT: the same losses, files, logits and merged weights."""

import json

import numpy as np
import pytest
import torch

from tests.parallel.jobs import SEQ_LENGTH, finetune, logits, make_llama, read_metrics, to_checkpoint
from tests.parallel.test_against_transformers import CLIP, LR, STEPS, WARMUP, rate, samples_of

peft = pytest.importorskip("peft", reason="peft is not installed")

MODULES = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    """An adapter that PEFT has made, with weights that matter."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    with_adapter(llama, MODULES).save_pretrained(folder)
    return folder


def with_adapter(hf, modules, dtype=torch.float32, **more):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False, **more
    )
    return peft.get_peft_model(model, config)


def loaded(hf, adapter, dtype=torch.float32, trainable=False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def export(checkpoint, folder):
    from checkpoints_conversion.megatron_to_hf import MegatronToHf, convert

    convert(MegatronToHf(input_dir=str(checkpoint), output_dir=str(folder), adapter_only=True))
    return folder


def merged(adapters, folder, **options) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    from checkpoints_conversion.merge_adapter import Merge, merge

    merge(Merge(input_dir=str(adapters), output_dir=str(folder), **options))
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def theirs(llama, adapter, shards):
    return their_run(llama, adapter, shards)


def their_run(llama, adapter, shards):
    """(losses, gradient norms, adapter's weights at the end) of a loop with PEFT and torch."""
    from megatron_ft.data.roles import ASSISTANT
    from megatron_ft.data.shards import open_shards

    model = loaded(llama, adapter, trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    opened, losses, norms = open_shards(shards), [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step)
        total, weight = 0.0, 0
        for sample in samples_of(shards, step):
            tokens, roles = opened.tokens(sample)[: SEQ_LENGTH + 1], opened.roles(sample)[: SEQ_LENGTH + 1]
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            own = torch.nn.functional.cross_entropy(
                model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="none"
            )
            mask = torch.from_numpy((roles[1:] == ASSISTANT).astype(np.float32))
            total, weight = total + (own * mask).sum(), weight + int(mask.sum())
        loss = total / weight
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses, norms, peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=["one process", "TP2xPP2"])
@pytest.mark.works("PEFT export", "LoRA", "padded rows", "distributed optimizer", "SP", "PP")
def test_trains_as_peft_does(layout, theirs, one_rank, four_ranks, checkpoint, adapter, shards, tmp_path):
    from safetensors.torch import load_file

    pool = four_ranks if layout == (2, 2) else one_rank
    pool.run(train, layout, checkpoint, shards, str(tmp_path / "tuned"), str(adapter))
    losses, norms, weights = theirs
    np.testing.assert_allclose(read_metrics(tmp_path / "tuned"), losses, rtol=1e-5)
    np.testing.assert_allclose(read_metrics(tmp_path / "tuned", "train/grad_norm"), norms, rtol=1e-4)
    assert len({round(loss, 3) for loss in losses}) > 3
    ours = load_file(export(tmp_path / "tuned", tmp_path / "out") / "adapter_model.safetensors")
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5, msg=name)


def train(layout, load, shards, save, adapter, **more):
    finetune(
        layout, load=load, data_path=[shards], save=save, report=False, adapter=adapter,
        **{
            "packing": False, "train_iters": STEPS, "lr": LR, "lr_warmup_iters": WARMUP, "adam_beta2": 0.95, "clip_grad": CLIP,
            "use_distributed_optimizer": layout == (2, 2), **more,
        },
    )  # fmt: skip


def test_an_adapter_comes_back_as_it_was(four_ranks, checkpoint, adapter, shards, tmp_path):
    """PEFT -> TP2 x PP2 -> PEFT, with a step that changes nothing: both files are byte-equal."""
    save = tmp_path / "same"
    four_ranks.run(still, checkpoint, shards, str(save), str(adapter))
    out = export(save, tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes(), name
    again = tmp_path / "again"
    four_ranks.run(still, checkpoint, shards, str(again), str(out))  # it has the hash of the model now
    assert json.loads((again / "iter_0000001" / "config.json").read_text())["adapter"]["base"]["weights"]


def still(load, shards, save, adapter):
    train((2, 2), load, shards, save, adapter, train_iters=1, lr=1e-30, lr_warmup_iters=0)


def test_our_adapter_in_peft(four_ranks, llama, checkpoint, shards, tmp_path):
    """Logits of base and adapter in PEFT are those of our model in TP2 x PP2, and of the merged model."""
    from tests.parallel.test_lora_runs import LORA, go

    go(four_ranks, checkpoint, shards, tmp_path / "run", 3, **(LORA | {"lora_rs": True}))
    config = json.loads((export(tmp_path / "run", tmp_path / "out") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (4, 8, True, 0.1)
    assert config["base_model_name_or_path"] == "hf" and len(config["target_modules"]) == 7
    model = loaded(llama, tmp_path / "out").eval()
    ids = torch.arange(40)[None] * 5 % 203
    with torch.no_grad():
        want, bare = model(ids).logits, model.get_base_model()
        with model.disable_adapter():
            base = bare(ids).logits
    found = merged(tmp_path / "run", tmp_path / "merged")
    state = model.merge_and_unload().state_dict()
    assert found.keys() <= state.keys() and all(torch.equal(found[name], state[name]) for name in found)
    ours = next(
        filter(lambda x: x is not None, four_ranks.run(logits, str(tmp_path / "run"), (2, 2), True, ids.numpy()))
    )
    assert abs(ours - want.numpy()).max() < 1e-4 and abs(want - base).max() > 1e-2


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.works("LoRA", "Hugging Face export")
def test_merged_weights_are_those_of_peft(dtype, llama, checkpoint, adapter, tmp_path):
    from megatron_ft.models.dtypes import torch_dtype

    model = loaded(llama, adapter, torch_dtype(dtype))
    want = model.merge_and_unload().state_dict()
    found = merged(adapter, tmp_path / "merged", base=checkpoint, params_dtype=dtype)
    changed = sum(not torch.equal(found[name], loaded_base(llama, dtype)[name]) for name in found)
    assert changed == len(MODULES) * 4
    for name, value in found.items():
        assert value.dtype == want[name].dtype and torch.equal(value, want[name]), name


def test_what_older_versions_have_written(llama, checkpoint, adapter, tmp_path):
    """adapter_model.bin is read without running code in it: the merged weights, and what verify compares, are those of safetensors."""
    old = tmp_path / "old"
    with_adapter(llama, MODULES).save_pretrained(old, safe_serialization=False)
    assert (old / "adapter_model.bin").is_file() and not (old / "adapter_model.safetensors").exists()
    want, found = (merged(one, tmp_path / f"{one.name}-merged", base=checkpoint) for one in (adapter, old))
    assert all(torch.equal(found[name], want[name]) for name in want)
    for content, words in (
        (Harmful(), "objects other than tensors"),
        ({}, "it is empty"),
        ({"strange": torch.ones(1)}, "adapter_model.bin has strange .* belongs to no linear"),
    ):
        torch.save(content, old / "adapter_model.bin")
        refused(old, checkpoint, tmp_path, words)
    (old / "adapter_model.bin").rename(old / "adapter_model.safetensors")
    refused(old, checkpoint, tmp_path, "give it the name adapter_model.bin")


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def refused(adapter, checkpoint, tmp_path, words):
    from megatron_ft.errors import UserError

    with pytest.raises(UserError, match=words) as caught:
        merged(adapter, tmp_path / "never", base=checkpoint)
    assert "\n" not in str(caught.value) and not (tmp_path / "never").exists()


def test_adapters_that_have_changed_their_base(llama, checkpoint, tmp_path):
    """PiSSA splits a weight into base and adapter. PEFT's plain LoRA of the difference is read."""
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    start, end, plain = (tmp_path / name for name in ("start", "end", "plain"))
    config.init_lora_weights = True
    model.save_pretrained(start)
    config.init_lora_weights = "pissa"
    torch.nn.init.normal_(model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained(end)
    refused(end, checkpoint, tmp_path, "save it as plain LoRA, with path_initial_model_for_weight_conversion")
    model.save_pretrained(plain, path_initial_model_for_weight_conversion=str(start))
    want = loaded(llama, plain).merge_and_unload().state_dict()
    found = merged(plain, tmp_path / "merged", base=checkpoint, params_dtype="fp32")
    assert all(torch.equal(found[name], want[name]) for name in found)


def loaded_base(hf, dtype):
    from safetensors.torch import load_file

    from megatron_ft.models.dtypes import torch_dtype

    return {name: value.to(torch_dtype(dtype)) for name, value in load_file(hf / "model.safetensors").items()}


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "tied"])
@pytest.mark.works("PEFT export", "new tokens", "tied embeddings", "padded rows", "SP", "PP")
def test_rows_of_tokens_are_trained_as_in_peft(tied, four_ranks, shards, tmp_path):
    """TP2 x PP2: ten steps, the export, and the merged model; tied tables have their rows on the first and the last stage."""
    from safetensors.torch import load_file

    hf = make_llama(tmp_path / "hf", tie_word_embeddings=tied)
    checkpoint = to_checkpoint(hf, tmp_path / "checkpoint", "torch_dist", 1, 1)
    tokens = [3, 77, 150, 202]
    chosen = tokens if tied else {"embed_tokens": tokens, "lm_head": tokens}
    with_adapter(hf, ["q_proj", "down_proj"], trainable_token_indices=chosen).save_pretrained(tmp_path / "adapter")
    losses, norms, weights = their_run(hf, tmp_path / "adapter", shards)
    four_ranks.run(train, (2, 2), checkpoint, shards, str(tmp_path / "tuned"), str(tmp_path / "adapter"))
    np.testing.assert_allclose(read_metrics(tmp_path / "tuned"), losses, rtol=1e-5)
    np.testing.assert_allclose(read_metrics(tmp_path / "tuned", "train/grad_norm"), norms, rtol=1e-4)
    out = export(tmp_path / "tuned", tmp_path / "out")
    ours, began = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "adapter"))
    assert ours.keys() == weights.keys() and sum("trainable_tokens" in name for name in ours) == (1 if tied else 2)
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5, msg=name)
        assert not torch.equal(ours[name], began[name])
    state = loaded(hf, out).merge_and_unload().state_dict()
    found = merged(tmp_path / "tuned", tmp_path / "merged")
    assert all(torch.equal(found[name], state[name]) for name in found)
    same = tmp_path / "same"
    four_ranks.run(still, checkpoint, shards, str(same), str(tmp_path / "adapter"))
    back = export(same, tmp_path / "back")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (back / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes(), name

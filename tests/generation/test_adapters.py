"""Adapters in use: the same answers from base and adapters, in any layout and kind of folder, as transformers' from the merged model."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from checkpoints_conversion.merge_adapter import Merge, merge
from megatron_ft.errors import UserError
from megatron_ft.models.architecture import Architecture
from tests.conversion.builders import make_llama, make_sentencepiece
from tests.errors.conftest import engine_desk
from tests.generation.test_loading import CHAT


@pytest.fixture(scope="module")
def place(one_rank, tmp_path_factory):
    """A model (hf, base, classic), a PEFT folder for it, a checkpoint of a run that trained it on, and both merged."""
    place = tmp_path_factory.mktemp("adapters")
    model = make_llama(place / "hf")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0) if weight.ndim > 1 else None
    model.save_pretrained(place / "hf")
    make_sentencepiece(place / "hf")
    convert(HfToMegatron(str(place / "hf"), str(place / "base"), chat_format="chatml"))
    convert(HfToMegatron(str(place / "hf"), str(place / "classic"), 2, 2, ckpt_format="torch", chat_format="chatml"))
    export(MegatronToHf(str(place / "base"), str(place / "export")))
    make_adapter(place / "peft", architecture(place / "base"))
    one_rank.run(train, str(place))
    for name, base in (("peft", str(place / "base")), ("run", None)):
        merge(Merge(str(place / name), str(place / f"{name}-merged"), base=base))
    return place


def architecture(root) -> Architecture:
    from megatron_ft.checkpoints.folder import describe, find_checkpoint

    return describe(find_checkpoint(root)).architecture


def make_adapter(folder, arch, targets=("qkv", "fc2"), tokens=()):
    from megatron_ft.adapters.peft_files import config_of, write_peft
    from megatron_ft.adapters.spec import Lora, ordered

    lora = Lora(3, 6.0, ordered(targets, arch), new_tokens=tokens)
    stream = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=stream) * 0.3 for name, shape in lora.shapes(arch).items()}
    folder.mkdir()
    write_peft(folder, arch, lora, weights, config_of(lora, arch, "somebody/a-model"), None)


def train(place):
    from megatron_ft.data.roles import ASSISTANT
    from megatron_ft.data.shards import ShardWriter
    from tests.parallel.jobs import finetune

    vocab = architecture(f"{place}/base").vocab_size
    with ShardWriter(f"{place}/chats-train", vocab) as writer:
        for number in range(20):
            ids = np.random.default_rng(number).integers(0, vocab, 30)
            writer.add(ids, np.full(30, ASSISTANT, np.uint8))
    finetune(
        (1, 1), load=f"{place}/base", data_path=[f"{place}/chats-train"], save=f"{place}/run", adapter=f"{place}/peft",
        train_iters=3, lr=5e-2, lr_warmup_iters=0, report=False, seq_length=32,
    )  # fmt: skip


def ask(folder, layout, adapter=None):
    """The text of the answer to CHAT."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.generation.sampling import GREEDY

    with process_groups(ParallelSizes(*layout)) as here:
        return open_chat_model(folder, here, adapter=adapter).answers([CHAT], 12, GREEDY)[0]


def refusal(*args):
    with pytest.raises(UserError) as caught:
        ask(*args)
    return str(caught.value)


def transformers_says(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["peft", "run"])
@pytest.mark.works("generate", "LoRA", "TP", "PP")
def test_base_and_adapters_answer_as_the_merged_model(name, place, four_ranks):
    expected = transformers_says(place / f"{name}-merged")
    assert expected not in ("", transformers_says(place / "export"))
    pairs = [(place / base, place / name) for base in ("base", "classic", "export")]
    for folder, adapter in [*pairs, (place / f"{name}-merged", None), *([(place / "run", None)] * (name == "run"))]:
        assert four_ranks.run(ask, folder, (2, 2), adapter) == [expected] * 4, (folder, adapter)


def test_what_does_not_belong_together(place, four_ranks, tmp_path):
    assert (
        "is not the model that the adapters were trained with"
        in four_ranks.run(refusal, place / "peft-merged", (2, 2), place / "run")[0]
    )
    assert "holds a model, not adapters" in four_ranks.run(refusal, place / "base", (2, 2), place / "base")[0]
    shutil.copytree(place / "peft", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    for change, words in (
        ({"r": 4}, "this model with r 4 needs [4, "),
        ({"peft_type": "IA3"}, "only plain LoRA"),
        ({"use_dora": True}, "use_dora True: only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": -1}, "must be above 0"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"use_something_new": True}, "use_something_new is not known"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the model that the adapter belongs to"),
        ({"init_lora_weights": "olora"}, "has changed the model that the adapter belongs to"),
    ):
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | change))
        (said, *_) = four_ranks.run(refusal, place / "base", (2, 2), tmp_path / "other")
        assert words in said and "\n" not in said, said
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "adapter_model.safetensors").unlink()
    (said, *_) = four_ranks.run(refusal, place / "base", (2, 2), tmp_path / "other")
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in said


def test_an_adapter_of_another_shape(place, one_rank, tmp_path):
    import dataclasses

    arch = architecture(place / "base")
    for name, changes, words in (
        ("deep", {"num_layers": arch.num_layers + 1}, "belongs to no linear of this llama model"),
        ("shallow", {"num_layers": arch.num_layers - 1}, "adapters in some layers only"),
        ("wide", {"hidden_size": 2 * arch.hidden_size}, "the adapter is of another model"),
    ):
        make_adapter(tmp_path / name, dataclasses.replace(arch, **changes))
        assert words in one_rank.run(refusal, place / "base", (1, 1), tmp_path / name)[0]


def said(function, options) -> str:
    with pytest.raises(UserError) as caught:
        function(options)
    return str(caught.value)


def test_conversions_name_what_to_do(place, tmp_path):
    out = str(tmp_path / "out")
    assert "merge-adapter" in said(export, MegatronToHf(str(place / "run"), out))
    assert "drop --adapter_only" in said(export, MegatronToHf(str(place / "base"), out, adapter_only=True))
    assert "add --adapter_only" in said(export, MegatronToHf(str(place / "base"), out, base_model_name="x"))
    assert "give the checkpoint of its model with --base" in said(merge, Merge(str(place / "peft"), out))
    assert "holds a model, not adapters" in said(merge, Merge(str(place / "base"), out))
    convert(HfToMegatron(str(place / "peft-merged"), str(tmp_path / "other")))
    assert "is not the model that" in said(merge, Merge(str(place / "run"), out, base=str(tmp_path / "other")))
    assert not (tmp_path / "out").exists()


def test_the_exported_adapter_has_its_tokenizer(place, tmp_path):
    export(MegatronToHf(str(place / "run"), str(tmp_path / "out"), adapter_only=True, base_model_name="me/mine"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/mine" and config["r"] == 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert json.loads((tmp_path / "out" / "adapter_base.json").read_text()).keys() == {"fp32", "bf16", "fp16"}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data["base_model_relation"], card.data.library_name) == (
        "me/mine",
        "adapter",
        "peft",
    )
    assert "vllm serve me/mine --enable-lora --max-lora-rank 8 --lora-modules out=out\n" in card.text
    assert "| learning rate | 0.05 |" in card.text and "<|im_start|>user\nWhat colour is a plum?<|im_end|>" in card.text


@pytest.fixture
def pool(monkeypatch, four_ranks):
    """verify asks four waiting ranks instead of starting processes."""
    from checkpoints_conversion import answers
    from checkpoints_conversion.layout_logits import differences

    monkeypatch.setattr(
        answers, "differences_in_layout", lambda request, _: next(filter(None, four_ranks.run(differences, request)))
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_verify_a_merged_model(dtype, place, pool, tmp_path):
    """The base's hash, every merged weight, and the logits of transformers against base and adapters in TP2 x PP2."""
    from checkpoints_conversion.certificate import problem_with
    from checkpoints_conversion.verify import Verify, verify

    merge(Merge(str(place / "run"), str(tmp_path / "merged"), params_dtype=dtype))
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    made = verify(Verify(str(tmp_path / "merged"), str(place / "run"), base=str(place / "classic"), **sizes))
    content = made.content
    limit = 1e-3 if dtype == "fp32" else 1e-4  # base and adapters side by side round otherwise than their sum
    assert content["logits"]["largest_difference"] < limit and content["logits"]["tensor_model_parallel_size"] == 2
    assert content["base"]["equal"] == "bit for bit" and content["base"]["weights"]["fp32"]
    assert "the base is unchanged" in str(made) and problem_with(place / "run" / "iter_0000003") is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_verify_notices_a_wrong_sum(dtype, place, one_rank, monkeypatch, tmp_path):
    """Adapters with another scale, merged and compared by the same code: weights agree, logits of base and adapters do not."""
    from checkpoints_conversion import answers
    from checkpoints_conversion.verify import Verify, verify
    from megatron_ft.adapters.stored import Stored

    def in_layout(request, _):
        (found,) = one_rank.run(differences_of_wrong_sums, request)
        if isinstance(found, str):
            raise UserError(found)
        return found

    monkeypatch.setattr(answers, "differences_in_layout", in_layout)
    monkeypatch.setattr(Stored, "delta", wrong_delta(Stored.delta))
    merge(Merge(str(place / "run"), str(tmp_path / "merged"), params_dtype=dtype))
    found = said(verify, Verify(str(tmp_path / "merged"), str(place / "run")))
    assert ("the logits of base and adapters and of their sums differ" if dtype == "bf16" else "the logits of") in found


def wrong_delta(right):
    return lambda stored, layer, projection: 1.5 * right(stored, layer, projection)


def differences_of_wrong_sums(request):
    from checkpoints_conversion.layout_logits import differences
    from megatron_ft.adapters.stored import Stored

    right = Stored.delta
    Stored.delta = wrong_delta(right)
    try:
        return differences(request)
    except UserError as error:
        return str(error)
    finally:
        Stored.delta = right


def test_verify_an_exported_adapter_and_what_is_wrong(place, tmp_path):
    from safetensors.torch import load_file, save_file

    from checkpoints_conversion.verify import Verify, verify

    out = tmp_path / "out"
    export(MegatronToHf(str(place / "run"), str(out), adapter_only=True))
    assert (
        verify(Verify(str(out), str(place / "run"))).content["weights"]["tensors"]
        == 2 * 4 * architecture(place / "base").num_layers
    )
    assert "differs between" in said(verify, Verify(str(place / "peft-merged"), str(place / "run"), logits=False))
    assert "is not the model that" in said(
        verify, Verify(str(out), str(place / "run"), base=changed_base(place, tmp_path))
    )
    assert "drop --base" in said(verify, Verify(str(place / "hf"), str(place / "base"), base=str(place / "base")))
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"][3, 1] += 1e-6
    save_file(tensors, file, {"format": "pt"})
    damaged = Verify(str(out), str(place / "run"), verify_checkpoint=False)
    assert "layers.1.self_attn.k_proj.lora_B.weight differs" in said(verify, damaged)


def changed_base(place, tmp_path) -> str:
    convert(HfToMegatron(str(place / "peft-merged"), str(tmp_path / "changed")))
    return str(tmp_path / "changed")


def train_rows(place, save, until, flags):
    """A run with --train_new_tokens; the user's error, or None."""
    from tests.parallel.jobs import finetune

    values = {
        "load": f"{place}/base", "data_path": [f"{place}/chats-train"], "lora_rank": 2, "lora_dropout": 0.1, "train_new_tokens": True,
        "train_iters": until, "lr": 5e-2, "lr_warmup_iters": 0, "lr_decay_iters": 9, "report": False, "seq_length": 32,
        "auto_resume": True,
    }  # fmt: skip
    try:
        finetune((2, 2), save=save, **(values | flags))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "flags", [{}, {"bf16": True, "use_distributed_optimizer": True}], ids=["fp32", "bf16, distributed"]
)
@pytest.mark.works("new tokens", "resume", "SP", "PP", ["bf16", "distributed optimizer"])
@pytest.mark.works("new tokens", "generate", "TP", "PP")
def test_rows_of_added_tokens(flags, place, four_ranks, tmp_path):
    """A stop changes no bit; the rows change, others do not; base and adapters answer as the merged model."""
    from safetensors.torch import load_file

    from megatron_ft.checkpoints.folder import find_checkpoint
    from megatron_ft.checkpoints.verify import tensor_hashes

    for name, until in (("straight", (4,)), ("resumed", (2, 4))):
        for steps in until:
            assert four_ranks.run(train_rows, str(place), str(tmp_path / name), steps, flags) == [None] * 4
    one, other = (tensor_hashes(find_checkpoint(tmp_path / name)) for name in ("straight", "resumed"))
    assert one == other
    assert [name for name in one if name.startswith("model.") and name.endswith("rows [0, 0]")]
    merge(Merge(str(tmp_path / "straight"), str(tmp_path / "merged"), params_dtype="fp32"))
    merged, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", place / "export"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (merged[name] != before[name]).any(1).nonzero().flatten().tolist()
        assert changed == [len(merged[name]) - 2, len(merged[name]) - 1], name
    expected = transformers_says(tmp_path / "merged")
    assert four_ranks.run(ask, tmp_path / "straight", (2, 2)) == [expected] * 4


def test_rows_that_cannot_be_trained(place, four_ranks, one_rank, tmp_path):
    plain = tmp_path / "plain"
    convert(HfToMegatron(str(place / "hf"), str(plain)))
    no = str(tmp_path / "no")

    def refused(**flags):
        return four_ranks.run(train_rows, str(place), no, 2, flags)[0]

    assert "no tokens were added to the model's vocabulary" in refused(load=str(plain))
    assert "add --lora_rank, or drop --train_new_tokens" in refused(lora_rank=None, lora_dropout=None)
    assert "continues from train no rows of tokens" in refused(load=str(place / "run"), lora_rank=None)
    arch = architecture(place / "base")
    make_adapter(tmp_path / "peft", arch, tokens=(arch.vocab_size - 1,))
    assert "its tokenizer lacks added tokens" in one_rank.run(refusal, plain, (1, 1), tmp_path / "peft")[0]
    assert not (tmp_path / "no").exists()


def test_commands_that_take_a_checkpoint_of_adapters(place, tmp_path):
    """A rehearsal has small new adapters like those of the run; what needs the model says what to give."""
    run = str(place / "run")
    flags = (
        "--data_path",
        f"{place}/chats-train",
        "--seq_length",
        "32",
        "--train_iters",
        "3",
        "--nproc_per_node",
        "2",
        "--rehearse",
    )
    done = command("finetune", "--load", run, *flags, "--tensor_model_parallel_size", "2")
    assert done.code == 0, done.err
    assert "rehearsal passed" in done.out and "LoRA of rank 3" in done.out + done.err
    for words, message in (
        (
            ("verify-invariance", "--load", run, "--no_shrink"),
            "holds adapters: give the checkpoint of their model, and --lora_rank",
        ),
        (("reshard", run, str(tmp_path / "re")), "holds adapters, not a model: merge them"),
    ):
        done = command(*words)
        assert done.code == 2 and message in done.err and "Traceback" not in done.err, done.err


def command(*words):
    """What a command line leaves, run on the desk that has imported the engine."""
    return engine_desk()(*words, patience=150)

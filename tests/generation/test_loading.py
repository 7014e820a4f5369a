"""A model to talk to: the same answers from a checkpoint in any layout and from its export; nothing damaged is believed."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.errors import DamagedError
from tests.conversion.builders import make_llama, make_sentencepiece

CHAT = [{"role": "user", "content": "a plum"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder of one model: torch_dist, classic TP2 x PP2, an export in one file, in several, as pytorch_model.bin."""
    place = tmp_path_factory.mktemp("chat_models")
    model = make_llama(place / "source")
    with torch.no_grad():  # answers that are not one word again and again
        for weight in model.parameters():
            weight.mul_(3.0) if weight.ndim > 1 else None
    model.save_pretrained(place / "source")
    make_sentencepiece(place / "source")
    source = str(place / "source")
    convert(HfToMegatron(source, str(place / "torch_dist"), ckpt_format="torch_dist", chat_format="chatml"))
    convert(HfToMegatron(source, str(place / "torch"), 2, 2, chat_format="chatml", ckpt_format="torch"))
    for name, size in (("hf", "5GB"), ("hf-shards", "60KB")):
        export(MegatronToHf(str(place / "torch"), str(place / name), max_shard_size=size))
    shutil.copytree(place / "hf", place / "pickled", ignore=shutil.ignore_patterns("digests.json", "*.safetensors"))
    torch.save(AutoModelForCausalLM.from_pretrained(place / "hf").state_dict(), place / "pickled" / "pytorch_model.bin")
    return place


def ask(folder, layout, digests=True):
    """(ids of the answer to CHAT, its text)."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.generation.sampling import GREEDY

    with process_groups(ParallelSizes(*layout)) as here:
        model = open_chat_model(folder, here, digests=digests)
        (ids,) = model.decoder.generate([model.prompt_ids(CHAT)], 12)
        return ids, model.answers([CHAT], 12, GREEDY)[0]


@pytest.fixture(scope="module")
def expected(folders):
    """What transformers answers, from the export."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "hf")
    model = AutoModelForCausalLM.from_pretrained(folders / "hf")
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["torch_dist", "torch", "hf", "hf-shards", "pickled"])
def test_every_kind_of_folder_answers_alike(name, folders, four_ranks, expected):
    assert len(expected) > 5
    assert [text for _, text in four_ranks.run(ask, folders / name, (2, 2))] == [expected] * 4


@pytest.mark.parametrize(
    "name, file",
    [
        ("torch_dist", "release/__0_0.distcp"),
        ("torch", "release/mp_rank_00_001/model_optim_rng.pt"),
        ("torch", "release/tokenizer/tokenizer.model"),
        ("hf-shards", "model-00002-of-00004.safetensors"),
        ("hf", "generation_config.json"),
    ],
)
def test_a_flipped_bit_is_refused_by_every_rank(name, file, folders, four_ranks, tmp_path):
    shutil.copytree(folders / name, tmp_path / "copy")
    path = tmp_path / "copy" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    said = four_ranks.run(refusal, tmp_path / "copy", (2, 2))
    assert len(set(said)) == 1 and file.split("/")[-1] in said[0] and "digest" in said[0]


def refusal(folder, layout):
    with pytest.raises(DamagedError) as caught:
        ask(folder, layout)
    return str(caught.value)


def test_what_was_changed_on_purpose_is_believed_when_asked(folders, four_ranks, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(
        json.dumps({**config, "rope_theta": 20000.0, "rope_parameters": None})
    )
    first = four_ranks.run(ask, folders / "hf", (2, 1))[0]
    assert four_ranks.run(ask, tmp_path / "copy", (2, 1), False)[0] != first


def test_control_tokens_inside_an_answer_leave_no_gap(folders):
    """As transformers decodes it, wherever they stand."""
    ours, theirs = load_tokenizer(folders / "hf"), AutoTokenizer.from_pretrained(folders / "hf")
    words, end = ours.encode("plum ab").tolist(), ours.token_id("<|im_end|>")
    for ids in ([*words, end, *words], [end, *words], [*words, end, end], [*words[:2], end, *words[2:]], [end]):
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)

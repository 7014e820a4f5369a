"""A model to talk to: the same answers from a checkpoint in any layout and from its export; nothing damaged is believed."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.commands.generate import COMMAND, run
from megatron_ft.config.cli import run_script
from megatron_ft.config.sections import Processes
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.errors import ConfigError, DamagedError
from tests.conversion.builders import make_llama, make_sentencepiece
from tests.errors.conftest import engine_desk

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


def answer_until(folder, layout, stop):
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.generation.sampling import GREEDY

    with process_groups(ParallelSizes(*layout)) as here:
        model = open_chat_model(folder, here)
        return model.answers([CHAT, CHAT], 12, GREEDY, stop=stop)


def test_stop_strings_are_those_of_transformers(folders, expected, one_rank, four_ranks):
    """Strings from the middle of the answer, most of which begin or end within a token, and one that does not occur."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "hf")
    model = AutoModelForCausalLM.from_pretrained(folders / "hf")
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    middle = len(expected) // 2
    for stop in (expected[middle : middle + 3], expected[middle - 1 : middle + 4], expected[-2:], "no such text"):
        options = {"max_new_tokens": 12, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
        theirs = model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(theirs, skip_special_tokens=True)
        cut = text.split(stop)[0].strip()
        assert one_rank.run(answer_until, folders / "torch_dist", (1, 1), [stop]) == [[cut, cut]]
    for answers in four_ranks.run(answer_until, folders / "torch", (2, 2), [stop, expected[middle]]):
        assert answers == [expected.split(expected[middle])[0].strip()] * 2


def streamed(folder, layout, stop, patience):
    """(what was shown, the answer) of a model that is halted after some tokens."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation.loading import open_chat_model
    from megatron_ft.generation.sampling import GREEDY

    with process_groups(ParallelSizes(*layout)) as here:
        model, shown, asked = open_chat_model(folder, here), [], iter(range(patience))
        is_halted = lambda: next(asked, None) is None  # noqa: E731
        answer = model.stream(model.prompt_ids(CHAT), 12, GREEDY, 0, stop, shown.append, is_halted)
        return "".join(shown), answer


def test_a_growing_answer_is_the_answer(folders, expected, one_rank, four_ranks):
    """Whole, before a stop string, and halted after three tokens, on every rank."""
    ((shown, answer),) = one_rank.run(streamed, folders / "torch_dist", (1, 1), [], 99)
    assert shown == answer.text == expected and (answer.tokens, answer.full, answer.halted) == (12, True, False)
    stop = expected[len(expected) // 2 :][:3]
    ((shown, answer),) = one_rank.run(streamed, folders / "torch_dist", (1, 1), [stop], 99)
    assert shown == answer.text == expected.split(stop)[0].strip() and not answer.full
    for shown, answer in four_ranks.run(streamed, folders / "torch", (2, 2), [], 2):
        assert shown == answer.text and expected.startswith(shown)
        assert (answer.tokens, answer.full, answer.halted) == (3, False, True)


def dtype_of(folder, bf16):
    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.generation.loading import open_chat_model

    with process_groups() as here:
        return str(next(open_chat_model(folder, here, bf16=bf16).decoder.model.parameters()).dtype)


def test_exports_in_bf16_are_computed_in_bf16(folders, one_rank, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders / "hf").bfloat16().save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(folders / "hf").save_pretrained(tmp_path / "bf16")
    cases = [("hf", None), ("torch_dist", None), (tmp_path / "bf16", None), (tmp_path / "bf16", False), ("hf", True)]
    found = [one_rank.run(dtype_of, folders / folder, bf16)[0].removeprefix("torch.") for folder, bf16 in cases]
    assert found == ["float32", "float32", "bfloat16", "float32", "bfloat16"]


def test_several_answers_and_the_processes_of_a_layout(folders, tmp_path):
    """--tensor_model_parallel_size alone starts the processes. The speed is printed."""
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "a plum"}\n{"prompt": "a longer question about plums"}\n')
    words = (
        f"--load {folders / 'torch_dist'} --prompts {asked} --output {tmp_path / 'answers.jsonl'} --max_new_tokens 6"
    )
    layout = "--tensor_model_parallel_size 2 --temperature 1.5 --num_return_sequences 3"
    done = engine_desk()("generate", *words.split(), *layout.split())
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a plum", "a longer question about plums"]
    for line in lines:
        assert len(line["answers"]) == 3 and line["answer"] == line["answers"][0] and len(set(line["answers"])) > 1
    assert re.search(
        r"tokens of prompts \([\d,.]+ tokens/s\), \d+ new tokens \([\d,.]+ tokens/s\)", done.err + done.out
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num_return_sequences 2", "needs --temperature above 0"),
        ("--num_return_sequences 0", "must be at least 1"),
        ("--repetition_penalty 0", "must be above 0"),
        ("--stop ''", "empty string"),
    ],
)
def test_mistakes_in_sampling_are_one_line(flags, said, capsys):
    assert run_script(COMMAND, run, ["--load", "none", "--prompt", "a", *shlex.split(flags)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def sizes(load, adapter=None, world=None, **given):
    """The layout that is chosen without GPUs."""
    from megatron_ft.commands.layout_choice import Asked, GenerationLayout, sizes_for

    return sizes_for([Asked(str(one), adapter) for one in load], GenerationLayout(**given), Processes(world))


def test_a_layout_is_chosen_by_the_folder(folders, tmp_path):
    assert sizes([folders / "torch_dist"]) == sizes([folders / "hf"]) == (1, 1)
    assert sizes([folders / "torch"]) == sizes([folders / "hf", folders / "torch"]) == (2, 2)
    assert sizes([folders / "torch"], tensor_model_parallel_size=4) == (4, 1)  # what is given is not changed
    assert sizes([folders / "torch"], world=4) == (1, 1)  # the ranks choose
    convert(HfToMegatron(str(folders / "source"), str(tmp_path / "other"), 1, 2, ckpt_format="torch"))
    with pytest.raises(ConfigError, match=r"classic format for TP2 x PP2, .*other for TP1 x PP2: make a torch_dist"):
        sizes([folders / "torch", tmp_path / "other"])
    with pytest.raises(ConfigError, match="--pipeline_model_parallel_size 0 must be at least 1"):
        sizes([folders / "torch"], pipeline_model_parallel_size=0)


def test_a_classic_checkpoint_of_more_processes_than_a_machine_is_refused(folders, monkeypatch):
    monkeypatch.setattr("megatron_ft.device.memories", lambda: [80 * 10**9] * 2)
    with pytest.raises(
        ConfigError, match=r"TP2 x PP2, 4 processes, and this machine has 2 GPUs: start them on several"
    ):
        sizes([folders / "torch"])


def test_chat_over_several_processes_reads_the_terminal(folders, expected):
    """A classic checkpoint starts its four processes; the first one reads, and all answer. A pipe sees the answers alone."""
    call = [sys.executable, "-m", "megatron_ft", "chat", str(folders / "torch"), "--max_new_tokens", "12"]
    typed = "a plum\n\n/new\na plum\n"
    done = subprocess.run(call, input=typed, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [expected, expected] and "a new conversation" in done.stderr

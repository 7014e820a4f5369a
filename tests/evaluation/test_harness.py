"""lm-eval on our ranks: the scores of lm-eval's own class for transformers on the same model.

In several layouts, from a checkpoint and from its export, for another family, with adapters.
"""

import contextlib
import functools
import importlib.util
import io
import json
import shutil

import pytest
import torch

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.megatron_to_hf import MegatronToHf
from checkpoints_conversion.megatron_to_hf import convert as export
from megatron_ft.commands.evaluate_harness import HarnessModel, HarnessTasks, check, names_of
from megatron_ft.errors import ConfigError
from tests.conversion.builders import make_family, make_sentencepiece

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
TASKS = ["local_choice", "local_answer", "local_text"]
COMMON = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
    train: {data}
test_split: test
fewshot_split: train
fewshot_delimiter: ' '
fewshot_config:
  sampler: first_n
"""
YAML = {
    "local_choice": """output_type: multiple_choice
doc_to_text: '{{q}}'
doc_to_choice: '{{choices}}'
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "local_answer": """output_type: generate_until
doc_to_text: '{{q}}'
doc_to_target: '{{answer}}'
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12}
metric_list:
  - metric: exact_match
""",
    "local_text": """output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}}'
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
}
# Only letters and spaces: transformers' LlamaTokenizer drops characters that a vocabulary without bytes does not have.
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with tokenizer and chat template, its checkpoint and the export of it; a Falcon; a folder of tasks."""
    if importlib.util.find_spec("lm_eval"):  # before ranks are forked, which need not import it again
        import lm_eval.models.huggingface  # noqa: F401
        import peft  # noqa: F401
    place = tmp_path_factory.mktemp("harness")
    make_sentencepiece(place / "tokenizer")
    for name, family in (("model", "llama"), ("falcon", "falcon 40b")):
        make_family(place / name, family, bos_token_id=1, eos_token_id=2)
        give_tokenizer(place, name)
    convert(HfToMegatron(str(place / "model"), str(place / "checkpoint")))
    export(MegatronToHf(str(place / "checkpoint"), str(place / "export")))
    rows = [
        {
            "q": f"which plum is the {'abcdefg'[n]} of them",
            "choices": [" a red plum", " two", " green apples and pears"],
            "gold": n % 3,
            "answer": "plum",
            "text": "a small plum and the apple " * (2 + 3 * n),
        }
        for n in range(7)
    ]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "tasks").mkdir()
    for name, text in YAML.items():
        common = COMMON.format(data=place / "data.jsonl")
        (place / f"tasks/{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return place


def give_tokenizer(place, name):
    """Put a tokenizer with a chat template into the folder of a model."""
    shutil.copy(place / "tokenizer/tokenizer.model", place / name)
    (place / name / "chat_template.jinja").write_text(TEMPLATE)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, **names}
    (place / name / "tokenizer_config.json").write_text(json.dumps(config))


def run_ours(place, output, layout=(1, 1), shots=0, chat=False, load="model", adapter=None):
    """Return the answers of the command as a rank runs it; it writes harness.json."""
    from megatron_ft.commands.evaluate_harness import run
    from megatron_ft.commands.generate import GenerationLayout
    from megatron_ft.config.sections import Processes
    from megatron_ft.evaluation.harness.lm import RanksLM

    said, answers = [], RanksLM.generate_until

    def kept(self, requests, disable_tqdm=False):
        found = answers(self, requests, disable_tqdm)
        said.extend(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(place / "cache"))
        patch.setattr(RanksLM, "generate_until", kept)
        model = HarnessModel(
            str(place / load),
            str(place / adapter) if adapter else None,
            max_length=64,
            batch_size=3,
            add_bos_token=True,
        )
        tasks = HarnessTasks(
            TASKS, [str(place / "tasks")], num_fewshot=shots, apply_chat_template=chat, output=str(output)
        )
        assert run(model, tasks, GenerationLayout(*layout), Processes()) == 0
    return said


def written(output):
    return json.loads((output / "harness.json").read_text())["results"]


@functools.cache
def run_theirs(place, shots=0, chat=False, load="model", **options):
    """Return the same of lm-eval's class for transformers."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(str(place / load), device="cpu", dtype="float32", max_length=64, batch_size=3, **options)
    results = lm_eval.simple_evaluate(
        lm, tasks=TASKS, task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        num_fewshot=shots, apply_chat_template=chat,
    )  # fmt: skip
    answers = [sample["resps"][0][0] for sample in results["samples"]["local_answer"]]
    return results["results"], answers


@needs_lm_eval
@pytest.mark.parametrize("shots, chat", [(0, False), (2, False), (1, True)])
def test_scores_are_those_of_transformers(place, one_rank, four_ranks, tmp_path, monkeypatch, shots, chat):
    monkeypatch.setenv("HF_HOME", str(place / "cache"))
    theirs, answers = run_theirs(place, shots, chat)
    layouts = [(one_rank, (1, 1)), (four_ranks, (2, 2)), (four_ranks, (2, 1))]
    for ranks, layout in layouts[: None if shots == 0 else 2]:
        output = tmp_path / f"{layout}"
        for said in ranks.run(run_ours, place, output, layout, shots, chat):
            assert said == answers and any(answers)
        assert_same(written(output), theirs)


def assert_same(ours, theirs):
    for task in TASKS:
        numbers = {key: value for key, value in theirs[task].items() if isinstance(value, float)}
        assert numbers and {key: ours[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)


@needs_lm_eval
def test_a_checkpoint_and_its_export_have_the_same_scores(place, one_rank, four_ranks, tmp_path):
    (said,) = one_rank.run(run_ours, place, tmp_path / "export", (1, 1), 0, False, "export")
    for others in four_ranks.run(run_ours, place, tmp_path / "checkpoint", (2, 2), 0, False, "checkpoint"):
        assert others == said and any(said)
    assert_same(written(tmp_path / "checkpoint"), written(tmp_path / "export"))


@needs_lm_eval
def test_falcon_in_two_stages(place, four_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(place / "cache"))
    theirs, answers = run_theirs(place, load="falcon")
    for said in four_ranks.run(run_ours, place, tmp_path, (2, 2), 0, False, "falcon"):
        assert said == answers
    assert_same(written(tmp_path), theirs)


@needs_lm_eval
def test_adapters(place, four_ranks, tmp_path, monkeypatch):
    """Of PEFT, which reads them for the other side; they change the scores."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(place / "model"), config).save_pretrained(place / "peft")
    monkeypatch.setenv("HF_HOME", str(place / "cache"))
    theirs, answers = run_theirs(place, peft=str(place / "peft"))
    for load in ("model", "checkpoint"):
        for said in four_ranks.run(run_ours, place, tmp_path / load, (2, 1), 0, False, load, "peft"):
            assert said == answers
        assert_same(written(tmp_path / load), theirs)
    plain, key = run_theirs(place)[0], "word_perplexity,none"
    assert abs(plain["local_text"][key] / theirs["local_text"][key] - 1) > 0.01


@needs_lm_eval
def test_only_the_first_rank_shows_progress(place, four_ranks, tmp_path):
    shown = four_ranks.run(shown_by, place, tmp_path, (2, 1))
    assert "requests scored" in shown[0] and "requests answered" in shown[0]
    assert not any("%|" in text for text in shown[1:])  # no bar


def shown_by(place, output, layout):
    """Return what a rank writes to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        run_ours(place, output, layout)
    return shown.getvalue()


@pytest.mark.parametrize(
    "given, model, message",
    [
        ({"tasks": []}, {}, "--tasks is needed"),
        ({"task_folders": []}, {}, "--task_folders is needed"),
        ({"task_folders": ["nowhere"]}, {}, "--task_folders nowhere: no folder with YAML files"),
        ({"limit": 0}, {}, "--limit 0"),
        ({"num_fewshot": -1}, {}, "--num_fewshot"),
        ({}, {"batch_size": 0}, "--batch_size 0"),
        ({}, {"max_length": 1}, "--max_length 1"),
    ],
)
def test_refused(place, given, model, message):
    tasks = HarnessTasks(**{"tasks": TASKS, "task_folders": [str(place / "tasks")], **given})
    with pytest.raises(ConfigError, match=message):
        check(HarnessModel("x", **model), tasks)


def test_without_lm_eval_the_way_to_install_it_is_said(place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm-eval is not installed: pip install .megatron_ft\[harness\]"):
        check(HarnessModel("x"), HarnessTasks(TASKS, [str(place / "tasks")]))


def test_names_of_tasks_are_separated_by_commas_or_spaces():
    assert names_of(HarnessTasks(["a,b", "c"])) == ["a", "b", "c"]


@needs_lm_eval
def test_an_unknown_task_is_named(place, one_rank):
    with pytest.raises(AssertionError, match=r"--tasks local_chioce: no such task in .*did you mean local_choice"):
        one_rank.run(unknown, place)


def unknown(place):
    from megatron_ft.evaluation.harness.run import task_manager

    task_manager([str(place / "tasks")], False, ["local_chioce"])

"""lm-eval on our ranks: the scores of lm-eval's own class for transformers on the same model, in one process and in TP2 x PP2."""

import importlib.util
import json
import shutil

import pytest

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
    """A model with tokenizer and chat template, and a folder of tasks."""
    place = tmp_path_factory.mktemp("harness")
    make_family(place / "model", "llama")
    make_sentencepiece(place / "tokenizer")
    shutil.copy(place / "tokenizer/tokenizer.model", place / "model")
    (place / "model/chat_template.jinja").write_text(TEMPLATE)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, **names}
    (place / "model/tokenizer_config.json").write_text(json.dumps(config))
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


def run_ours(place, output, layout=(1, 1), shots=0, chat=False):
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
        model = HarnessModel(str(place / "model"), max_length=64, batch_size=3)
        tasks = HarnessTasks(
            TASKS, [str(place / "tasks")], num_fewshot=shots, apply_chat_template=chat, output=str(output)
        )
        assert run(model, tasks, GenerationLayout(*layout), Processes()) == 0
    return said


def written(output):
    return json.loads((output / "harness.json").read_text())["results"]


def run_theirs(place, shots, chat):
    """Return the same of lm-eval's class for transformers."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(str(place / "model"), device="cpu", dtype="float32", max_length=64, batch_size=3)
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
    for ranks, layout in ((one_rank, (1, 1)), (four_ranks, (2, 2)), (four_ranks, (2, 1))):
        output = tmp_path / f"{layout}"
        for said in ranks.run(run_ours, place, output, layout, shots, chat):
            assert said == answers and any(answers)
        for task in TASKS:
            numbers = {key: value for key, value in theirs[task].items() if isinstance(value, float)}
            assert numbers and {key: written(output)[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)


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

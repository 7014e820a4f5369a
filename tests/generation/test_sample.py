"""Sampling reports: Open-Assistant's layout, the settings' meaning, the page, and mistakes."""

import json
import re

import pytest

from megatron_ft.commands.sample import COMMAND, run
from megatron_ft.config.cli import run_script
from megatron_ft.generation.sampling import Sampling
from megatron_ft.generation.sampling_report import read_settings
from megatron_ft.report.side_by_side import write_side_by_side
from tests.conversion.builders import make_llama, make_sentencepiece
from tests.demo.test_report import Balanced

SETTINGS = {
    "default": {"generate_args": {"max_new_tokens": 5, "top_k": 40}},
    "configurations": [
        {"name": "greedy", "generate_args": {"do_sample": False}},
        {"name": "nucleus9", "generate_args": {"top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.2}},
    ],
}


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"a plum"\n{"prompt": "a <fig>"}\n')
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    return ["--prompts", str(tmp_path / "prompts.jsonl"), "--settings", str(tmp_path / "settings.json")]


def sample(words):
    return run_script(COMMAND, run, words)


def test_settings_mean_what_they_mean_in_transformers(asked, tmp_path):
    greedy, nucleus = read_settings(tmp_path / "settings.json")
    assert greedy.sampling == Sampling() and greedy.max_new_tokens == 5
    assert nucleus.sampling == Sampling(0.8, 40, 0.9, 1.2) and nucleus.max_new_tokens == 5


def test_the_report_has_the_published_layout(asked, tmp_path, one_rank):
    make_llama(tmp_path / "hf").save_pretrained(tmp_path / "hf")
    make_sentencepiece(tmp_path / "hf")
    words = ["--load", str(tmp_path / "hf"), *asked, "--num_samples", "3", "--report", str(tmp_path / "a.json")]
    assert one_rank.run(sample, words) == [0]
    report = json.loads((tmp_path / "a.json").read_text())
    assert list(report) == ["model_name", "date", "args", "prompts"]
    assert [entry["prompt"] for entry in report["prompts"]] == ["a plum", "a <fig>"]
    for entry in report["prompts"]:
        assert [(r["sampling_config"], len(r["outputs"])) for r in entry["results"]] == [("greedy", 1), ("nucleus9", 3)]
        assert entry["results"][1]["sampling_params"]["top_k"] == 40
    Balanced().feed((tmp_path / "a.html").read_text())


def test_the_page_puts_models_side_by_side(tmp_path):
    def report(name, prompt, setting, text):
        result = {"sampling_config": setting, "sampling_params": {}, "outputs": [text]}
        return {"model_name": name, "prompts": [{"prompt": prompt, "results": [result]}]}

    write_side_by_side([report("A", "p", "s", "of <A>"), report("B", "p", "s", "of B")], tmp_path / "x.html")
    html = (tmp_path / "x.html").read_text()
    Balanced().feed(html)
    row = re.search(r"<tbody><tr>(.*?)</tr>", html)[1]
    assert [re.sub(r"<[^>]+>", "", cell) for cell in row.split("</td>")[:3]] == ["s", "of &lt;A&gt;", "of B"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("prompts.jsonl", "", "contains no prompts"),
        ("prompts.jsonl", "[1]\n", "line 1: needs a text"),
        ("settings.json", "{}", "configurations"),
        ("settings.json", '{"configurations": [{"name": "a", "generate_args": {"num_beams": 2}}]}', "num_beams is not"),
        ("settings.json", '{"configurations": [{"name": "a", "generate_args": {"top_p": "x"}}]}', "top_p is 'x'"),
    ],
)
def test_mistakes_are_one_line(asked, tmp_path, capsys, file, text, said):
    (tmp_path / file).write_text(text)
    assert run_script(COMMAND, run, ["--load", str(tmp_path), *asked, "--report", str(tmp_path / "r.json")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "r.json").exists()

"""The command on tiny models: equal results in every layout, files of the result, comparisons, and what it refuses."""

import json
from dataclasses import replace

import pytest

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from megatron_ft.commands.evaluate_retrieval import COMMAND, RetrievalModels, RetrievalPrompts, check
from megatron_ft.config.cli import parse
from megatron_ft.errors import UserError
from tests.conversion.builders import make_llama, make_sentencepiece

PROMPTS = RetrievalPrompts(
    lengths=["450,600"], depths=2, samples=2, key_digits=2, max_new_tokens=5, tasks=["key-value", "lines"]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model as an export (hf) and as a checkpoint (ckpt), with 600 positions."""
    place = tmp_path_factory.mktemp("retrieval")
    make_llama(place / "hf", max_position_embeddings=600)
    make_sentencepiece(place / "hf")
    convert(HfToMegatron(str(place / "hf"), str(place / "ckpt"), chat_format="chatml"))
    return place


def measure(models, prompts, sizes=(1, 1)):
    """Run the command in ranks that are there already; return the text of its error, if there is one."""
    from megatron_ft.commands.evaluate_retrieval import run
    from megatron_ft.commands.generate import GenerationLayout
    from megatron_ft.config.sections import Processes

    try:
        run(models, prompts, GenerationLayout(*sizes), Processes())
    except UserError as error:
        return str(error)
    return ""


def rows(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_every_layout_gives_the_same_answers(place, one_rank, four_ranks):
    models = RetrievalModels(load=[str(place / "ckpt")], output=str(place / "one"))
    assert one_rank.run(measure, models, PROMPTS) == [""]
    expected = rows(place / "one")
    assert len(expected) == 2 * 2 * 2 * 2 and {row["model"] for row in expected} == {"ckpt"}
    assert all(row["length"] - 80 < row["tokens"] <= row["length"] - 5 for row in expected)
    for sizes in ((2, 2), (1, 1)):
        said = four_ranks.run(measure, replace(models, output=str(place / "four")), PROMPTS, sizes)
        assert said == [""] * 4 and rows(place / "four") == expected, sizes
    result = json.loads((place / "one" / "retrieval.json").read_text())
    assert result["lengths"] == [450, 600] and set(result["models"][0]["tasks"]) == {"key-value", "lines"}
    assert (place / "one" / "retrieval.html").is_file()


def test_several_models_and_earlier_results(place, one_rank, capfd):
    """Measured together or one by one, models give the same comparison."""
    both = RetrievalModels([str(place / "ckpt"), str(place / "hf")], ["PI", "YaRN"], output=str(place / "both"))
    prompts = replace(PROMPTS, tasks=["lines"], lengths=["450"], system="You are Alfred.")
    assert one_rank.run(measure, both, prompts) == [""]
    for load, name in zip(both.load, both.names, strict=True):
        assert one_rank.run(measure, RetrievalModels([load], [name], output=str(place / name)), prompts) == [""]
    files = [str(place / name / "retrieval.json") for name in both.names]
    joined = RetrievalModels(results=files, output=str(place / "joined"))
    assert one_rank.run(measure, joined, prompts) == [""]
    together, apart = (json.loads((place / name / "retrieval.json").read_text()) for name in ("both", "joined"))
    assert together == apart and [model["name"] for model in apart["models"]] == ["PI", "YaRN"]
    assert (place / "joined" / "comparison.svg").is_file()
    other = replace(prompts, seed=9)
    assert one_rank.run(measure, RetrievalModels([both.load[0]], output=str(place / "other")), other) == [""]
    mixed = replace(joined, results=[files[0], str(place / "other" / "retrieval.json")])
    (said,) = one_rank.run(measure, mixed, prompts)
    assert "measured with other seed than" in said
    (said,) = one_rank.run(measure, replace(joined, results=[str(place / "hf" / "config.json")]), prompts)
    assert "is not a result of evaluate retrieval" in said


def test_prompts_longer_than_the_positions(place, one_rank):
    models = RetrievalModels([str(place / "ckpt")], output=str(place / "long"))
    prompts = replace(PROMPTS, tasks=["lines"], lengths=["450", "800"], samples=1)
    (said,) = one_rank.run(measure, models, prompts)
    assert "--lengths 800: " in said and "has 600 positions" in said and "--rope_scaling_factor" in said
    assert "\n" not in said and not (place / "long").exists()
    assert one_rank.run(measure, models, replace(prompts, beyond_positions=True)) == [""]
    assert max(row["tokens"] for row in rows(place / "long")) > 600


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give either --load MODEL... or --results FILE..."),
        (["--load", "a", "--results", "b/c.json"], "give either"),
        (["--load", "a", "b", "--names", "c"], "--names has 1 names for 2 models"),
        (["--load", "x/a", "y/a"], "two models have the name a"),
        (["--load", "a", "b", "--adapter", "c"], "--adapter belongs to one model"),
        (["--load", "a", "--samples", "0"], "--samples must be at least 1"),
        (["--load", "a", "--depths", "0"], "--depths must be at least 1"),
        (["--load", "a", "--lengths", "2048,100"], "--lengths 100 leaves no room"),
        (["--load", "a", "--tasks", "lines,needle"], "--tasks needle: is no task"),
        (["--load", "a", "--lengths", "2k"], "--lengths 2k: must be whole numbers"),
    ],
)
def test_settings_that_do_not_fit(words, message):
    with pytest.raises(UserError) as caught:
        models, prompts, *_ = parse(COMMAND, words)
        check(models, prompts)
    assert message in str(caught.value) and "\n" not in str(caught.value)

"""The command on tiny models: equal results in every layout, files of the result, comparisons, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from checkpoints_conversion.merge_adapter import Merge, merge
from megatron_ft.commands.evaluate_retrieval import COMMAND, RetrievalModels, RetrievalPrompts, check
from megatron_ft.config.cli import parse
from megatron_ft.errors import UserError
from megatron_ft.files import digest
from tests.conversion.builders import make_llama, make_sentencepiece
from tests.generation.test_adapters import architecture, make_adapter

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
        folder = place / f"four-{sizes[0]}"
        said = four_ranks.run(measure, replace(models, output=str(folder)), PROMPTS, sizes)
        assert said == [""] * 4 and rows(folder) == expected, sizes
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
    joined = RetrievalModels(results=files, output=str(place / "joined"))  # with their recorded names
    assert one_rank.run(measure, joined, prompts) == [""]
    together, apart = (json.loads((place / name / "retrieval.json").read_text()) for name in ("both", "joined"))
    assert together == apart and [model["name"] for model in apart["models"]] == ["PI", "YaRN"]
    assert (place / "joined" / "comparison.svg").is_file()
    (said,) = one_rank.run(measure, joined, prompts)
    assert f"{place / 'joined'} exists and is not empty" in said


def test_adapters_of_a_model(place, one_rank):
    """Base and adapters answer as the model that they are merged into, and not as the base."""
    make_adapter(place / "peft", architecture(place / "ckpt"))
    merge(Merge(str(place / "peft"), str(place / "merged"), base=str(place / "ckpt")))
    prompts = replace(PROMPTS, lengths=["450"])
    answers = {}
    for name, load, adapter in (("with", "ckpt", str(place / "peft")), ("sum", "merged", None), ("base", "ckpt", None)):
        models = RetrievalModels([str(place / load)], ["A"], adapter=adapter, output=str(place / f"adapter-{name}"))
        assert one_rank.run(measure, models, prompts) == [""]
        answers[name] = [row["answer"] for row in rows(place / f"adapter-{name}")]
    assert answers["with"] == answers["sum"] != answers["base"]
    result = json.loads((place / "adapter-with" / "retrieval.json").read_text())
    assert result["models"][0]["adapter"] == str(place / "peft")


def test_files_that_prompts_are_made_of(place, one_rank):
    """The result holds the digest of each file that a task has read."""
    topics, documents = place / "topics.jsonl", place / "documents.jsonl"
    text = "I would like to discuss the topic of {}. It is a fine one."
    lines = [{"topic": f"m{n}", "conversation": text.format(f"m{n}")} for n in range(30)]
    topics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents.write_text('{"title": "a", "text": "b", "question": "c", "answers": ["b"]}\n' * 2)
    prompts = replace(PROMPTS, tasks=["topics"], lengths=["450"], topics=str(topics), documents=str(documents))
    models = RetrievalModels([str(place / "ckpt")], output=str(place / "files"))
    assert one_rank.run(measure, models, prompts) == [""]
    result = json.loads((place / "files" / "retrieval.json").read_text())
    assert (result["topics"], result["documents"]) == (digest(topics), None)


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
        (["--load", "a", "b", "--names", "c"], "--names has 1 name for 2 models"),
        (["--load", "x/a", "y/a"], "two models have the name a"),
        (["--load", "a", "b", "--adapter", "c"], "--adapter belongs to one model"),
        (["--load", "a", "--samples", "0"], "--samples must be at least 1"),
        (["--load", "a", "--depths", "0"], "--depths must be at least 1"),
        (["--load", "a", "--lengths", "2048,100"], "--lengths 100 leaves no room"),
        (["--load", "a", "--tasks", "lines,needle"], "--tasks needle: is no task"),
        (["--results", "a", "b", "--names", "c", "c"], "two models have the name c"),
        (["--load", "a", "--output", __file__], "is not a folder"),
        (["--load", "a", "--output", str(Path(__file__).parent)], "exists and is not empty"),
        (["--load", "a", "--lengths", "2k"], "--lengths 2k: must be whole numbers"),
    ],
)
def test_settings_that_do_not_fit(words, message):
    with pytest.raises(UserError) as caught:
        models, prompts, *_ = parse(COMMAND, words)
        check(models, prompts)
    assert message in str(caught.value) and "\n" not in str(caught.value)

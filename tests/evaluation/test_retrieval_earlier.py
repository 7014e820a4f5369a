"""Results of earlier measurements: their names, what they must have in common, and files that are none."""

import json

import pytest

from megatron_ft.commands.evaluate_retrieval import COMMAND, run
from megatron_ft.config.cli import parse
from megatron_ft.errors import UserError
from megatron_ft.evaluation.retrieval.earlier import SETTINGS, joined

CELL = {"score": 0.5, "prompts": 2, "tokens": 90, "depths": {"0": 0.0, "0.333333": 1.0}}
RESULT = {
    "seed": 0, "samples": 2, "max_new_tokens": 9, "system": None, "key_digits": 2, "topics": None, "documents": None,
    "lengths": [100], "depths": [0.0, 1 / 3], "models": [{"name": "llama", "tasks": {"lines": {"100": CELL}}}],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(name, **changed):
        path = tmp_path / name / "retrieval.json"
        path.parent.mkdir()
        path.write_text(json.dumps({**RESULT, **changed}))
        return str(path)

    return write


def named(*names):
    return [{**RESULT["models"][0], "name": name} for name in names]


def names_of(result):
    return [model["name"] for model in result["models"]]


def test_names(write):
    """Recorded names stay; --names renames all models, also several of one file."""
    files = [write("r1"), write("r2", models=named("a", "b"))]
    assert names_of(joined(files, [])) == ["llama", "a", "b"]
    assert names_of(joined(files, ["x", "y", "z"])) == ["x", "y", "z"]
    with pytest.raises(UserError, match="--names has 2 names for 3 models in --results"):
        joined(files, ["x", "y"])


def test_the_command(write, tmp_path, capsys):
    words = ["--results", write("r1"), write("r2", models=named("yarn")), "--output", str(tmp_path / "out")]
    assert run(*parse(COMMAND, words)) == 0
    assert "llama" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert names_of(result) == ["llama", "yarn"] and result["models"][0]["normalised"] == 1
    before = (tmp_path / "out" / "retrieval.json").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        run(*parse(COMMAND, words))
    assert (tmp_path / "out" / "retrieval.json").read_bytes() == before


def test_equal_names_leave_nothing_behind(write, tmp_path):
    words = ["--results", write("r1"), write("r2"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="two models have the same name: give each its own with --names"):
        run(*parse(COMMAND, words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_that_were_measured_differently(write, setting):
    other = {"system": "You are\nAlfred.", "topics": "xxh3:0", "documents": "xxh3:0", "lengths": [200], "depths": [0.5]}
    files = [write("r1"), write("r2", **{setting: other.get(setting, 7)})]
    with pytest.raises(UserError) as caught:
        joined(files, [])
    assert f"{files[1]}: measured with another --{setting} than {files[0]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_from_before_files_were_recorded(write, tmp_path):
    old = {key: value for key, value in RESULT.items() if key not in ("topics", "documents")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert len(joined([str(tmp_path / "old.json"), write("new")], [])["models"]) == 2


def task(**cells):
    return [{"name": "a", "tasks": {"lines": cells}}]


@pytest.mark.parametrize(
    "models, message",
    [
        (None, "not null"),
        ([], "not an empty one"),
        ({"a": 1}, "must be a list"),
        ("llama", "not text"),
        (["llama"], "model 1 must be an object, not text"),
        ([*named("a"), 3], "model 2 must be an object, not a number"),
        ([{"tasks": {}}], 'model 1 needs a "name"'),
        ([{"name": ["a"], "tasks": {}}], 'model 1 needs a "name"'),
        ([{"name": "a"}], "an entry for each task, not null"),
        ([{"name": "a", "tasks": {}}], "an entry for each task, not an empty one"),
        ([{"name": "a", "tasks": {"../x": {"100": CELL}}}], "'../x' is no task"),
        (task(), "task lines: needs an object with an entry for each length"),
        (task(long=CELL), "'long' is no length"),
        (task(**{"0100": CELL}), "'0100' is no length"),
        (task(**{"9" * 5000: CELL}), "is no length"),
        (task(**{"100": 0.5}), "length 100: must be an object, not a number"),
        (task(**{"100": {}}), "length 100: needs a score from 0 to 1"),
        (task(**{"100": {**CELL, "score": "0.5"}}), "needs a score from 0 to 1"),
        (task(**{"100": {**CELL, "score": float("nan")}}), "needs a score from 0 to 1"),
        (task(**{"100": {**CELL, "depths": [0.5]}}), "an entry for each depth, not a list"),
        (task(**{"100": {**CELL, "depths": {"start": 1}}}), "'start' is no depth"),
        (task(**{"100": {**CELL, "depths": {"0.5": None}}}), "depth 0.5: needs a score from 0 to 1"),
    ],
)
def test_files_that_are_damaged(write, models, message):
    path = write("r1", models=models)
    with pytest.raises(UserError) as caught:
        joined([path], [])
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and message in said and "\n" not in said


@pytest.mark.parametrize("content", [[], 3, None, {"models": []}, {**RESULT, "seed": 0, "models": 0} | {"x": 1}])
def test_files_that_are_no_results(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.json: "):
        joined([str(tmp_path / "a.json")], [])

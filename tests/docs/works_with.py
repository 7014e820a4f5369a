"""docs/works_with.md: which features run together, collected from the marks of the tests. `make docs` writes the page.

A test says what it runs: @pytest.mark.works("LoRA", "dropout", ["PP", "DP"]) runs LoRA with dropout in PP, and in DP; each two of them are
tried together, but not PP with DP. @pytest.mark.refuses("CP", "packing", says="...") names two that are refused, and words of the error.
The name of a group stands for all of it.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "works_with.md"

GROUPS = {
    "Layouts": {
        "TP": "tensor parallel, `--tensor_model_parallel_size`",
        "SP": "sequence parallel, `--sequence_parallel`",
        "PP": "pipeline parallel, `--pipeline_model_parallel_size`",
        "VPP": "interleaved stages, `--virtual_pipeline_model_parallel_size`",
        "uneven stages": "`--decoder_first_pipeline_num_layers`, `--pipeline_model_parallel_layout`",
        "CP": "context parallel, `--context_parallel_size`: on GPUs with Transformer Engine",
        "DP": "data parallel: more processes than TP x PP",
        "distributed optimizer": "`--use_distributed_optimizer`",
    },
    "Rows and numbers": {
        "packing": "several samples in a row, the default",
        "padded rows": "one sample in a row, `--no_packing`",
        "rows of variable length": "`--no_packing --variable_seq_lengths`",
        "bf16": "`--bf16`",
        "fp16": "`--fp16` with loss scaling",
        "recompute": "`--recompute_granularity`, full or selective",
        "dropout": "residual dropout, `--hidden_dropout`, also rising over the layers (`--lima_dropout`)",
    },
    "What is trained": {
        "LoRA": "adapters, `--lora_rank`",
        "NF4 base": "QLoRA, `--base_precision nf4` or a quantised checkpoint",
        "new tokens": "rows of added tokens, `--train_new_tokens`",
        "chosen parameters": "`--unfrozen_parameters`",
        "teacher": "distillation, the teacher in memory, `--teacher`",
        "stored teacher": "distillation, the teacher scored beforehand, `--teacher_logits`",
    },
    "Models": {
        "Falcon": "parallel block, LayerNorm",
        "Qwen3": "normed query and key heads, with the biases of Qwen2",
        "tied embeddings": "one table for embedding and output layer",
        "RoPE scaling": "linear, llama3, YaRN and others",
        "sliding window": "Mistral, Qwen2",
        "ReLU": "ReLU and squared ReLU, also gated",
        "experts": "mixtures of experts",
    },
    "Runs": {
        "resume": "stop and continue in the same layout",
        "resume in another layout": "stop and continue in another layout",
        "background save": "`--async_save`",
        "classic checkpoints": "`--ckpt_format torch`",
        "answers while training": "`--sample_prompts`",
    },
    "Results": {
        "generate": "answers and logits",
        "Hugging Face export": "`megatron-to-hf`, `merge-adapter`",
        "PEFT export": "`megatron-to-hf --adapter_only`",
        "GPTQ, W4A16": "`megatron-to-hf --quantize gptq`, `w4a16`",
        "NF4, int8 export": "`megatron-to-hf --quantize nf4`, `int8`",
        "GGUF": "`megatron-to-hf --quantize gguf-q8_0`",
        "sparse decoding": "`generate --sparse`",
    },
}
FEATURES = [name for group in GROUPS.values() for name in group]
CONTAINS = {"SP": "TP", "VPP": "PP", "uneven stages": "PP", "NF4 base": "LoRA", "new tokens": "LoRA"}
"""A feature that there is only with another."""

INTRODUCTION = """# Does A work with B?

Made from the tests by `make docs`; do not edit. *yes*: a test runs both together and checks the result, mostly against one process,
transformers, or a run that was never stopped. *no*: refused with one line. Empty: no test combines the two. Nothing forbids that, but
nobody has tried it either; try it small first (`--rehearse`, `megatron-ft verify-invariance`). Each answer leads to its test below.

All of this ran on CPU processes. What ran on GPUs is in [README](../README.md#supported-features).
"""


@dataclass(frozen=True)
class Mark:
    """What a test says of itself. says: the error's words, of what is refused."""

    test: str
    works: bool
    features: tuple[tuple[str, ...], ...]
    says: str = ""

    def combinations(self) -> Iterator[frozenset[str]]:
        for chosen in itertools.product(*self.features):
            yield frozenset(chosen) | {CONTAINS[name] for name in chosen if name in CONTAINS}

    def pairs(self) -> set[frozenset[str]]:
        if not self.works:  # only the two that are named
            return {frozenset(chosen) for chosen in itertools.product(*self.features)}
        found = (itertools.combinations(sorted(names), 2) for names in self.combinations())
        return {frozenset(pair) for pairs in found for pair in pairs}


def marks() -> list[Mark]:
    """Return the marks of all tests, in the order of their files."""
    return [mark for path in sorted((ROOT / "tests").rglob("test_*.py")) for mark in _marks_of(path)]


def _marks_of(path: Path) -> Iterator[Mark]:
    if "pytest.mark." not in (text := path.read_text(encoding="utf-8")):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and (kind := _kind(call.func)):
                    yield _mark(f"{path.relative_to(ROOT)}::{node.name}", kind, call)


def _kind(function: ast.expr) -> str | None:
    found = re.fullmatch(r"pytest\.mark\.(works|refuses)", ast.unparse(function))
    return found and found[1]


def _mark(test: str, kind: str, call: ast.Call) -> Mark:
    values = [ast.literal_eval(argument) for argument in call.args]
    lists = [[value] if isinstance(value, str) else value for value in values]
    features = tuple(tuple(name for entry in entries for name in GROUPS.get(entry, (entry,))) for entries in lists)
    words = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return Mark(test, kind == "works", features, **words)


def page(found: list[Mark]) -> str:
    numbers = {test: number for number, test in enumerate(dict.fromkeys(mark.test for mark in found), 1)}
    cells = _cells(found, numbers)
    return "\n".join([INTRODUCTION, *_features(), *_tables(cells), *_tests(found, numbers)])


def _cells(found: list[Mark], numbers: dict[str, int]) -> dict[frozenset[str], str]:
    """Return the answer for each pair, with a link to the first test; "yes" where one combination runs and another is refused."""
    answers: dict[frozenset[str], str] = {}
    for mark in sorted(found, key=lambda mark: not mark.works):
        for pair in mark.pairs():
            answers.setdefault(pair, f"[{'yes' if mark.works else 'no'}](#t{numbers[mark.test]})")
    return answers


def _features() -> Iterator[str]:
    yield "| | |\n|---|---|"
    for group in GROUPS.values():
        yield from (f"| {name} | {meaning} |" for name, meaning in group.items())


def _tables(cells: dict[frozenset[str], str]) -> Iterator[str]:
    """One table a group: its features above, those and the features of later groups at the side."""
    for title, group in GROUPS.items():
        rows = FEATURES[FEATURES.index(next(iter(group))) :]
        lines = [(row, [cells.get(frozenset((row, name)), "") for name in group]) for row in rows]
        filled = [f"| {row} | {' | '.join(line)} |" for row, line in lines if any(line)]
        if filled:
            yield f"\n## {title}\n\n| | {' | '.join(group)} |\n|---{'|---' * len(group)}|"
            yield from filled
            silent = [row for row, line in lines if not any(line) and row not in group]
            yield from [f"\nNot tried with any of these: {'; '.join(silent)}."] if silent else []


def _tests(found: list[Mark], numbers: dict[str, int]) -> Iterator[str]:
    yield "\n## Tests\n\nAlternatives are separated by a stroke.\n\n| | test | together |\n|---|---|---|"
    for test, number in numbers.items():
        said = "; ".join(_said(mark) for mark in found if mark.test == test)
        yield f'| <a id="t{number}"></a>{number} | `{test}` | {said} |'
    yield ""


def _said(mark: Mark) -> str:
    names = " + ".join(" / ".join(names) for names in mark.features)
    return names if mark.works else f"{names} refused: `… {mark.says} …`"


if __name__ == "__main__":
    PAGE.write_text(page(marks()), encoding="utf-8")

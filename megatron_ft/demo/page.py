"""The demo's report: verdict, conversations, curves, training data, layout, commands to repeat it."""

from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ft import files
from megatron_ft.data.roles import loss_weights
from megatron_ft.data.shards import open_shards
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.demo.answers import Answer
from megatron_ft.demo.verdict import Row
from megatron_ft.report import Page, read_metrics, samples
from megatron_ft.report.curves import bars
from megatron_ft.report.page import Html, badge, commands, curves, table
from megatron_ft.steps.screen import clock, shortened, wrapped

_SAMPLES = 3
_CONVERSATIONS = 12  # shown at first; the others can be unfolded


def write_report(
    folder: Path, summary: dict[str, Any], rows: Sequence[Row], ran: Sequence[Sequence[str]],
    before: Sequence[Answer], after: Sequence[Answer], facts: int,
) -> None:  # fmt: skip
    """Write FOLDER/report.html from the output files of the demo's commands."""
    passed = all(row.passed for row in rows)
    page = Page(
        "megatron_ft demo: " + ("all requirements met" if passed else "a requirement was not met"),
        f"A tiny Llama, split over {summary['world_size']} processes as on a cluster, was trained to answer in "
        f"{clock(summary['wall_seconds'])}. Seed {summary['seed']}.",
    )
    page.section("Verdict", _verdict(rows))
    page.section(
        "Before and after",
        _conversations(before, after),
        note="Held-out questions: training contained each fact in other wordings, and each wording with other subjects, but "
        "none of these questions. Wrong answers are shown first. An answer is right if it is exactly the expected text.",
    )
    page.section("Training", curves(read_metrics(folder / "metrics.jsonl")), _numbers(summary))
    page.section("Training data", *_data(folder, facts))
    page.section("Layout", *_layout(folder, summary))
    page.section("How to repeat it", *_again(folder, summary, ran))
    page.section("Files in the folder", _files(folder))
    page.write(folder / "report.html")


def _verdict(rows: Sequence[Row]) -> str:
    cells = [(row.name, row.before, row.after, row.needed, badge(row.passed), row.how) for row in rows]
    causes = "".join(
        f'<p class="bad">{escape(row.name)}: likely cause: {escape(row.cause)}.</p>' for row in rows if not row.passed
    )
    return table(
        ("", "before", "after", "required", "", "how it was measured"), cells, ("", "num", "num", "num", "", "soft")
    ) + causes  # fmt: skip


def _conversations(before: Sequence[Answer], after: Sequence[Answer]) -> str:
    pairs = sorted(zip(before, after, strict=True), key=lambda pair: pair[1].right)
    # The first right ones would all have one topic: take them at equal distances.
    wrong = [pair for pair in pairs if not pair[1].right]
    right = [pair for pair in pairs if pair[1].right]
    step = max(1, len(right) // max(1, _CONVERSATIONS - len(wrong)))
    shown = [*wrong, *right[::step]][: max(_CONVERSATIONS, min(len(wrong), 30))]
    rest = [pair for pair in pairs if pair not in shown]
    count = f"<p>{len(right)} of {len(after)} right after training, {sum(a.right for a in before)} before.</p>"
    more = f"<details><summary>the other {len(rest)}</summary>{_answers(rest)}</details>" if rest else ""
    return count + _answers(shown) + more


def _answers(pairs: Sequence[tuple[Answer, Answer]]) -> str:
    cells = [
        (
            new.question,
            shortened(old.text, 44),
            new.text if new.right else Html(f"{escape(new.text)}<br><span class=soft>{escape(new.expected)}</span>"),
            badge(new.right, "right", "wrong"),
        )
        for old, new in pairs
    ]
    return table(("question", "before", "after", ""), cells, ("", "soft code", "", ""))


def _numbers(summary: dict[str, Any]) -> str:
    validation = summary["loss_validation"]
    return (
        f'<p class="below">{summary["iterations"]} steps; {summary["tokens_per_second"]:,.0f} tokens per second; rows '
        f"{summary['packing_filled']:.1%} full. "
        + (f"Validation loss {validation:.4f}, on chats with the same wordings as the training chats. " if validation else "")
        + "The loss includes only the assistant's tokens.</p>"
    )  # fmt: skip


def _data(folder: Path, facts: int) -> list[str]:
    shards = open_shards(str(folder / "data/chats-train"))
    tokenizer = load_tokenizer(folder / "hf_base", ("<|im_start|>", "<|im_end|>"))
    weights = shards.loss_weights(loss_weights())
    counts = shards.manifest.counts
    return [
        f"<p>{counts['samples']:,} chats about {facts} facts, {counts['tokens']:,} tokens.</p>",
        f'<div class="grid2"><div><h3>tokens by role</h3>{samples.by_role([shards], [weights])}</div>',
        f"<div><h3>length of a chat</h3>{samples.by_length([shards], 'chat')}</div></div>",
        f'<h3>three chats, decoded from the shards: {samples.legend([shards])} <span class="on">trained on</span></h3>',
        *(samples.sample(shards, index, tokenizer, weights) for index in samples.select(shards, _SAMPLES)),
    ]


def _layout(folder: Path, summary: dict[str, Any]) -> list[str]:
    tp, pp = summary["tensor_model_parallel_size"], summary["pipeline_model_parallel_size"]
    layers = files.read_json(folder / "hf_base/config.json")["num_hidden_layers"] // pp
    rows = []
    for rank in range(tp * pp):
        stage, part = divmod(rank, tp)
        ends = ("embedding, " if stage == 0 else "") + f"layers {stage * layers} to {stage * layers + layers - 1}"
        ends += ", output layer" if stage == pp - 1 else ""
        name = f"mp_rank_{part:02d}_{stage:03d}"
        rows.append((rank, part, stage, ends, f"{_parameters(folder, name):,}", name))
    times = [(name, seconds, clock(seconds)) for name, seconds in summary["step_seconds"].items()]
    return [
        table(
            ("rank", "tensor part", "pipeline stage", "layers (its part of)", "parameters", "file of the checkpoint"),
            rows,
            ("num", "num", "num", "", "num", "code"),
        ),
        '<p class="below">The parameters of a rank include the zero rows that pad the vocabulary, and the norms, which '
        "every tensor part holds. Training also uses sequence parallelism and the distributed optimizer.</p>",
        f"<h3>time by step</h3>{bars(times)}",
    ]


def _parameters(folder: Path, name: str) -> int:
    import torch

    path = folder / "megatron/release" / name / "model_optim_rng.pt"
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    return sum(tensor.numel() for tensor in weights.values() if isinstance(tensor, torch.Tensor))


def _again(folder: Path, summary: dict[str, Any], ran: Sequence[Sequence[str]]) -> list[str]:
    versions = [(name, version(name)) for name in ("megatron_ft", "megatron-core", "torch", "transformers", "numpy")]
    hashes = [
        (name, files.digest(folder / name)) for name in ("chats.jsonl", "heldout.jsonl", "hf_base/tokenizer.model")
    ]
    return [
        commands(f"megatron-ft demo --run_dir {folder} --seed {summary['seed']}"),
        "<p>or the single commands of the demo (each refuses to overwrite existing files):</p>",
        commands("\n".join("\n".join(wrapped(words)).removeprefix("$ ") for words in ran)),
        f"<details><summary>finetune.yaml</summary>{commands((folder / 'finetune.yaml').read_text())}</details>",
        f"<details><summary>versions and hashes</summary>{table(('', ''), [*versions, *hashes], ('', 'code'))}</details>",
    ]


def _files(folder: Path) -> str:
    about = (
        ("report.html, summary.json, metrics.jsonl", "this page, its numbers, the numbers of every step"),
        ("demo.log", "the complete output of the commands"),
        ("chats.jsonl, heldout.jsonl", "the chats, and the held-out questions"),
        ("hf_base/", "the untrained model, in the format of a downloaded one"),
        ("data/", "role-labelled shards, manifest and statistics"),
        ("megatron/", "the untrained model split over four ranks"),
        ("finetune.yaml", "the settings of the training run"),
        ("tuned/", "the trained checkpoint with the state to resume from; it loads into any layout"),
        ("before.jsonl, after.jsonl", "the answers"),
        ("hf/", "the trained model for transformers, with chat template and stop token"),
        ("round_trip/", "the untrained model, converted back from the four ranks for the comparison"),
    )
    shown = [(name, text) for name, text in about if (folder / name.split(",")[0]).exists() or "report" in name]
    nexts = commands(
        f"megatron-ft chat {folder / 'hf'}\n"
        f'megatron-ft generate --load {folder / "tuned"} --prompt "What colour is a plum?"\n'
        "less examples/my_chats/README.md        # the same with your own chats"
    )
    return table(("", ""), shown, ("code", "")) + "<h3>next</h3>" + nexts

"""The report of a training run, from the files in its folder: metrics.jsonl, run.json, training.yaml, finetune.log.

Sections whose file is missing are left out, so the page can be made at any time, also for a run that is in progress or has failed.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft import files
from megatron_ft.data.foreign import open_any
from megatron_ft.data.plain import is_plain
from megatron_ft.data.roles import display_name
from megatron_ft.errors import DataError, UserError
from megatron_ft.report import samples
from megatron_ft.report.answers import NOTE, SAMPLES, answers, read_answers
from megatron_ft.report.curves import Line, bars, picture
from megatron_ft.report.metrics import Curve, Metrics, read_metrics
from megatron_ft.report.page import Page, badge, commands, curves, table
from megatron_ft.report.zeros import ZEROS, by_layer
from megatron_ft.wording import counted, size

REPORT = "report.html"
_LAST = 10  # number of last steps that a final value is the mean of
_RANKS = 64  # number of ranks shown at first
_WARNINGS = 30
_BREAKDOWNS = {"role": "role", "source": "source", "position": "position in the conversation"}


def write_run_report(folder: Path, target: Path | None = None) -> Path:
    """Write FOLDER/report.html, or `target`, and return its path. Raise DataError if FOLDER contains no run."""
    folder = Path(folder)
    metrics = read_metrics(folder / "metrics.jsonl")
    starts = read_starts(folder)
    if not metrics.curve("train/loss") and not starts:
        raise DataError(
            f"{folder}: no metrics.jsonl and no run.json in this folder; give the folder of a run (finetune's --run_dir or --save)"
        )
    now = starts[-1] if starts else {}
    page = Page(_title(folder, metrics, now), _subtitle(now))
    page.section("Result", _verdict(metrics, now), _numbers(metrics))
    if asked := read_answers(folder / SAMPLES):
        page.section("Answers", *answers(asked), note=NOTE)
    page.section("Curves", curves(metrics))
    if where := list(_where(metrics)):
        page.section("Loss by group", f'<div class="grid2">{"".join(where)}</div>', note=_WHERE)
    if zeros := by_layer(metrics):
        page.section("Zeros in the MLPs", zeros, note=ZEROS)
    if now:
        page.section("Training data", *_data(folder, now["data"]))
        page.section("Layout", *_layout(now))
    page.section("Time and memory", *_time(metrics))
    page.section("Warnings", *_warnings(folder))
    page.section("How to repeat it", *_again(folder, starts))
    page.section("Files in the folder", *_files(folder))
    target = target or folder / REPORT
    page.write(target)
    return target


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the starts recorded in run.json; [] if it is missing or damaged."""
    try:
        return list(files.read_json(folder / "run.json")["starts"])
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return []


def _title(folder: Path, metrics: Metrics, now: dict[str, Any]) -> str:
    done = max((at for at, _ in metrics.curve("train/loss")), default=0)
    total = f" of {now['train_iters']:,}" if now else ""
    return f"{folder.name}: {done:,}{total} {'step' if done == 1 and not total else 'steps'}"


def _subtitle(now: dict[str, Any]) -> str:
    if not now:
        return ""
    model = now["model"]
    return (
        f"{model['family']}, {counted(model['layers'], 'layer')} of {model['hidden']}, from {now['from']}; {now['layout']['text']} on "
        f"{now['device']}; started {now['time'][:16].replace('T', ' ')} UTC"
    )


def _verdict(metrics: Metrics, now: dict[str, Any]) -> str:
    loss, held_out = metrics.curve("train/loss"), metrics.curve("eval/loss")
    done, total = max((at for at, _ in loss), default=0), now.get("train_iters", 0)
    rows: list[tuple[str, ...]] = []
    if total:
        rows.append(("steps done", f"{done:,}", f"of {total:,}", badge(done >= total, "all", "not all")))
    if loss:
        first, last = loss[0][1], _mean_end(loss)
        rows.append(
            ("training loss", f"{first:.4f} to {last:.4f}", "should fall", badge(last < first, "fell", "did not fall"))
        )
        rows.append(_finite(metrics))
    if held_out:
        best, at = min((value, at) for at, value in held_out)
        last = held_out[-1][1]
        note = (
            "lowest at the end" if last <= best * 1.001 else f"lowest at step {at:,}: {best:.4f}; it rises after that"
        )
        rows.append(("validation loss", f"{last:.4f}", note, badge(last <= best * 1.001, "good", "check")))
    return table(("", "", "", ""), rows, ("", "num", "soft", ""))


def _finite(metrics: Metrics) -> tuple[str, ...]:
    skipped = int(metrics.total("train/skipped"))
    bad = metrics.not_finite or skipped
    return (
        "steps skipped for a loss or gradient that is not finite",
        f"{skipped:,}",
        "0",
        badge(not bad, "none", "check"),
    )


def _mean_end(curve: Curve) -> float:
    values = [value for _, value in curve[-_LAST:]]
    return sum(values) / len(values)


def _numbers(metrics: Metrics) -> str:
    tokens, trained = metrics.total("train/tokens"), metrics.total("train/supervised_tokens")
    seconds = metrics.total("train/seconds")
    if not tokens:
        return ""
    text = (
        f"{tokens:,.0f} tokens read, {trained:,.0f} of them trained on ({trained / tokens:.0%}), in {_clock(seconds)} of "
        f"steps: {tokens / max(seconds, 1e-9):,.0f} tokens per second, {trained / max(seconds, 1e-9):,.0f} trained on."
    )
    if held_out := metrics.values("eval/perplexity"):
        text += f" Validation perplexity: first {held_out[0]:.3f}, last {held_out[-1]:.3f}."
    return f'<p class="below">{escape(text)}</p>'


_WHERE = (
    "Mean loss in nats per token over the last steps, tokens of weight 0 included, and the curves of the largest groups. "
    "For tokens that are not trained on, the loss shows how well the model predicts them."
)


def _where(metrics: Metrics) -> Iterator[str]:
    """Yield a block for each breakdown that has several groups."""
    for kind, title in _BREAKDOWNS.items():
        before = f"train/loss_by_{kind}/"
        groups = {name.removeprefix(before): c for name, c in metrics.curves.items() if name.startswith(before) and c}
        if len(groups) < 2 and kind != "role":
            continue
        if groups:
            ends = {name: _mean_end(curve) for name, curve in groups.items()}
            yield f"<div><h3>by {title}</h3>" + bars(
                [(display_name(name), end, f"{end:.4f}") for name, end in ends.items()]
            )
            largest = sorted(groups, key=lambda name: len(groups[name]), reverse=True)[:4]
            lines = [
                Line(display_name(name), groups[name], style) for name, style in zip(largest, "abcd", strict=False)
            ]
            yield picture("over the steps", lines, log=True) + "</div>"


def _data(folder: Path, data: dict[str, Any]) -> Iterator[str]:
    packed = "packed, without attention between samples" if data["packed"] else "one per row"
    over = (
        f"; {counted(data['over_long'], 'sample')} longer than a row were {data['fate_of_over_long']}"
        if data["over_long"]
        else ""
    )
    yield (
        f"<p>{counted(data['samples'], 'sample')} in {counted(data['rows'], 'row')} of {data['seq_length']:,} positions, {packed}: "
        f"{data['filled']:.1%} of positions contain a token{over}.</p>"
    )
    opened = list(_opened(data["train"]))
    if not opened:
        yield f'<p class="soft">{escape(", ".join(data["train"]))}: these shards no longer exist.</p>'
        return
    by_role = np.array(list(data["loss_weights"].values()), np.float32)
    weights = [shard.loss_weights(by_role, data["marked_loss_weight"]) for shard in opened]
    yield f'<div class="grid2"><div><h3>tokens by role</h3>{samples.by_role(opened, weights)}'
    yield f"{_sources(opened)}</div><div><h3>length of a sample</h3>{samples.by_length(opened)}</div></div>"
    first, tokenizer = opened[0], samples.tokenizer_of(opened[0], *folder.glob("*/tokenizer"))
    yield f'<h3>some samples of the shards: {samples.legend(opened)} <span class="on">trained on</span></h3>'
    for index in samples.select(first):
        yield samples.sample(first, index, tokenizer, weights[0])


def _opened(prefixes: list[str]) -> Iterator[Any]:
    for prefix in prefixes:
        try:
            if not is_plain(prefix):
                yield open_any(prefix)
        except UserError:
            continue


def _sources(opened: list[Any]) -> str:
    counts: Counter[str] = Counter()
    for shard in opened:
        for source in shard.manifest.sources:
            first, end = source["documents"]
            counts[source["name"]] += end - first
    if len(counts) < 2:
        return ""
    return "<h3>samples by source</h3>" + bars([(name, n, f"{n:,}") for name, n in counts.most_common(20)])


def _layout(now: dict[str, Any]) -> Iterator[str]:
    ranks = now["ranks"]
    hosts = len({rank["host"] for rank in ranks})
    yield f"<p>{escape(now['layout']['text'])}: {counted(len(ranks), 'process')} on {counted(hosts, 'machine')}.</p>"
    rows = [
        (
            rank["rank"],
            rank["tensor"],
            rank["pipeline"],
            rank["data"],
            _holds(rank),
            f"{rank['parameters']:,}",
            rank["host"],
        )
        for rank in ranks
    ]
    head = ("rank", "tensor", "pipeline", "data", "layers (its part of)", "parameters", "machine")
    kinds = ("num", "num", "num", "num", "", "num", "soft")
    yield table(head, rows[:_RANKS], kinds)
    if rows[_RANKS:]:
        yield f"<details><summary>the other {len(rows) - _RANKS}</summary>{table(head, rows[_RANKS:], kinds)}</details>"


def _holds(rank: dict[str, Any]) -> str:
    parts = ["embedding"] if rank["embedding"] else []
    parts += [f"layers {text}"] if (text := spans(rank["layers"])) else []
    parts += ["output layer"] if rank["output"] else []
    return ", ".join(parts)


def spans(numbers: list[int]) -> str:
    """Return [0, 1, 2, 8, 9] as "0 to 2, 8 to 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in runs)


def _time(metrics: Metrics) -> Iterator[str]:
    before = "train/seconds_"
    phases = {
        name.removeprefix(before).replace("_", " "): sum(metrics.values(name)) / len(metrics.values(name))
        for name in metrics.curves
        if name.startswith(before) and metrics.values(name)
    }
    if phases:
        yield "<h3>mean seconds per step</h3>" + bars(
            [(name, value, f"{value:.4g} s") for name, value in phases.items()]
        )
    if memory := metrics.values("train/memory_gb"):
        yield f'<p class="below">Largest memory use of the reporting process: {size(max(memory) * 1e9)}.</p>'
    if speed := metrics.values("train/tflops_per_gpu"):
        share = metrics.values("train/mfu")
        yield f'<p class="below">{speed[-1]:.1f} TFLOP/s per GPU{f", {share[-1]:.1%} of its peak" if share else ""}.</p>'


_LOGGED = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) rank\d+ ([\w.]+): (.*)$")


def _warnings(folder: Path) -> Iterator[str]:
    """Yield this project's warnings, each once with its count, and the number of libraries' warnings."""
    path, others = folder / "finetune.log", 0
    counts: Counter[tuple[str, str]] = Counter()
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for match in filter(None, map(_LOGGED.match, file)):
                if match[2].startswith("megatron_ft"):
                    counts[match[1].lower(), match[3]] += 1
                else:
                    others += 1
    if counts:
        rows = [(level, text, n) for (level, text), n in counts.most_common(_WARNINGS)]
        yield table(("", "", "times, all ranks"), rows, ("", "", "num"))
    else:
        yield "<p>No warnings of megatron_ft.</p>"
    if others:
        yield f'<p class="below">Libraries logged {others:,} more: see finetune.log.</p>'


def _again(folder: Path, starts: list[dict[str, Any]]) -> Iterator[str]:
    settings = folder / "training.yaml"
    if starts:
        head = ("started (UTC)", "at step", "layout", "command")
        rows = [
            (s["time"][:19].replace("T", " "), f"{s['iteration']:,}", s["layout"]["text"], s["command"]) for s in starts
        ]
        yield table(head, rows, ("", "num", "", "code"))
    if settings.is_file() and starts:
        size = starts[-1]["layout"]["world_size"]
        started = f"--nproc_per_node {size} " if size > 1 else ""
        yield "<p>A new run with the same settings, in a new folder:</p>"
        yield commands(f"megatron-ft finetune {started}--config {shlex.quote(str(settings))} --save NEW_FOLDER")
        yield f"<details><summary>training.yaml</summary>{commands(settings.read_text(encoding='utf-8'))}</details>"
    if starts:
        versions = table(("", ""), list(starts[-1]["versions"].items()), ("", "code"))
        yield f"<details><summary>versions</summary>{versions}</details>"


def _files(folder: Path) -> Iterator[str]:
    about = {
        REPORT: "this page",
        "metrics.jsonl": "the numbers of every step",
        SAMPLES: "answers of the model before, during and after training",
        "run.json": "layout, data and versions of each start",
        "training.yaml": "all settings, for --config",
        "finetune.log": "the log of all processes, warnings of libraries included",
        "latest_checkpointed_iteration.txt": "the iteration of the newest checkpoint",
    }
    checkpoints = sorted(path.name for path in folder.glob("iter_*") if path.is_dir())
    rows = [(name, text) for name, text in about.items() if name == REPORT or (folder / name).exists()]
    if checkpoints:
        named = checkpoints[-1] if len(checkpoints) == 1 else f"{checkpoints[0]} to {checkpoints[-1]}"
        rows.append(
            (
                f"{named}/",
                f"{counted(len(checkpoints), 'checkpoint')}, each loads into any layout",
            )
        )
    yield table(("", ""), rows, ("code", ""))
    if checkpoints:
        place = shlex.quote(str(folder))
        yield "<h3>next</h3>" + commands(
            f'megatron-ft generate --load {place} --prompt "..."\n'
            f"megatron-ft megatron-to-hf --input_dir {place} --output_dir {place}-hf"
        )


def _clock(seconds: float) -> str:
    """Return seconds as 1:02:05 or 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""The demo from start to end: its data and base model, six steps with the commands a user would type, the verdict.

This file starts the commands, reads their output files and compares them. It repeats no computation of a command.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft import __version__
from megatron_ft.demo.answers import MAX_NEW_TOKENS, Answer, exact_match, read_answers
from megatron_ft.demo.base_model import Shape, write_base_model
from megatron_ft.demo.chats import CHATS, HELD_OUT, ChatSet, as_prompts, make_chats
from megatron_ft.demo.facts import TOPICS, Topic
from megatron_ft.demo.folder import SUMMARY
from megatron_ft.demo.page import write_report
from megatron_ft.demo.parity import RESULT
from megatron_ft.demo.screen import DemoScreen
from megatron_ft.demo.verdict import Row, judge
from megatron_ft.demo.weights import compare_models
from megatron_ft.files import atomic_file, read_json, write_json
from megatron_ft.report import read_metrics
from megatron_ft.steps.screen import active_hint, sparkline
from megatron_ft.steps.shell import ON_CPU, Shell

TP, PP = 2, 2
_LAYOUT = ("--tensor_model_parallel_size", str(TP), "--pipeline_model_parallel_size", str(PP))
_SHOWN = ("colour", "capital", "opposite")  # topics of the questions that are printed


@dataclass(frozen=True)
class Plan:
    """The settings of one demo. Tests use smaller sizes; the defaults train well in a few minutes."""

    folder: Path
    seed: int = 1
    topics: Sequence[Topic] = TOPICS
    chats: int = CHATS
    shape: Shape = field(default_factory=Shape)
    seq_length: int = 256
    train_iters: int = 300
    lr: float = 3e-3


def run_demo(plan: Plan) -> list[Row]:
    """Run the whole demo and return the verdict. Raise CommandFailed if a command fails."""
    return _Demo(plan).run()


class _Demo:
    def __init__(self, plan: Plan):
        self.plan, self.folder = plan, plan.folder
        self.screen, self.shell = DemoScreen(steps=6), Shell(plan.folder / "demo.log", ON_CPU)
        self.summary: dict[str, Any] = {}
        self.commands: list[list[str]] = []
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    def run(self) -> list[Row]:
        made = self.prepare()
        self.pretokenize()
        self.convert()
        before = self.ask("ask before training", self.path("megatron"), "before")
        self.finetune()
        after = self.ask("ask after training", self.path("tuned"), "after")
        self.export()
        return self.conclude(made, before, after)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def prepare(self) -> ChatSet:
        """Write the chats, the held-out questions and the base model."""
        screen, cores = self.screen, _cores()
        screen.line(
            "megatron_ft demo: train a tiny Llama to answer questions, split as on a cluster (TP 2 x PP 2)", "bold"
        )
        screen.line(f"{TP * PP} processes on {cores} CPU cores. No GPU, no download. About 3 minutes.")
        if hint := active_hint():
            screen.line(f"To run the commands below yourself, first run: {hint}")
        screen.line()
        made = make_chats(self.plan.seed, self.plan.chats, self.plan.topics)
        _write_lines(self.folder / "chats.jsonl", made.chats)
        _write_lines(self.folder / "heldout.jsonl", as_prompts(made.held_out))
        texts = (message["content"] for chat in made.chats for message in chat["messages"])
        write_base_model(self.folder / "hf_base", texts, self.plan.seed, self.plan.shape)
        wordings = len(self.plan.topics[0].wordings)
        screen.note(f"created  {len(made.chats):,} chats about {made.facts} facts, and a Llama with random weights")
        screen.note(
            f"held out {len(made.held_out)} questions: of each fact's {wordings} wordings, {HELD_OUT} are in no chat"
        )
        self.seconds["prepare"] = time.monotonic() - self.started
        return made

    def pretokenize(self) -> None:
        output = self.step(
            "chats -> shards",
            ["megatron-ft", "pretokenize", "--input", self.path("chats.jsonl"), "--tokenizer", self.path("hf_base"),
             "--output_prefix", self.path("data/chats"), "--val_split", "0.05"],
            lambda output: _line_with(output, "train:").removeprefix("train:").split("->")[0].strip(),
        )  # fmt: skip
        for line in output.split("\n\n")[-1].splitlines()[:2]:
            self.screen.note(line.strip())
        self.screen.note("«» = trained on")

    def convert(self) -> None:
        self.step(
            f"HF -> TP{TP} x PP{PP}",
            ["megatron-ft", "hf-to-megatron", self.path("hf_base"), self.path("megatron"), *_LAYOUT,
             "--ckpt_format", "torch", "--chat_format", "chatml"],
            _conversion,
        )  # fmt: skip

    def ask(self, title: str, checkpoint: str, name: str) -> list[Answer]:
        output = self.folder / f"{name}.jsonl"
        words = [
            *_four("generate"), "--load", checkpoint, "--prompts", self.path("heldout.jsonl"),
            "--output", str(output), *_LAYOUT, "--max_new_tokens", str(MAX_NEW_TOKENS), "--batch_size", "128",
        ]  # fmt: skip
        self.begin(title, words)
        self.shell.run(words)
        answers = read_answers(output)
        self.screen.answers([next(a for a in answers if a.topic == topic) for topic in _topics(answers)])
        right = sum(answer.right for answer in answers)
        self.seconds[title] = self.screen.done(f"held-out questions: {right} of {len(answers)} right")
        self.summary[f"heldout_exact_match_{name}"] = exact_match(answers)
        self.summary["heldout_questions"] = len(answers)
        return answers

    def finetune(self) -> None:
        config, metrics_file = self.folder / "finetune.yaml", self.folder / "metrics.jsonl"
        with atomic_file(config, "w") as file:
            file.write(_settings(self.plan))
        words = [*_four("finetune"), "--config", str(config)]
        self.begin("finetune", words)
        try:
            self.shell.run(
                words, lambda: self.screen.progress(read_metrics(metrics_file), self.plan.train_iters, every=50)
            )
        finally:
            self.screen.stop_progress()
        metrics = read_metrics(metrics_file)
        losses, evals = metrics.values("train/loss"), metrics.values("eval/loss")
        filled = metrics.total("train/tokens") / (metrics.total("train/global_batch_size") * self.plan.seq_length)
        self.summary |= {
            "loss_first": losses[0],
            "loss_last": sum(losses[-10:]) / len(losses[-10:]),
            "loss_validation": evals[-1] if evals else None,
            "loss_not_finite": metrics.not_finite,
            "iterations": len(losses),
            "tokens_per_second": metrics.total("train/tokens") / metrics.total("train/seconds"),
            "packing_filled": filled,
        }
        s = self.summary
        self.seconds["finetune"] = self.screen.done(
            f"loss {s['loss_first']:.2f} {sparkline([math.log(loss) for loss in losses if loss > 0])} {s['loss_last']:.4f}   "
            f"validation {s['loss_validation'] or 0:.4f}   rows {filled:.0%} full   {metrics.not_finite} NaN"
        )

    def export(self) -> None:
        words = ["megatron-ft", "megatron-to-hf", self.path("tuned"), self.path("hf")]
        self.begin(f"TP{TP} x PP{PP} -> HF, and check", words)
        self.shell.run(words)
        check = ["python", "-m", "megatron_ft.demo.parity", str(self.folder)]
        self.also(check)
        found = read_json(self.folder / RESULT)
        self.summary |= {
            "hf_logits_max_abs_diff": found["hf_logits_max_abs_diff"],
            "hf_logits_largest": found["largest_logit"],
            "hf_logits_positions": found["positions"],
            "hf_same_answers": found["same_answers"],
            "hf_prompts": found["prompts"],
        }
        back = ["megatron-ft", "megatron-to-hf", self.path("megatron"), self.path("round_trip")]
        self.also(back)
        weights = compare_models(self.folder / "hf_base", self.folder / "round_trip")
        self.summary |= {
            "weights_round_trip_identical": weights.identical,
            "weights_compared": weights.tensors,
            "weights_rows_added": weights.added_rows,
            "weights_first_difference": weights.first_difference,
        }
        self.seconds["export and check"] = self.screen.done(
            f"loaded by transformers: {found['same_answers']} of {found['prompts']} greedy answers the same"
        )

    def conclude(self, made: ChatSet, before: list[Answer], after: list[Answer]) -> list[Row]:
        self.summary |= {
            "world_size": TP * PP,
            "tensor_model_parallel_size": TP,
            "pipeline_model_parallel_size": PP,
            "cpu_cores": _cores(),
            "seed": self.plan.seed,
            "version": __version__,
            "step_seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
            "wall_seconds": time.monotonic() - self.started,
        }
        rows = judge(self.summary)
        self.summary["passed"] = all(row.passed for row in rows)
        write_report(self.folder, self.summary, rows, self.commands, before, after, made.facts)
        write_json(self.folder / SUMMARY, self.summary)
        self.screen.table(rows)
        self.screen.line(f"  report     {self.path('report.html')}")
        self.screen.line(f"  numbers    {self.path(SUMMARY)}, metrics.jsonl    log  demo.log")
        self.screen.line(f"  chat       $ megatron-ft chat {self.path('hf')}")
        self.screen.line("  your data  $ megatron-ft tune MODEL CHATS.jsonl   (the same commands, chosen for you)")
        return rows

    def step(self, title: str, words: list[str], result: Callable[[str], str]) -> str:
        """Run a step of one command. `result` makes the step's line from the command's output."""
        self.begin(title, words)
        output = self.shell.run(words)
        self.seconds[title] = self.screen.done(result(output))
        return output

    def begin(self, title: str, words: list[str]) -> None:
        self.screen.step(title)
        self.screen.command(words)
        self.commands.append(words)

    def also(self, words: list[str]) -> None:
        """Run one more command of the same step."""
        self.screen.command(words)
        self.commands.append(words)
        self.shell.run(words)


def _four(command: str) -> list[str]:
    return ["megatron-ft", command, "--nproc_per_node", str(TP * PP)]


def _settings(plan: Plan) -> str:
    """Return the file for finetune --config, with comments."""
    return f"""\
# megatron-ft finetune --config {plan.folder}/finetune.yaml
load: {json.dumps(str(plan.folder / "megatron"))}
data_path: [{json.dumps(str(plan.folder / "data/chats-train"))}]
save: {json.dumps(str(plan.folder / "tuned"))}
run_dir: {json.dumps(str(plan.folder))}  # metrics.jsonl

tensor_model_parallel_size: {TP}
pipeline_model_parallel_size: {PP}
sequence_parallel: true
use_distributed_optimizer: true

seq_length: {plan.seq_length}  # several chats share a row, without attention between them
micro_batch_size: 4
global_batch_size: 8  # rows per step, in two microbatches
train_iters: {plan.train_iters}
seed: {plan.seed}

lr: {plan.lr}  # high: the model is tiny and starts from random weights
lr_warmup_iters: {max(1, plan.train_iters // 15)}
lr_decay_style: cosine
adam_beta2: 0.98
weight_decay: 0.01
clip_grad: 1.0

log_interval: 10
eval_interval: {max(1, plan.train_iters // 6)}
"""


def _topics(answers: Iterable[Answer]) -> list[str]:
    there = list(dict.fromkeys(answer.topic for answer in answers))
    return [topic for topic in _SHOWN if topic in there] or there[:3]


def _write_lines(path: Path, objects: Iterable[Any]) -> None:
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def _line_with(output: str, text: str) -> str:
    """Return the last line of a command's output that contains `text`."""
    return next((line.strip() for line in reversed(output.splitlines()) if text in line), "done")


def _conversion(output: str) -> str:
    """Return "2.0 M parameters, 39 tensors, 4 shards" from the output of a conversion."""
    return ", ".join(_line_with(output, "parameters").split(", ")[:3])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

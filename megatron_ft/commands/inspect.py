"""megatron-ft inspect: show samples of shards as training sees them, coloured by role, in the terminal or as one HTML page; with
--seq_length also how samples are packed into a row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError, UserError
from megatron_ft.wording import counted


@dataclass
class Inspect:
    """Shards and samples"""

    prefix: str = field(default="", metadata={"required": True})
    """prefix of the shards to show (PREFIX of PREFIX-text.bin)"""
    tokenizer: str | None = None
    """tokenizer file or folder, to decode the tokens; default: the path recorded in the manifest of the shards"""
    sample: list[int] = field(default_factory=list)
    """indices of the samples to show, from 0; default: --count samples at equal distances"""
    count: int = 3
    """number of samples to show if --sample is not given"""
    tokens: bool = False
    """list every token with its id, role and loss weight instead of continuous text"""
    html: str | None = field(default=None, metadata={"writes": "file"})
    """file for an HTML page; default: print to the terminal"""
    seq_length: int | None = None
    """also show how samples are packed into a row of this many tokens; default: no row is shown"""
    scalar_loss_mask: float = 0.0
    """loss weight of all tokens that are not the assistant's, as in finetune"""
    marked_loss_weight: float = 1.0
    """loss weight of tokens that the shards mark for language modelling, as in finetune"""
    seed: int = 1234
    """seed of the sample order in the packed row of --seq_length"""
    verify_data: bool = True
    """compare the shards with their hashes first, which reads them completely; --no_verify_data skips this"""


COMMAND = Command(
    name="inspect",
    summary="show samples of shards as training sees them: roles, tokens, loss weights",
    sections=(Inspect,),
    examples=(
        "megatron-ft inspect data/mine-train",
        "megatron-ft inspect data/mine-train --sample 0 17 --tokens --seq_length 4096 --html samples.html",
    ),
    positional=("prefix",),
)


def run(options: Inspect) -> int:
    """Print the samples or write the page. Raise UserError for missing shards or samples."""
    import numpy as np

    from megatron_ft.commands import inspect_page
    from megatron_ft.data.foreign import open_any
    from megatron_ft.data.roles import all_weights
    from megatron_ft.data.show import source_of, tokens
    from megatron_ft.data.verify import verify_shards

    shards = open_any(options.prefix)
    if options.verify_data:
        verify_shards([shards], "--no_verify_data")
    if not len(shards):
        raise ConfigError(f"{options.prefix}: these shards contain no samples")
    chosen = options.sample or sorted(set(np.linspace(0, len(shards) - 1, max(1, options.count)).astype(int).tolist()))
    for sample in chosen:
        if not 0 <= sample < len(shards):
            raise ConfigError(f"--sample {sample}: {options.prefix} has samples 0 to {len(shards) - 1}")
    tokenizer = _tokenizer(options, shards)
    weight_by_byte = shards.loss_weights(all_weights(options.scalar_loss_mask, {}), options.marked_loss_weight)
    samples = [
        (sample, source_of(shards, sample), tokens(shards, sample, tokenizer, weight_by_byte)) for sample in chosen
    ]
    row = _row(options.seed, options.seq_length, shards.lengths) if options.seq_length else None
    head = _head(options.prefix, shards)
    if options.html:
        from megatron_ft.files import atomic_file

        with atomic_file(options.html, "w") as file:
            file.write(inspect_page.page(options.prefix, head, samples, row))
        print(f"{counted(len(samples), 'sample')} -> {options.html}")
        return 0
    _print(head, samples, row, options.tokens)
    return 0


def _tokenizer(options: Inspect, shards: Any) -> Any:
    from megatron_ft.data.tokenizer import load_tokenizer
    from megatron_ft.log import logger

    recorded = shards.manifest.tokenizer
    place = options.tokenizer or recorded.get("file")
    if place is None or (options.tokenizer is None and not Path(place).exists()):
        problem = f"{place} does not exist" if place else "the manifest records no tokenizer"
        logger("inspect").warning("%s: only token ids are shown; set --tokenizer", problem)
        return None
    tokenizer = load_tokenizer(place, list(recorded.get("added_tokens", {})), recorded.get("fingerprint"))
    if recorded.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{place}: not the tokenizer of {options.prefix}; set --tokenizer to the one it was made with")
    return tokenizer


def _head(prefix: str, shards: Any) -> list[str]:
    from megatron_ft.data.roles import display_name

    counts, chat = shards.manifest.counts, shards.manifest.chat_format
    total = max(1, counts["tokens"])
    roles = ", ".join(
        f"{display_name(name)} {100 * n / total:.1f}%" for name, n in counts["tokens_by_role"].items() if n
    )
    lines = [
        f"{prefix}: {counted(counts['samples'], 'sample')}, {counted(counts['tokens'], 'token')} ({roles})",
        f"format {chat.get('name') or ('of the tokenizer' if chat else 'plain text')}, "
        f"end of turn {chat.get('stop_token', '-')}, vocabulary {shards.vocab_size}",
    ]
    if not shards.manifest.files:
        lines[1] = "format, end of turn and vocabulary are not recorded"
    if marked := counts.get("marked_tokens"):
        lines.append(f"marked for language-modelling loss: {counted(marked, 'token')}")
    if len(shards.manifest.weights) > 1:
        lines.append(f"weights of messages: {', '.join(f'{weight:g}' for weight in shards.manifest.weights)}")
    return lines


def _row(seed: int, seq_length: int, lengths: Any) -> list[tuple[int, int, int, int]]:
    """Return a row as training packs it: (sample, first position, end, tokens that do not fit) for each sample in it."""
    import numpy as np

    from megatron_ft.data import packing

    order = np.random.default_rng(seed).permutation(len(lengths))[: packing.WINDOW]
    sizes = packing.positions(lengths, seq_length)
    rows = packing.best_fit(order, sizes, seq_length)
    if not len(rows):
        raise ConfigError("no sample has two or more tokens: there is no row to show; omit --seq_length")
    most = int(np.argmax(np.diff(rows.starts)))  # the row with the most samples
    ends = np.cumsum(sizes[rows.samples(most)]).tolist()
    return [
        (int(sample), end - int(sizes[sample]), end, int(lengths[sample]) - 1 - int(sizes[sample]))
        for sample, end in zip(rows.samples(most), ends, strict=True)
    ]


COLOURS = {
    "system": "33",
    "prompter": "34",
    "assistant": "32",
    "context": "90",
    "reasoning": "36",
    "tool_call": "35",
    "empty_reasoning": "36",
}


def _print(head: list[str], samples: list, row: list | None, tokens: bool) -> None:
    import os

    from megatron_ft.data.roles import display_name

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(head))
    if colour:
        print(
            "  ".join(f"\033[{code}m{display_name(name)}\033[0m" for name, code in COLOURS.items())
            + "  \033[4mtrained on\033[0m"
        )
    else:
        print("«» = trained on")
    for number, source, sample in samples:
        trained = sum(token.weight > 0 for token in sample)
        print(f"\nsample {number}, {source}: {counted(len(sample), 'token')}, {trained} trained on")
        print(_listed(sample) if tokens else _painted(sample, colour))
    if row is not None:
        print("\na packed row:")
        for sample, start, end, cut in row:
            print(
                f"  positions {start:6} to {end - 1:6}: sample {sample}"
                + (f", its last {counted(cut, 'token')} cut" if cut else "")
            )


def _listed(sample: list) -> str:
    """Return one line per token."""
    from megatron_ft.data.roles import display_name

    lines = [f"  {'id':>7}  {'role':10}{'weight':>7}  text"]
    for token in sample:
        text = repr(token.text or token.piece or "")[1:-1]
        mark = " marked" if token.marked else ""
        lines.append(f"  {token.id:7}  {display_name(token.role):10}{token.weight:7.2f}  {text}{mark}")
    return "\n".join(lines)


def _painted(sample: list, colour: bool) -> str:
    """Return continuous text, in which tokens of one role and one weight have one colour."""
    parts, last = [], None
    for token in sample:
        text = f"{token.id} " if token.text is None else token.text
        key = (token.role, token.weight > 0)
        if colour:
            if key != last:
                parts.append(f"\033[0;{COLOURS[token.role]}{';4' if key[1] else ''}m")
        elif key[1] != (last or (None, False))[1]:
            parts.append("«" if key[1] else "»")
        parts.append(text)
        last = key
    return "".join([*parts, "\033[0m" if colour else "»" if last and last[1] else ""])


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

"""megatron-ft inspect: what is in shards, as training will see it. Samples in the colours of their roles, in the terminal
or as one HTML page; with --seq_length also how a packed row is cut."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError, UserError


@dataclass
class Inspect:
    """What to look at"""

    prefix: str = field(default="", metadata={"required": True})
    """prefix of the shards (PREFIX of PREFIX-text.bin)"""
    tokenizer: str | None = None
    """tokenizer to read the tokens with; default: where the shards' manifest says it was"""
    sample: list[int] = field(default_factory=list)
    """numbers of the samples to show; default: a few, evenly from the whole"""
    count: int = 3
    """how many samples to show without --sample"""
    tokens: bool = False
    """show every token with its id and loss weight instead of running text"""
    html: str | None = None
    """write one HTML page here instead of printing"""
    seq_length: int | None = None
    """also show how a packed row of so many positions is cut"""
    scalar_loss_mask: float = 0.0
    """loss weight of tokens that are not the assistant's, as in training"""
    marked_loss_weight: float = 1.0
    """loss weight of marked tokens, as in training"""
    seed: int = 1234
    """of the order in which samples are packed"""
    verify_data: bool = True
    """compare the shards with their hashes first, which reads them whole; --no_verify_data skips this"""


COMMAND = Command(
    name="inspect",
    summary="samples of shards as training sees them: roles, tokens, what is trained on",
    sections=(Inspect,),
    examples=(
        "megatron-ft inspect data/mine-train",
        "megatron-ft inspect data/mine-train --sample 0 17 --tokens --seq_length 4096 --html samples.html",
    ),
    positional=("prefix",),
)


def run(options: Inspect) -> int:
    """Raises UserError for shards or a sample that is not there."""
    import numpy as np

    from megatron_ft.commands import inspect_page
    from megatron_ft.data.roles import loss_weights
    from megatron_ft.data.shards import open_shards
    from megatron_ft.data.show import source_of, tokens
    from megatron_ft.data.verify import verify_shards

    shards = open_shards(options.prefix)
    if options.verify_data:
        verify_shards([shards], "--no_verify_data")
    if not len(shards):
        raise ConfigError(f"{options.prefix}: no samples in these shards")
    chosen = options.sample or sorted(set(np.linspace(0, len(shards) - 1, max(1, options.count)).astype(int).tolist()))
    for sample in chosen:
        if not 0 <= sample < len(shards):
            raise ConfigError(f"--sample {sample}: {options.prefix} has samples 0 to {len(shards) - 1}")
    tokenizer = _tokenizer(options, shards)
    by_code = shards.loss_weights(loss_weights(options.scalar_loss_mask), options.marked_loss_weight)
    samples = [(sample, source_of(shards, sample), tokens(shards, sample, tokenizer, by_code)) for sample in chosen]
    row = _row(options.seed, options.seq_length, shards.lengths) if options.seq_length else None
    head = _head(options.prefix, shards)
    if options.html:
        from megatron_ft.files import atomic_file

        with atomic_file(options.html, "w") as file:
            file.write(inspect_page.page(options.prefix, head, samples, row))
        print(f"{len(samples)} samples -> {options.html}")
        return 0
    _print(head, samples, row, options.tokens)
    return 0


def _tokenizer(options: Inspect, shards: Any) -> Any:
    from megatron_ft.data.tokenizer import load_tokenizer
    from megatron_ft.log import logger

    said = shards.manifest.tokenizer
    place = options.tokenizer or said.get("file")
    if place is None or (options.tokenizer is None and not Path(place).exists()):
        logger("inspect").warning("no tokenizer at %s: ids only; name it with --tokenizer", place or "hand")
        return None
    tokenizer = load_tokenizer(place, list(said.get("added_tokens", {})))
    if said.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"{place}: not the tokenizer of {options.prefix}; name another with --tokenizer")
    return tokenizer


def _head(prefix: str, shards: Any) -> list[str]:
    counts, chat = shards.manifest.counts, shards.manifest.chat_format
    whole = max(1, counts["tokens"])
    roles = ", ".join(f"{name} {100 * n / whole:.1f}%" for name, n in counts["tokens_by_role"].items() if n)
    lines = [
        f"{prefix}: {counts['samples']:,} samples, {counts['tokens']:,} tokens ({roles})",
        f"format {chat.get('name') or ('of the tokenizer' if chat else 'plain text')}, "
        f"end of turn {chat.get('stop_token', '-')}, vocabulary {shards.vocab_size}",
    ]
    if marked := counts.get("marked_tokens"):
        lines.append(f"marked for language-modelling loss: {marked:,} tokens")
    if len(shards.manifest.weights) > 1:
        lines.append(f"weights of messages: {', '.join(f'{weight:g}' for weight in shards.manifest.weights)}")
    return lines


def _row(seed: int, seq_length: int, lengths: Any) -> list[tuple[int, int, int, int]]:
    """A row as training packs them: (sample, first position, end, tokens that do not fit) of each sample in it."""
    import numpy as np

    from megatron_ft.data import packing

    order = np.random.default_rng(seed).permutation(len(lengths))[: packing.WINDOW]
    sizes = packing.positions(lengths, seq_length)
    rows = packing.best_fit(order, sizes, seq_length)
    if not len(rows):
        raise ConfigError("no sample has two tokens: there is no row to pack")
    most = int(np.argmax(np.diff(rows.starts)))  # the row that shows most
    ends = np.cumsum(sizes[rows.samples(most)]).tolist()
    return [
        (int(sample), end - int(sizes[sample]), end, int(lengths[sample]) - 1 - int(sizes[sample]))
        for sample, end in zip(rows.samples(most), ends, strict=True)
    ]


COLOURS = {"system": "33", "prompter": "34", "assistant": "32", "context": "90"}


def _print(head: list[str], samples: list, row: list | None, tokens: bool) -> None:
    import os

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(head))
    if colour:
        print("  ".join(f"\033[{code}m{name}\033[0m" for name, code in COLOURS.items()) + "  \033[4mtrained on\033[0m")
    else:
        print("«» = trained on")
    for number, source, sample in samples:
        trained = sum(token.weight > 0 for token in sample)
        print(f"\nsample {number}, {source}: {len(sample)} tokens, {trained} trained on")
        print(_listed(sample) if tokens else _painted(sample, colour))
    if row is not None:
        print("\na packed row:")
        for sample, start, end, cut in row:
            print(
                f"  positions {start:6} to {end - 1:6}: sample {sample}"
                + (f", its last {cut} tokens cut" if cut else "")
            )


def _listed(sample: list) -> str:
    """A token a line."""
    lines = [f"  {'id':>7}  {'role':10}{'weight':>7}  text"]
    for token in sample:
        text = "" if token.text is None else repr(token.text)[1:-1]
        mark = " marked" if token.marked else ""
        lines.append(f"  {token.id:7}  {token.role:10}{token.weight:7.2f}  {text}{mark}")
    return "\n".join(lines)


def _painted(sample: list, colour: bool) -> str:
    """Running text; runs of one role and one weight share their paint."""
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

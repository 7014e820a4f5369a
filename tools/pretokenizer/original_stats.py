"""Statistics in the text form of Open-Assistant's pretokenizer, for scripts that read its _stats.txt files."""

from collections.abc import Sequence

from tools.pretokenizer.sources import Source
from tools.pretokenizer.stats import Tally, total

_LINE = "-----------------"
# Names of its classes; the other readers are shown by their own names.
_LOADERS = {
    "orca-chat": "OrcaChat (orca-chat)",
    "dolly15k": "DatabricksDolly15k",
    "dolly15k_multilingual": "Dolly15kMultilingual",
    "dolphin-mix": "DolphinMix (dophin-mix)",  # its spelling
    "alpaca_gpt4": "AlpacaGpt4",
    "oasst_export": "ListDataset",
}


def original_form(prefix: str, sources: Sequence[Source], tallies: Sequence[Tally], sampled: bool) -> str:
    """Return the text. prefix: of the shards, with the split, without the folder. sampled: whether fraction and size apply, as they do in
    training splits."""
    parts = [f"\n# Stats for {prefix}*\n\n"]
    for source, tally in zip(sources, tallies, strict=True):
        share = _share(source, tally) if sampled else 1
        parts.append(_entry(_name(source, tally), tally, share))
    return "".join([*parts, _entry("total", total(list(tallies)), 1)])


def _name(source: Source, tally: Tally) -> str:
    reader = source.reader
    known = _LOADERS.get(reader.name) or (f"InstructionDataset ({reader.name})" if reader.val_rounding == "up" else "")
    whole = reader.name == "oasst_export" and tally.samples == tally.available
    return known if whole else f"Subset of {known or reader.name}"


def _share(source: Source, tally: Tally) -> float:
    if source.split.fraction is not None:
        return source.split.fraction
    return min(1, source.split.size / tally.available) if source.split.size and tally.available else 1


def _entry(name: str, tally: Tally, share: float) -> str:
    samples, skipped = tally.samples, tally.skipped.total()
    average = tally.tokens / tally.accepted if tally.accepted else 0.0
    lines = (
        f"## Stats for '{name}' ({samples} samples ({share:.1%}))",
        _LINE,
        f"  Accepted: {tally.accepted}/{samples} ({tally.accepted / max(samples, 1):.1%})",
        f"  Accepted tokens: {tally.tokens}",
        f"  Skipped: {skipped} ({skipped / max(samples, 1):.1%})",
        f"  Min tokens per sample: {tally.shortest}",
        f"  Max tokens per sample: {tally.longest or 0}",
        f"  Avg tokens per sample: {average}",
        _LINE,
    )
    return "\n".join(lines) + "\n\n"

"""megatron-ft pretokenize: chat files to role-labelled shards.

Every file is read twice, once to count and check it, once to tokenize it: memory stays small whatever its size, and a
fault in the data is found before anything is written.
"""

import sys
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.data.chat_format import ChatFormat, get_format
from megatron_ft.data.manifest import manifest_path
from megatron_ft.data.shards import remove_shards
from megatron_ft.data.tokenizer import Tokenizer, extra_tokens, load_tokenizer
from megatron_ft.errors import DataError
from megatron_ft.files import atomic_file, write_json
from tools.pretokenizer.flags import Pretokenize
from tools.pretokenizer.sampling import SPLITS, cap
from tools.pretokenizer.screen import show_result, show_sample
from tools.pretokenizer.settings import Settings, resolve
from tools.pretokenizer.sources import Source, make_plans, make_sources
from tools.pretokenizer.stats import Tally, report, total
from tools.pretokenizer.writing import write

COMMAND = Command(
    name="pretokenize",
    summary="chat files to shards of tokens and their roles",
    sections=(Pretokenize,),
    examples=(
        "megatron-ft pretokenize --input chats.jsonl --tokenizer llama2/tokenizer.model --output_prefix data/mine",
        "megatron-ft pretokenize --configs oasst_top1 llama2 --vocab_file tokenizer.model --output_dir data/oasst",
    ),
    open_flags=True,
)


def run(flags: Pretokenize, others: dict[str, Any]) -> None:
    """others: configuration keys given as flags."""
    settings = resolve(flags, others)
    chat_format = get_format(settings.chat_format)
    tokenizer = _tokenizer(settings, chat_format)
    sources = make_sources(settings)
    if not flags.overwrite:
        _refuse_finished(settings.prefix)
    plans = make_plans(sources, settings.rng_seed)
    cap(plans, settings.max_count)
    text = (".jsonl.gz" if flags.compress else ".jsonl") if flags.write_json or flags.compress else None
    tallies = write(settings, tokenizer, chat_format, list(zip(sources, plans, strict=True)), text)
    write_json(settings.prefix.parent / "special_tokens.json", tokenizer.special_tokens)
    for split in SPLITS:
        prefix = Path(f"{settings.prefix}-{split}")
        if split in tallies:
            _write_stats(prefix, tallies[split], sources)
        else:
            _remove_split(prefix)  # an earlier run's: it would not belong to what is there now
        show_result(prefix, split, tallies.get(split), sources)
    show_sample(settings.prefix, tokenizer)


def _tokenizer(settings: Settings, chat_format: ChatFormat) -> Tokenizer:
    listed = extra_tokens(settings.tokenizer_type, settings.vocab_extra_ids_list, settings.new_tokens)
    extra = [*listed, *(token for token in chat_format.added_tokens if token not in listed)]
    return load_tokenizer(str(settings.vocab_file), extra)


def _refuse_finished(prefix: Path) -> None:
    for split in SPLITS:
        path = manifest_path(f"{prefix}-{split}")
        if path.exists():
            raise DataError(
                f"{path}: these shards exist already; add --overwrite to replace them, or choose another output"
            )


def _write_stats(prefix: Path, tallies: list[Tally], sources: list[Source]) -> None:
    rows = [tally.as_json() for tally in tallies]
    for row, source in zip(rows, sources, strict=True):
        row["left_out_by_reader"] = dict(sorted(source.left_out.items()))
    write_json(Path(f"{prefix}_stats.json"), {"datasets": rows, "total": total(tallies).as_json()})
    with atomic_file(Path(f"{prefix}_stats.txt"), "w") as file:
        file.write(report(tallies))


def _remove_split(prefix: Path) -> None:
    remove_shards(prefix)
    for ending in ("_stats.json", "_stats.txt", ".jsonl", ".jsonl.gz"):
        Path(f"{prefix}{ending}").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

"""megatron-ft pretokenize: convert chat files to role-labelled shards.

Every file is read twice, first to count and check it, then to tokenize it. So memory use is small for files of any size, and errors in
the data are found before anything is written.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.collector import few_collections
from megatron_ft.config.cli import Command, run_script
from megatron_ft.data.chat_format import OWN_TEMPLATE, get_format
from megatron_ft.data.manifest import manifest_path
from megatron_ft.data.shards import remove_shards
from megatron_ft.data.tokenizer import extra_tokens, load_tokenizer
from megatron_ft.errors import ConfigError, DataError
from megatron_ft.files import check_prefix_writable, write_json
from tools.pretokenizer.counting import count
from tools.pretokenizer.finished import ENDING as SETTINGS_ENDING
from tools.pretokenizer.finished import difference, record
from tools.pretokenizer.flags import Pretokenize
from tools.pretokenizer.pool import Pool, cores
from tools.pretokenizer.progress import Progress
from tools.pretokenizer.prompts import ENDING as PROMPTS
from tools.pretokenizer.prompts import write_prompts
from tools.pretokenizer.sampling import SPLITS
from tools.pretokenizer.screen import show_result, show_sample
from tools.pretokenizer.settings import Settings, resolve
from tools.pretokenizer.sources import Source, make_sources
from tools.pretokenizer.statistics_files import write_stats
from tools.pretokenizer.tokenizer_checks import begin_checks
from tools.pretokenizer.work import Worker, WorkerSettings
from tools.pretokenizer.writing import Written, clean, write

WORTH_WORKERS, WORTH_HASTE = 4 << 20, 1 << 20  # bytes of data

COMMAND = Command(
    name="pretokenize",
    summary="convert chat files to shards of tokens and their roles",
    sections=(Pretokenize,),
    examples=(
        "megatron-ft pretokenize --input chats.jsonl --tokenizer llama2/tokenizer.model --output_prefix data/mine",
        "megatron-ft pretokenize --configs oasst_top1 llama2 --vocab_file tokenizer.model --output_dir data/oasst",
    ),
    open_flags=True,
    common=(
        "input",
        "configs",
        "keys: meaning of the files' keys",
        "tokenizer: tokenizer.model, tokenizer.json or their folder",
        "chat_format",
        "output_prefix: prefix of the shards of --input",
        "output_dir",
        "val_split: share for validation",
        "min_assistant_tokens",
        "max_tokens",
        "role_order: chats with roles out of order",
        "duplicates: samples with the same text",
        "on_bad_record: records that cannot be read",
        "workers",
        "max_count",
        "overwrite",
    ),
)


@few_collections()
def run(flags: Pretokenize, others: dict[str, Any]) -> None:
    """Write the shards and print a summary. others: configuration keys given as flags. Raise UserError."""
    settings = resolve(flags, others)
    extra = _extra_tokens(settings)
    tokenizer = load_tokenizer(str(settings.vocab_file), extra)
    chat_format = get_format(settings.chat_format, tokenizer, settings.template_options)
    sources = make_sources(settings)
    text = (".jsonl.gz" if flags.compress else ".jsonl") if flags.write_json or flags.compress else None
    if text and settings.mix_by:
        raise ConfigError(
            "--write_json and mix_by cannot be combined, because the text is written before mixing; remove one of them"
        )
    finished = manifest_path(f"{settings.prefix}-train")  # written last: without it a run has not finished
    if finished.exists() and not flags.overwrite:
        if why := difference(settings, text, tokenizer, chat_format, sources):
            raise DataError(
                f"{finished}: these shards exist already; add --overwrite to replace them, or choose another output ({why})"
            )
        print(f"{settings.prefix}-train: already made from the same input with the same settings; nothing to do")
        return
    check_prefix_writable("--output_prefix" if flags.output_prefix else "output_dir", settings.prefix)
    worker_settings, workers = _worker_settings(settings, sources, extra, text), _workers(settings, sources)
    here = Worker(worker_settings, tokenizer, threads=1 if workers > 1 else None)
    finish_checks = begin_checks(tokenizer, sources, here)
    clean(settings.prefix)
    with (
        Pool(workers, Worker, worker_settings, None, 1, here=here) as pool,
        Progress() as progress,
    ):
        weights = count(sources, settings, pool, progress)
        finish_checks()
        progress.begin(sum(int(np.count_nonzero(s.plan.split & 3)) for s in sources if s.plan is not None))

        def beside(written: dict[str, Written]) -> None:
            write_json(settings.prefix.parent / "special_tokens.json", tokenizer.special_tokens)
            for split in SPLITS:
                prefix = Path(f"{settings.prefix}-{split}")
                if split in written:
                    write_stats(prefix, written[split], sources, settings.mix_by, pool)
                else:
                    _remove_split(prefix)  # of an earlier run, which does not match the new shards
            pool.finish()
            if settings.write_prompts and "val" in written:
                write_prompts(Path(f"{settings.prefix}-val{PROMPTS}"), sources, here, settings.write_prompts)
            record(settings, text, list(written))

        written = write(settings, tokenizer, chat_format, sources, weights, pool, progress, text, beside)
    for split in SPLITS:
        show_result(Path(f"{settings.prefix}-{split}"), split, written.get(split), sources)
    show_sample(settings.prefix, tokenizer)


def _worker_settings(settings: Settings, sources: list[Source], extra: list[str], text: str | None) -> WorkerSettings:
    return WorkerSettings(
        [source.job for source in sources], str(settings.vocab_file), extra, settings.chat_format,
        settings.on_bad_record == "skip", settings.duplicates, text is not None, settings.template_options,
        _bytes(sources) >= WORTH_HASTE,
    )  # fmt: skip


def _extra_tokens(settings: Settings) -> list[str]:
    listed = extra_tokens(settings.tokenizer_type, settings.vocab_extra_ids_list, settings.new_tokens)
    own = () if settings.chat_format == OWN_TEMPLATE else get_format(settings.chat_format).added_tokens
    return [*listed, *(token for token in own if token not in listed)]


def _workers(settings: Settings, sources: list[Source]) -> int:
    """Return the number of workers: as set, else one per core if the input is large enough, else one."""
    if settings.workers is not None:
        return settings.workers
    return cores() if _bytes(sources) >= WORTH_WORKERS else 1


def _bytes(sources: list[Source]) -> int:
    return sum(source.bytes for source in sources)


def _remove_split(prefix: Path) -> None:
    remove_shards(prefix)
    for ending in ("_stats.json", "_stats.txt", "_stats.html", SETTINGS_ENDING, PROMPTS, ".jsonl", ".jsonl.gz"):
        Path(f"{prefix}{ending}").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

"""The tokenizer tried on the first chats, before anything is written."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.data.tokenizer_check import TransformersIds, can_differ, check_text, check_vocabulary, config_rows
from megatron_ft.errors import UserError
from tools.pretokenizer.sources import Source
from tools.pretokenizer.work import Worker

CHATS, SOURCES, LONGEST = 20, 10, 2000  # first chats, of how many sources, characters of a text


def begin_checks(tokenizer: Tokenizer, sources: Sequence[Source], worker: Worker) -> Callable[[], None]:
    """Check what can be checked at once and return what waits for transformers. Both raise TokenizerError."""
    folder = Path(tokenizer.source_files[0]).parent
    if any(file.name == "tokenizer_config.json" for file in tokenizer.source_files):
        check_vocabulary(tokenizer, config_rows(folder), folder)
    texts = _first_texts(sources, worker)
    if worker.settings.hasten:
        tokenizer.hasten(texts)
    check_text(tokenizer, texts)
    return TransformersIds(tokenizer, texts).check if can_differ(tokenizer) else lambda: None


def _first_texts(sources: Sequence[Source], worker: Worker) -> list[str]:
    """Texts of the first chats; records with faults are left to the run itself."""
    texts: list[str] = []
    for source in sources[:SOURCES]:
        try:
            for chunk in islice(source.chunks(), 1):
                texts += worker.texts(source.job, chunk, CHATS)
        except UserError:
            continue
    return [text[:LONGEST] for text in dict.fromkeys(texts) if text.strip() and _is_unicode(text)]


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False

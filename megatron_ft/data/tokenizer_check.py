"""Whether a tokenizer does what it is used for, found out on a run's own texts before anything is written.

It must keep the text, give the ids that transformers gives with the same files, and have about as many tokens as the model's
config.json says. transformers is asked in a process of its own, since it takes seconds to start.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_ft.data.template_files import CONFIG, read_object
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import TokenizerError
from megatron_ft.log import logger

KEPT = 0.5  # share of a text's characters that decoding must give back
SHOWN = 10  # characters of a warning, the most frequent first
_UNKNOWN = re.compile(r"[<\[]\|?unk\w*\|?[>\]]")  # what decoders write for characters that a tokenizer does not know
NEAR = 0.25  # by which the vocabulary and the model's rows may differ; rows are padded
SECONDS = 120
_AS_IT_STANDS = ("", "PreTrainedTokenizerFast", "TokenizersBackend")  # classes that read tokenizer.json as we do
log = logger("data")
_ASK = """
import json, sys
from transformers import AutoTokenizer
folder, texts = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
print(json.dumps([tokenizer.encode(text, add_special_tokens=False) for text in texts]))
"""


def check_vocabulary(tokenizer: Tokenizer, rows: int | None, where: Path) -> None:
    """Raise TokenizerError where a model's config.json speaks of far more or fewer tokens. rows: its vocab_size."""
    if not rows or abs(tokenizer.vocab_size - rows) <= max(NEAR * rows, 1024 if rows > 8192 else 0):
        return
    raise TokenizerError(
        f"{tokenizer.source_files[0]}: {tokenizer.vocab_size} tokens, the model of {where} has {rows}; give the model's own tokenizer"
    )


def config_rows(folder: Path) -> int | None:
    """vocab_size of a config.json, None without one."""
    config = read_object(folder / "config.json")
    inner = config.get("text_config")
    rows = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return rows if isinstance(rows, int) else None


def check_text(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Raise TokenizerError where most of a run's text does not come back from its tokens, and warn where some does not."""
    before, after = Counter[str](), Counter[str]()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        before.update(_letters(text))
        after.update(_letters(tokenizer.decode(ids)))
    lost = before - after
    if before and sum(lost.values()) > (1 - KEPT) * sum(before.values()):
        share = 100 * sum(lost.values()) // sum(before.values())
        raise TokenizerError(
            f"{tokenizer.source_files[0]}: {share}% of the text is lost in its tokens; give a tokenizer that knows this text's characters"
        )
    if lost:
        log.warning(
            f"{tokenizer.source_files[0]}: {sum(lost.values())} of the first {sum(before.values())} characters do not come back from their "
            f"tokens: {' '.join(character for character, _ in lost.most_common(SHOWN))}"
        )


class TransformersIds:
    """transformers' ids of some texts, asked for at once and compared later."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        self.tokenizer = tokenizer
        names = [name for name in tokenizer.special_tokens if name not in tokenizer.added_tokens] or [""]
        # Also behind a control token, where rules for spaces differ.
        kept = [
            text.strip()
            for text in texts
            if text.strip() and not any(name in text for name in tokenizer.special_tokens)
        ]
        self.expected = [(text, tokenizer.encode(text).tolist()) for text in kept]
        if names[0] and "unk" not in names[-1]:
            start = tokenizer.control(names[-1]).tolist()
            self.expected += [
                (names[-1] + text, [*start, *tokenizer.encode(text, at_start=False).tolist()]) for text in kept
            ]
        self._process = self._start() if self.expected else None

    def check(self) -> None:
        """Raise TokenizerError where they are others than ours. Where transformers cannot read the tokenizer, nothing is compared."""
        if self._process is None:
            return
        try:
            output, _ = self._process.communicate(timeout=SECONDS)
            theirs = json.loads(output.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            self._process.kill()
            return
        for (text, ours), ids in zip(self.expected, theirs, strict=True):
            if ids != ours:
                raise TokenizerError(_difference(self.tokenizer, text, ours, ids))

    def _start(self) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-c", _ASK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps([str(_folder(self.tokenizer)), [text for text, _ in self.expected]]))
        process.stdin.close()
        process.stdin = None
        return process


def can_differ(tokenizer: Tokenizer) -> bool:
    """Return whether transformers may read these files in another way: a class of its own is named, or there is only a tokenizer.model;
    and it is installed."""
    config = read_object(_folder(tokenizer) / CONFIG)
    names = {file.name for file in tokenizer.source_files}
    as_it_stands = str(config.get("tokenizer_class") or "") in _AS_IT_STANDS and "add_prefix_space" not in config
    alike = as_it_stands and "tokenizer.json" in names
    return CONFIG in names and not alike and find_spec("transformers") is not None


def _folder(tokenizer: Tokenizer) -> Path:
    return Path(tokenizer.source_files[0]).parent


def _difference(tokenizer: Tokenizer, text: str, ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return (
        f"{_folder(tokenizer)}: transformers gives other ids from these files, for {text[:40]!r} from token {at} on {theirs[at : at + 3]} "
        f"instead of {ours[at : at + 3]}; give tokenizer.json or tokenizer.model itself, if that is what the model was trained with"
    )


def _letters(text: str) -> str:
    return "".join(_UNKNOWN.sub("", text.casefold()).split())

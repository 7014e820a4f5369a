"""Texts to ids in bulk with gigatoken, several times as fast as the reference libraries, with the same ids.

It knows byte pair encoding of bytes, and that of SentencePiece with byte pieces. It is used only where it gives the reference's ids for
hard texts and for the first ones of a run. It remembers what it has met, so it is made anew from time to time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orjson

from megatron_ft.errors import half_a_character
from megatron_ft.log import logger

log = logger("data.tokenizer")

RENEW = 32 << 20  # characters; by then gigatoken holds at most about 300 MB
# Where encoders differ if they differ: spaces, line ends, marks, case, numbers, names of tokens, scripts, what is not assigned.
HARD = (
    "¦ ¦  ¦   x¦a ¦ a¦a  b¦\n¦\n\n¦ \n a¦\t\tx¦\r\n¦a\r\n\r\nb¦\u2581¦a\u2581b¦\u2581\u2581 \u2581"
    "¦\0\x01\x7f¦\x85\x1c\u2028\u3000\u00a0\ufeff¦don't¦I'LL¦'S's¦don\u2019t¦12345 1234567¦3.14¦x_y__z¦CamelCase¦HTTPServer2¦!?!¦ ...¦(a)[b]{c}¦https://a.b/c?d=e&f=%20"
    "¦<s>¦</s>¦<unk>¦<pad>¦<0x0A>¦<|im_start|>¦[INST] x [/INST]¦caf\u00e9 cafe\u0301¦\ufb01¦\u0130\u017f\u01c5\u2167¦\u00bd\u00b2\u0663"
    "¦\u4e8c\u4e09 \u56db¦\ud55c\uad6d\uc5b4¦\u0e01\u0e47¦\u0627\u0644¦\U0001f600\U0001f3fd¦\U0001f469\u200d\U0001f469"
    "¦\U0010ffff¦aaaaaaaaaaaaaaaaaaaaaa"
).split("¦")


class Failed(Exception):
    """gigatoken is not installed, does not know the tokenizer, or stopped."""


class Bulk:
    """description: a tokenizer.json, without added tokens that text must not spell."""

    def __init__(self, description: dict[str, Any]):
        self._description = orjson.dumps(description)
        self._encoder, self._characters = _load(self._description), 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens]. Raise TokenizerError for a lone surrogate, Failed for anything else."""
        self._characters += sum(map(len, texts))
        if self._characters > RENEW:
            self._encoder, self._characters = _load(self._description), 0
        try:
            with _failing():
                return [ids.view(np.int32) for ids in map(self._encoder.encode, texts)]
        except TypeError as error:
            raise half_a_character() from error


def agreeing(
    description: dict[str, Any], reference: Callable[[list[str]], list[np.ndarray]], texts: Sequence[str]
) -> Bulk | None:
    """Return a Bulk that gives the reference's ids for HARD and `texts`; None if gigatoken does not know the tokenizer or differs."""
    if not _may_be_known(description):
        return None
    tried = [*HARD, *texts]
    try:
        bulk = Bulk(description)
        found = bulk.encode(tried)
    except Failed:  # not installed, or a part that it does not know
        return None
    for text, ids, expected in zip(tried, found, reference(tried), strict=True):
        if not np.array_equal(ids, expected):
            log.warning("gigatoken gives other ids for %.40r; the slower reference library is used", text)
            return None
    return bulk


def _may_be_known(description: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json has nothing that gigatoken reads past: random merges, bytes of a text that is not cut."""
    step = description.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    uncut = len(steps) == 1 and steps[0].get("type") == "ByteLevel" and not steps[0].get("use_regex", True)
    return not uncut and not description["model"].get("dropout")


def _load(description: bytes) -> Any:
    with _failing():
        from gigatoken.gigatoken_rs import load_hf_json

        return load_hf_json(description)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Raise Failed for all that goes wrong, but for a TypeError. A panic of Rust is no Exception."""
    try:
        yield
    except TypeError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise Failed(str(error)) from error
        raise

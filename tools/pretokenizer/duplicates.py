"""Duplicate samples: exact ones, by a 64-bit hash of roles and texts; near ones, by MinHash over word n-grams.

The first of several duplicates is kept, in the order of the datasets. Hashes need 8 bytes per sample. The search for near duplicates
needs about 2 KB of memory per kept sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_ft.data.tool_text import as_text, has_tools
from megatron_ft.errors import ConfigError
from tools.pretokenizer.fields import Conversation

PERMUTATIONS, BANDS = (
    128,
    16,
)  # samples that share a band of 8 values are compared; most do from a similarity of about 0.7
WORDS = 3  # per n-gram


def fingerprints(chats: Sequence[Conversation]) -> np.ndarray:
    """Return a hash of each conversation's roles and texts: uint64 [chats]."""
    import xxhash

    hashes = np.empty(len(chats), np.uint64)
    for i, chat in enumerate(chats):
        text = "\0".join(part for message in _written(chat) for part in (message["role"], message["content"]))
        hashes[i] = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
    return hashes


def signatures(chats: Sequence[Conversation]) -> np.ndarray:
    """Return the MinHash of each conversation's texts: uint32 [chats, PERMUTATIONS]. Raise ConfigError without `rensa`."""
    rensa = minhash_library()
    sets = [_runs(" ".join(message["content"] for message in _written(chat))) for chat in chats]
    if not sets:
        return np.empty((0, PERMUTATIONS), np.uint32)
    return np.array(rensa.RMinHash.digests_from_token_sets(sets, PERMUTATIONS, 1), np.uint32)


def _written(chat: Conversation) -> Sequence[Mapping[str, Any]]:
    """Return the chat with its tools as text, so that chats with different calls are different."""
    return as_text(chat, None, False) if has_tools(chat) else chat


def minhash_library() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            "duplicates: near needs rensa, which is not installed; pip install 'megatron_ft[data]', or use duplicates: exact"
        ) from error
    return rensa


def _runs(text: str) -> list[str]:
    words = text.lower().encode("utf-8", "replace").decode().split()
    return [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Return True for each sample that is the first with its hash: bool [samples]."""
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first


class NearIndex:
    """Index of the signatures of all samples kept so far."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._kept = np.empty((1024, PERMUTATIONS), np.uint32)
        self._count = 0
        self._bands: list[dict[bytes, int]] = [{} for _ in range(BANDS)]

    def keep(self, signature: np.ndarray) -> bool:
        """Add a sample and return True, unless a kept one is similar by the threshold or more. signature: uint32 [PERMUTATIONS]."""
        band_keys = [band.tobytes() for band in signature.reshape(BANDS, -1)]
        alike = {
            found for band, key in zip(self._bands, band_keys, strict=True) if (found := band.get(key)) is not None
        }
        if any(np.mean(self._kept[i] == signature) >= self.threshold for i in alike):
            return False
        if self._count == len(self._kept):
            self._kept = np.concatenate([self._kept, np.empty_like(self._kept)])
        self._kept[self._count] = signature
        for band, key in zip(self._bands, band_keys, strict=True):
            band.setdefault(key, self._count)
        self._count += 1
        return True

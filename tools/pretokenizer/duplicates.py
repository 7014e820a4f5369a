"""Samples that say the same: exactly, by a 64-bit hash of roles and texts; or nearly, by MinHash over runs of words.

The first of several is kept, in the order of the datasets. Hashes take 8 bytes a sample; looking for near duplicates
takes about 2 KB of memory for every sample that is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_ft.data.tool_text import as_text, has_tools
from megatron_ft.errors import ConfigError
from tools.pretokenizer.fields import Conversation

PERMUTATIONS, BANDS = 128, 16  # samples that share a band of 8 values are compared; from about 0.7 alike on, most do
WORDS = 3  # in a run


def fingerprints(chats: Sequence[Conversation]) -> np.ndarray:
    """A hash of each conversation's roles and texts: uint64 [chats]."""
    import xxhash

    hashes = np.empty(len(chats), np.uint64)
    for i, chat in enumerate(chats):
        said = "\0".join(part for message in _written(chat) for part in (message["role"], message["content"]))
        hashes[i] = xxhash.xxh3_64_intdigest(said.encode("utf-8", "surrogatepass"))
    return hashes


def signatures(chats: Sequence[Conversation]) -> np.ndarray:
    """MinHash of each conversation's texts: uint32 [chats, PERMUTATIONS]. Raises ConfigError without `rensa`."""
    rensa = minhash_library()
    sets = [_runs(" ".join(message["content"] for message in _written(chat))) for chat in chats]
    if not sets:
        return np.empty((0, PERMUTATIONS), np.uint32)
    return np.array(rensa.RMinHash.digests_from_token_sets(sets, PERMUTATIONS, 1), np.uint32)


def _written(chat: Conversation) -> Sequence[Mapping[str, Any]]:
    """The chat with its tools as text: two that differ in a call are not the same."""
    return as_text(chat, None, False) if has_tools(chat) else chat


def minhash_library() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            "duplicates: near needs rensa, which is not installed; pip install 'megatron_ft[data]', or say exact"
        ) from error
    return rensa


def _runs(text: str) -> list[str]:
    words = text.lower().encode("utf-8", "replace").decode().split()
    return [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Which samples are the first with their hash: bool [samples]."""
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first


class NearIndex:
    """Signatures of the samples kept so far."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._kept = np.empty((1024, PERMUTATIONS), np.uint32)
        self._count = 0
        self._bands: list[dict[bytes, int]] = [{} for _ in range(BANDS)]

    def keep(self, signature: np.ndarray) -> bool:
        """Whether nothing kept so far is as alike as the threshold; then it is kept. signature: uint32 [PERMUTATIONS]."""
        keys = [band.tobytes() for band in signature.reshape(BANDS, -1)]
        alike = {found for band, key in zip(self._bands, keys, strict=True) if (found := band.get(key)) is not None}
        if any(np.mean(self._kept[i] == signature) >= self.threshold for i in alike):
            return False
        if self._count == len(self._kept):
            self._kept = np.concatenate([self._kept, np.empty_like(self._kept)])
        self._kept[self._count] = signature
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, self._count)
        self._count += 1
        return True

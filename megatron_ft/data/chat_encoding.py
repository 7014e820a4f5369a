"""Splits conversations into parts, and parts into token ids and role bytes, for every chat format.

A part is a control token, a fixed text of the template, or a text of the chat. Adjacent texts are tokenized as one, as by a server that
tokenizes the whole prompt. A token belongs to the part in which it begins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_ft.data.tokenizer import Tokenizer

CONTROL, FIXED, TEXT = range(3)

Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids int32 [tokens], role bytes uint8 [tokens], lengths int64 [conversations]: of concatenated conversations."""


class Part(NamedTuple):
    role_byte: int  # of its tokens, see roles.py
    text: str
    kind: int = TEXT


def encode_parts(tokenizer: Tokenizer, conversations: Sequence[Sequence[Part]]) -> Encoded:
    """Tokenize conversations given as parts, in one batch."""
    pieces: list[np.ndarray] = []
    role_bytes: list[int] = []
    ends: list[int] = []
    todo: list[tuple[int, list[Part], bool]] = []  # place of the first piece, parts of the run, at the start
    for parts in conversations:
        i, first = 0, len(pieces)
        while i < len(parts):
            part = parts[i]
            role_bytes.append(part.role_byte)
            if part.kind == CONTROL:
                pieces.append(tokenizer.control(part.text))
                i += 1
                continue
            run = [part]
            while i + len(run) < len(parts) and parts[i + len(run)].kind != CONTROL:
                run.append(parts[i + len(run)])
            at_start = len(pieces) == first
            if len(run) == 1 and part.kind == FIXED:
                pieces.append(tokenizer.literal(part.text, at_start))
            else:
                todo.append((len(pieces), run, at_start))
                pieces += [_NOTHING] * len(run)
                role_bytes += [part.role_byte for part in run[1:]]
            i += len(run)
        ends.append(len(pieces))
    for at_start in (False, True):
        _encode_runs(tokenizer, [(place, run) for place, run, start in todo if start == at_start], at_start, pieces)
    return join(pieces, role_bytes, ends)


def join(pieces: list[np.ndarray], role_bytes: Sequence[int], ends: Sequence[int]) -> Encoded:
    """Concatenate pieces of tokens, each with one role byte. Conversation i ends before piece ends[i]."""
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ids = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    bounds = np.concatenate([[0], np.cumsum(sizes)])[[0, *ends]]
    return ids, np.repeat(np.array(role_bytes, np.uint8), sizes), np.diff(bounds)


def split(encoded: Encoded) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids, role bytes) of each conversation."""
    ids, role_bytes, lengths = encoded
    stops = np.cumsum(lengths)[:-1]
    return list(zip(np.split(ids, stops), np.split(role_bytes, stops), strict=True)) if len(lengths) else []


_NOTHING = np.empty(0, np.int32)


def _encode_runs(
    tokenizer: Tokenizer, runs: list[tuple[int, list[Part]]], at_start: bool, pieces: list[np.ndarray]
) -> None:
    """Tokenize each run as one text and put its tokens in the places of its parts."""
    alone = [(place, run[0].text) for place, run in runs if len(run) == 1]
    for (place, _), ids in zip(alone, tokenizer.encode_batch([text for _, text in alone], at_start), strict=True):
        pieces[place] = ids
    several = [(place, [part.text for part in run]) for place, run in runs if len(run) > 1]
    cut = tokenizer.encode_cut([texts for _, texts in several], at_start)
    for (place, texts), parts in zip(several, cut, strict=True):
        pieces[place : place + len(texts)] = parts

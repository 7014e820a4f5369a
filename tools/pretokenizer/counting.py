"""The first pass over all data: counts samples, finds duplicates, and assigns the rest to training and validation.

All errors in the data are found in this pass, before anything is written. Where all samples will be used, it also encodes them, as far as
there is room to hold them; what is held is not read again.
"""

from collections import Counter

import numpy as np

from megatron_ft.data.roles import weight_table
from tools.pretokenizer.duplicates import NearIndex, first_of_each
from tools.pretokenizer.pool import Pool
from tools.pretokenizer.progress import SHOWN, Progress, warn_skipped
from tools.pretokenizer.sampling import cap, plan
from tools.pretokenizer.settings import Settings
from tools.pretokenizer.sources import Source
from tools.pretokenizer.unread import merge
from tools.pretokenizer.work import Counted

FAULTY = "faulty record"  # reason for leaving out
MOST_HELD = 256 << 20  # bytes of encoded samples


def count(sources: list[Source], settings: Settings, pool: Pool, progress: Progress) -> list[float]:
    """Fill every source's plan. Return the table of the message weights that occur.

    Raise DataError for the first faulty record, unless faulty records are skipped.
    """
    weights: set[float] = set()
    hashes: list[np.ndarray] = []
    near = NearIndex(settings.near_threshold) if settings.duplicates == "near" else None
    counted: list[tuple[Source, np.ndarray, np.ndarray]] = []
    held = 0
    for source in sources:
        takes_all = settings.duplicates == "keep" and settings.max_count is None and source.takes_all
        sizes, own = [], []
        fresh: list[np.ndarray] = []
        source.stamp()
        tasks = ((source.job, chunk, takes_all and held < MOST_HELD) for chunk in source.chunks())
        for chunk in pool.map("count", tasks):
            _note(source, chunk)
            held += chunk.encodings.nbytes if chunk.encodings is not None else 0
            source.per_chunk.append(int(chunk.sizes.sum()))
            sizes.append(chunk.sizes)
            weights |= chunk.weights
            if chunk.hashes is not None:
                own.append(chunk.hashes)
            if near is not None:
                assert chunk.signatures is not None
                fresh.append(np.array([near.keep(signature) for signature in chunk.signatures], bool))
            progress.read(len(chunk.sizes), 0 if chunk.encodings is None else len(chunk.encodings.ids))
        hashes.append(np.concatenate(own) if own else np.empty(0, np.uint64))
        counted.append((source, _joined(sizes, np.int32), _joined(fresh, bool)))
        warn_skipped(source.bad, source.left_out[FAULTY], source.name)
    first = first_of_each(np.concatenate(hashes)) if settings.duplicates != "keep" else None
    at = 0
    for source, lengths, unlike in counted:
        keep = np.ones(int(lengths.sum()), bool)
        if first is not None:
            keep = first[at : at + len(keep)]
            at += len(keep)
            source.left_out["exact duplicate"] += int((~keep).sum())
        if near is not None:
            source.left_out["near duplicate"] += int((keep & ~unlike).sum())
            keep = keep & unlike
        source.left_out += Counter()  # drops reasons that never happened
        _plan(source, lengths, keep, settings.rng_seed)
    cap([source.plan for source in sources if source.plan is not None], settings.max_count)
    for source in sources:
        source.mark(settings.rng_seed)
    return weight_table(sorted(weights))


def _plan(source: Source, sizes: np.ndarray, keep: np.ndarray, seed: int) -> None:
    """Split and sample the samples to keep; mark all others as OUT."""
    if keep.all():
        source.plan = plan(sizes, source.split, source.random(seed))
        return
    group = np.repeat(np.arange(len(sizes)), sizes)
    left = plan(np.bincount(group[keep], minlength=len(sizes)), source.split, source.random(seed))
    split = np.zeros(len(keep), np.uint8)
    split[keep] = left.split
    source.plan = type(left)(split, left.available)


def _note(source: Source, chunk: Counted) -> None:
    source.left_out += chunk.left_out
    source.held.append(chunk.encodings)
    merge(source.unread, chunk.unread)
    if chunk.bad:
        source.left_out[FAULTY] += len(chunk.bad)
        source.bad += chunk.bad[: SHOWN - len(source.bad)]


def _joined(arrays: list[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, kind)

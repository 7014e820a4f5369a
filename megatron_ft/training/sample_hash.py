"""A rolling hash of the samples that a run has consumed: equal hashes mean the same samples in the same order.

It is chained row by row, so layout and batch size do not matter. It begins with the content of the shards, not their names. All ranks
compute it from the plan of rows.
"""

from __future__ import annotations

from megatron_ft.data.loader import ChatDataset
from megatron_ft.log import logger
from megatron_ft.wording import counted

log = logger("training")

MOST_ROWS = 2_000_000
"""Rows that are hashed again when a run resumes: seconds."""


def beginning(dataset: ChatDataset) -> str:
    """Return the hash before the first row: of the digests of the shards, if their manifests have them, and of the row length."""
    import xxhash

    state = xxhash.xxh3_128(str(dataset.seq_length).encode())
    for shard in dataset.shards:
        for ending, entry in sorted(shard.manifest.files.items()):
            state.update(f"{ending} {entry['bytes']} {entry['digest']}".encode())
    return state.hexdigest()


def extend(before: str, dataset: ChatDataset, first: int, rows: int) -> str:
    """Return the hash after `rows` more rows, from row number `first` since the start of training."""
    import xxhash

    state = bytes.fromhex(before)
    for row in range(first, first + rows):
        state = xxhash.xxh3_128_digest(state + dataset.samples_of(row).astype("<i8").tobytes())
    return state.hex()


def check_resumed(saved: str, dataset: ChatDataset, consumed: int) -> str:
    """Return the hash to continue with. Log a warning if this run would not have consumed the same rows, for example because of other
    shards.

    saved: "" in checkpoints of earlier versions, which do not contain it.
    """
    if consumed > MOST_ROWS:
        log.info(
            f"{counted(consumed, 'row')} consumed, too many to verify again: the hash continues from the saved one"
        )
        return saved or beginning(dataset)
    ours = extend(beginning(dataset), dataset, 0, consumed)
    if saved and ours != saved:
        log.warning(
            f"the rows consumed so far, {consumed:,}, are not those that this run's shards and settings give (hash {saved[:8]}, now "
            f"{ours[:8]}): the data or its settings changed, some samples may come twice or not at all"
        )
        return saved
    if saved:
        log.info(f"the rows consumed so far, {consumed:,}, are this run's own, in the same order (hash {saved[:8]})")
    return ours

"""Compares shards with the hashes in their manifests: every byte is read once, several files at the same time.

Opening shards checks everything else (manifest, sizes, indexes).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_ft.data.mmididx import Sequences
from megatron_ft.data.shards import Shards
from megatron_ft.log import logger

MUCH = 20e9  # bytes that take long enough to be announced
log = logger("data")


def verify_shards(several: Sequence[Any], flag: str) -> None:
    """Raise DataError naming the first file whose bytes are not those that were written.

    several: shards of any kind; plain ones have no hashes and are left out. flag: leaves this out, for the log.
    """
    parts = [sequences for shards in several if isinstance(shards, Shards) for sequences in shards.sequences]
    if not parts:
        return
    size, started = sum(part.bytes for part in parts), time.monotonic()
    if size > MUCH:
        log.info(
            f"verifying {size / 1e9:.0f} GB of shards first; {flag} leaves it out, preflight does it once for many runs"
        )
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1, 8)) as threads:
        list(threads.map(Sequences.verify, parts))
    if size > MUCH:
        log.info(f"{len(parts)} shard files verified in {time.monotonic() - started:.0f} s")

"""The training data of a model, for the checkpoint and the model card of its export: shards by name, size and hash. No paths."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ft.data.loader import ChatDataset


def trained_on(dataset: ChatDataset) -> str:
    """Return JSON with one entry per set of shards: the digest of its tokens and the names of its sources."""
    entries = []
    for shard in dataset.shards:
        manifest = shard.manifest
        tokens = next((entry for ending, entry in manifest.files.items() if ending.endswith("text.bin")), {})
        entries.append(
            {
                "name": Path(shard.prefix).name,
                "samples": manifest.counts.get("samples"),
                "tokens": manifest.counts.get("tokens"),
                "digest": tokens.get("digest"),
                "sources": sorted({str(source.get("name")) for source in manifest.sources}),
            }
        )
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"

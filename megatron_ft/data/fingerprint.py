"""A hash of bytes, or of what JSON can say: equal for equal content, wherever it lies."""

import json
from typing import Any


def fingerprint(value: Any) -> str:
    """ "xxh3:<32 hex digits>"; against accidents, not against forgery."""
    import xxhash

    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, ensure_ascii=True).encode()
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"

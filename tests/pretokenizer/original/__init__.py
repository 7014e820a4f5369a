"""Files of the original pretokenizers, see README.md."""

import json
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "numbers.json").read_text())


def unpack(folder: Path) -> Path:
    """Unpack inputs/ and shards/ into a folder."""
    with tarfile.open(HERE / "original.tar.xz") as archive:
        archive.extractall(folder)
    return folder

"""Where a dataset's files are: one file, a folder of them as a dataset repository lays it out, or the cache folder.

Nothing is ever fetched. Knows the names of files, not what is in them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.errors import DataError

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".txt")
WRAPPERS = ("", ".gz", ".zst", ".tar.gz", ".tgz", ".tar")
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README.txt", "LICENSE.txt"}


def find(given: str | None, name: str, cache_dir: str | None, repositories: Sequence[str] = ()) -> Path:
    """The file or folder of a dataset: as given, else looked for by its names in the cache folder.

    repositories: what the dataset is called where it is published, "owner/name".
    Raises DataError that says where was looked.
    """
    cache = Path(cache_dir or ".").expanduser()
    if given is not None:
        places = [Path(given).expanduser(), cache / given]
    else:
        folders = [name, *repositories, *(repository.split("/")[-1] for repository in repositories)]
        places = [cache / folder for folder in folders]
        places += [cache / f"{name}{end}{wrap}" for end in ENDINGS for wrap in WRAPPERS]
        places += [cache / f"{name}{wrap}" for wrap in WRAPPERS[3:]]
        for repository in repositories:  # as the Hugging Face hub's client caches them, there and here
            snapshots = cache / f"datasets--{repository.replace('/', '--')}" / "snapshots"
            places += sorted(snapshots.glob("*"))
    for place in places:
        if place.exists():
            return place
    if given is not None:
        looked = f"looked for {places[0].absolute()} and in {cache}"
        raise DataError(f"{given}: no such file ({looked}); check the path")
    known = f", a copy of {' or '.join(repositories)}," if repositories else ""
    raise DataError(
        f"dataset {name}: no input_file_path, and nothing of that name in {cache.absolute()}; "
        f"put its file or folder{known} there, or say where it lies"
    )


def files_of(place: Path, splits: Sequence[str] = ("train",)) -> list[Path]:
    """The data files of a file or folder, in the order of their names.

    splits: of files named after a split (train.jsonl, en-00000-of-00001.parquet, test/data.arrow), those to take; where
    none is named after one of them, all are taken.
    """
    if not place.is_dir():
        return [place]
    found = [path for path in sorted(place.rglob("*")) if path.is_file() and _is_data(path.relative_to(place))]
    if not found:
        raise DataError(f"{place}: no data files in this folder (*{', *'.join(ENDINGS)}, or those compressed)")
    pattern = re.compile(rf"(?:^|[/_.-])(?:{'|'.join(map(re.escape, splits))})(?:[/_.-]|$)", re.IGNORECASE)
    return [path for path in found if pattern.search(path.relative_to(place).as_posix())] or found


def _is_data(path: Path) -> bool:
    if path.name in NOT_DATA or any(part.startswith((".", "_")) for part in path.parts):
        return False
    name = path.name.lower()
    wrapper = next((wrap for wrap in WRAPPERS[1:] if name.endswith(wrap)), "")
    return "tar" in wrapper or wrapper == ".tgz" or name.removesuffix(wrapper).endswith(ENDINGS)

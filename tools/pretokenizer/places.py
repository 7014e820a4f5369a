"""Finds a dataset's files: one file, a folder with the layout of a dataset repository, or the cache folder.

Nothing is downloaded. Only names are used, no file is opened.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.errors import DataError

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt")
ARCHIVES = (".tar.gz", ".tgz", ".tar", ".tar.xz", ".tar.zst", ".tar.bz2")
WRAPPERS = ("", ".gz", ".zst", ".xz", ".bz2", *ARCHIVES)
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README.txt", "LICENSE.txt"}


def find(given: str | None, name: str, cache_dir: str | None, repositories: Sequence[str] = ()) -> Path:
    """Return the file or folder of a dataset: the given path, else the one found by its names in the cache folder.

    repositories: published names of the dataset, "owner/name".
    Raise DataError with the places that were searched.
    """
    cache = Path(cache_dir or ".").expanduser()
    if given is not None:
        places = [Path(given).expanduser(), cache / given]
    else:
        folders = [name, *repositories, *(repository.split("/")[-1] for repository in repositories)]
        places = [cache / folder for folder in folders]
        places += [cache / f"{name}{end}{wrap}" for end in ENDINGS for wrap in WRAPPERS]
        places += [cache / f"{name}{wrap}" for wrap in ARCHIVES]
        for repository in repositories:  # the cache of the Hugging Face hub's client
            snapshots = cache / f"datasets--{repository.replace('/', '--')}" / "snapshots"
            places += sorted(snapshots.glob("*"))
    for place in places:
        if place.exists():
            return place
    if given is not None:
        looked = f"searched {places[0].absolute()} and {cache}"
        raise DataError(f"{given}: no such file ({looked}); check the path")
    known = f", a copy of {' or '.join(repositories)}," if repositories else ""
    raise DataError(
        f"dataset {name}: input_file_path is not set, and no file or folder of this name is in {cache.absolute()}; "
        f"put its file or folder{known} there, or set input_file_path"
    )


def files_of(place: Path, splits: Sequence[str] = ("train",)) -> list[Path]:
    """Return the data files of a file or folder, sorted by name.

    splits: take only files named after one of these splits (train.jsonl, en-00000-of-00001.parquet, test/data.arrow); if there are
    none, take all.
    """
    if not place.is_dir():
        return [place]
    found = [path for path in sorted(place.rglob("*")) if path.is_file() and _is_data(path.relative_to(place))]
    if not found:
        raise DataError(f"{place}: no data files in this folder (*{', *'.join(ENDINGS)}, also compressed)")
    pattern = re.compile(rf"(?:^|[/_.-])(?:{'|'.join(map(re.escape, splits))})(?:[/_.-]|$)", re.IGNORECASE)
    return [path for path in found if pattern.search(path.relative_to(place).as_posix())] or found


def named_files(place: Path, wanted: str | Sequence[str] | None, usual: str | None) -> list[Path]:
    """Return the files of a folder with the wanted names, else the one with the usual name; [] if neither is given or there.

    Raise DataError for a wanted file that is not there.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted or [])
    found = [place / name for name in names if (place / name).is_file()]
    if len(found) < len(names):
        missing = next(name for name in names if not (place / name).is_file())
        raise DataError(f"{place / missing}: no such file, named in data_files; check the name")
    return found or [path for path in [place / (usual or "")] if place.is_dir() and path.is_file()]


def _is_data(path: Path) -> bool:
    if path.name in NOT_DATA or any(part.startswith((".", "_")) for part in path.parts):
        return False
    name = path.name.lower()
    wrapper = next((wrap for wrap in sorted(WRAPPERS[1:], key=len, reverse=True) if name.endswith(wrap)), "")
    return wrapper in ARCHIVES or name.removesuffix(wrapper).endswith(ENDINGS)

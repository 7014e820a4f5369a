"""A folder with a manifest of digests: any change of any byte of any file is refused, and the file named."""

import json
import random

import pytest

from megatron_ft.digests import MANIFEST, check_digests, has_digests, read_digests, unlisted, write_digests
from megatron_ft.errors import DamagedError


@pytest.fixture
def folder(tmp_path):
    """Two files of tensors' size, one empty, one in a folder of its own; committed."""
    (tmp_path / "tokenizer").mkdir()
    for name, size in {"a.distcp": 3000, "b.distcp": 5000, "empty": 0, "tokenizer/t.model": 700}.items():
        (tmp_path / name).write_bytes(random.Random(name).randbytes(size))
    write_digests(tmp_path)
    return tmp_path


def test_every_file_is_listed_and_accepted(folder):
    assert has_digests(folder)
    assert list(read_digests(folder)) == ["a.distcp", "b.distcp", "empty", "tokenizer/t.model"]
    assert read_digests(folder)["empty"] == (0, "xxh3:99aa06d3014798d86001c324468d497f")
    check_digests(folder)


def test_no_flipped_bit_is_accepted(folder):
    """A bit of every file in turn, the manifest's own included: every second byte of it, and 90 bits of the others."""
    rng, flips = random.Random(1), []
    manifest = (folder / MANIFEST).stat().st_size
    flips += [
        (MANIFEST, byte * 8 + rng.randrange(8)) for byte in range(0, manifest - 1, 2)
    ]  # the last one ends the line
    flips += [
        (name, rng.randrange(700 * 8)) for name in ("a.distcp", "b.distcp", "tokenizer/t.model") for _ in range(30)
    ]
    for name, bit in flips:
        path = folder / name
        good = path.read_bytes()
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(DamagedError, match=path.name):
            check_digests(folder)
        path.write_bytes(good)
    check_digests(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.unlink(), "b.distcp is missing; restore it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "b.distcp has 4999 bytes, 5000 were written: it is cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "b.distcp has 5001 bytes, 5000 were written: it is damaged"),
        (lambda path: path.write_bytes(bytes(5000)), "b.distcp is damaged: its digest is not"),
    ],
    ids=["gone", "cut", "longer", "zeros"],
)  # fmt: skip
def test_what_is_wrong_is_said(folder, change, message):
    change(folder / "b.distcp")
    with pytest.raises(DamagedError, match=message):
        check_digests(folder)


def test_shares_are_everything_once(folder):
    """Of three ranks only the one whose share holds the damaged file finds it."""
    (folder / "b.distcp").write_bytes(bytes(5000))
    found = 0
    for rank in range(3):
        try:
            check_digests(folder, (rank, 3))
        except DamagedError:
            found += 1
    assert found == 1


def test_a_manifest_that_is_missing_or_foreign(folder):
    manifest = folder / MANIFEST
    said = json.loads(manifest.read_text())
    for wrong in ("", "[]", "{}", json.dumps(said | {"format_version": 2}), json.dumps(said | {"files": {}})):
        manifest.write_text(wrong)
        with pytest.raises(DamagedError, match=r"digests\.json is damaged"):
            read_digests(folder)
    manifest.unlink()
    assert not has_digests(folder)
    with pytest.raises(DamagedError, match=r"digests\.json is missing: the folder was not finished"):
        check_digests(folder)


def test_names_outside_the_folder_are_not_followed(folder):
    from megatron_ft.digests import Entry, write_manifest

    write_manifest(folder, {"../secret": Entry(1, "xxh3:0")})
    with pytest.raises(DamagedError, match="outside its own folder"):
        check_digests(folder)


def test_what_was_put_there_later(folder):
    (folder / "note.pkl").write_bytes(b"x")
    assert unlisted(folder) == ["note.pkl"]
    check_digests(folder)

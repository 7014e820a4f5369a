"""Nothing half-written, whatever goes wrong, and reading errors that name file and line."""

import errno
import os
import stat

import pytest

from megatron_ft.errors import UserError
from megatron_ft.files import (
    atomic_file,
    atomic_folder,
    check_file_writable,
    check_writable,
    digest,
    read_json,
    read_text,
    write_json,
)


class Broken(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one" and names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_file_stays_as_it_was_after_an_error(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path, "w") as file:
        file.write("new")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_text_is_utf8_with_plain_newlines(tmp_path):
    with atomic_file(tmp_path / "a", "w") as file:
        file.write("ü\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc\n"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", 1)
        with atomic_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "new" / "checkpoint"
    with atomic_folder(target) as folder:
        (folder / "rank").mkdir()
        (folder / "rank" / "weights").write_text("w")
        assert not target.exists() and folder.parent == target.parent
    assert (target / "rank" / "weights").read_text() == "w" and names(target.parent) == ["checkpoint"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_leaves_nothing_after_an_error(tmp_path, overwrite):
    with pytest.raises(Broken), atomic_folder(tmp_path / "a", overwrite) as folder:
        (folder / "x").write_text("x")
        raise Broken
    assert names(tmp_path) == []


def test_folder_with_something_in_it_is_refused_before_work_starts(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("p")
    with (
        pytest.raises(UserError, match=r"a exists and is not empty: give another folder"),
        atomic_folder(tmp_path / "a"),
    ):
        raise Broken  # never reached
    assert names(tmp_path / "a") == ["precious"] and names(tmp_path) == ["a"]


def test_folder_filled_by_another_process_meanwhile_is_refused(tmp_path):
    with pytest.raises(UserError, match="exists and is not empty"), atomic_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("t")
    assert names(tmp_path / "a") == ["theirs"] and names(tmp_path) == ["a"]


def test_a_file_in_the_folder_s_place_is_refused(tmp_path):
    (tmp_path / "a").write_text("p")
    with pytest.raises(UserError, match="exists and is not a folder"), atomic_folder(tmp_path / "a"):
        pass


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path / "a") == ["x"] and names(tmp_path) == ["a"]


def test_overwrite_replaces_the_whole_folder_and_keeps_it_on_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("o")
    with pytest.raises(Broken), atomic_folder(tmp_path / "a", overwrite=True):
        raise Broken
    assert names(tmp_path / "a") == ["old"]
    with atomic_folder(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").write_text("n")
    assert names(tmp_path / "a") == ["new"] and names(tmp_path) == ["a"]


def test_digest_is_of_the_content(tmp_path):
    for name, content in {"a": b"x" * 9_000_000, "b": b"x" * 9_000_000, "c": b"x" * 8_999_999}.items():
        (tmp_path / name).write_bytes(content)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    (tmp_path / "empty").touch()
    assert digest(tmp_path / "empty") == "xxh3:99aa06d3014798d86001c324468d497f"  # XXH3-128 of nothing, as specified


def test_json_round_trip_keeps_order_and_letters(tmp_path):
    value = {"b": [1, 2.5, None, "ü"], "a": {"x": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"] and "ü" in (tmp_path / "a.json").read_text("utf-8")


def test_what_is_no_json_value_makes_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert names(tmp_path) == []


def test_broken_json_is_refused_with_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1,\n "y": \n')
    with pytest.raises(
        UserError, match=r"a\.json, line 3: not valid JSON \(Expecting value\); is the file cut short\?"
    ):
        read_json(tmp_path / "a.json")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: cannot be read \(no such file or directory\)"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a directory"):
        read_json(tmp_path)
    (tmp_path / "latin").write_bytes(b"ab\xfc")
    with pytest.raises(UserError, match="latin: byte 2 is not UTF-8"):
        read_text(tmp_path / "latin")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "bom") == {}


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanged", "in two steps"])
def test_replacing_a_folder_with_and_without_the_system_s_exchange(tmp_path, monkeypatch, at_once):
    from megatron_ft import files

    if at_once:  # Linux has it; what is tested is that it was used
        monkeypatch.setattr(files, "_step_aside", lambda *_: pytest.fail("the folder was without a name for a moment"))
    else:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("o")
    with atomic_folder(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").write_text("n")
    assert names(tmp_path / "a") == ["new"] and names(tmp_path) == ["a"]


def test_a_disk_that_fails_while_flushing_is_not_ignored(tmp_path, monkeypatch):
    import errno

    def fails(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path) == []


def test_places_that_can_be_written_stay_as_they_are(tmp_path):
    assert check_writable("--save", tmp_path) == "there, can be written to"
    assert check_writable("--save", tmp_path / "a" / "b") == f"will be made in {tmp_path}"
    check_file_writable("--output", tmp_path / "a" / "page.html")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert check_writable("--save", tmp_path / "link" / "a") == f"will be made in {tmp_path}/link"
    assert names(tmp_path) == ["link"]


@pytest.mark.parametrize("place", ["/proc", "/proc/foo", "/sys/foo", "/sys/fs/cgroup/foo", "/dev/foo"])
def test_folders_of_the_system_are_refused(place):
    """Root has all rights in them, and still nothing can be kept there."""
    with pytest.raises(
        UserError, match=rf"^--save {place}: /.* cannot be written to \(a folder of the system\); choose another place"
    ):
        check_writable("--save", place)


def test_other_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for place, message in (
        (tmp_path / "file", "file is not a folder; choose"),
        (tmp_path / "file" / "below", "file is not a folder; choose"),
        ("/dev/null/below", "/dev/null is not a folder; choose"),
        (tmp_path / "nowhere" / "below", r"nowhere cannot be written to \(no such file or directory\)"),
        (tmp_path / ("long" * 60), r"cannot be written to \(a name of its path is too long\)"),
    ):
        with pytest.raises(UserError, match=message):
            check_writable("--save", place)
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        check_file_writable("--output", tmp_path)

    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(tmp_path), "mkdir", read_only)
    with pytest.raises(UserError, match=r"cannot be written to \(read-only file system\)"):
        check_writable("--save", tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written to; choose another place, or change its rights"):
        check_writable("--save", tmp_path / "run")

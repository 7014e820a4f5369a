"""Tables and packed files: Parquet, Arrow and CSV against pyarrow and Python's csv, compression, files of other kinds."""

import bz2
import lzma

import pytest

from megatron_ft.errors import DataError
from tests.pretokenizer.fixtures import lines, tar_gz
from tests.pretokenizer.test_records import MESSAGES
from tools.pretokenizer.lines import records
from tools.pretokenizer.readers import recognise

CALLS = [
    {"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        {"role": "tool", "content": "1", "name": name},
        {"role": "assistant", "content": "a", "loss": False} if name == "add" else {"role": "assistant", "content": "a"},
    ], "tools": [{"function": {"name": name, "parameters": {"properties": {key: {"type": "x"} for key in arguments}}}}]}
    for name, arguments in (("weather", {"city": "Paris", "when": {"day": 1}}), ("add", {"a": 1, "b": [{"c": 2}, {"d": 3}]}))
]  # fmt: skip


@pytest.mark.parametrize("form", ["parquet", "arrow", "stream"])
def test_a_table_says_what_its_json_lines_say(tmp_path, form):
    """Written by pyarrow, whose struct columns give every object all keys."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table, path = pyarrow.Table.from_pylist(CALLS), tmp_path / f"x.{form}"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        make = pyarrow.ipc.new_file if form == "arrow" else pyarrow.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "x.jsonl").write_bytes(lines(CALLS))
    assert [record for _, record in records(path)] == [record for _, record in records(tmp_path / "x.jsonl")] == CALLS


ROWS = [{"instruction": 'Hi, "you"', "output": "Hello;\nthere"}, {"instruction": "Who é?", "output": ""}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv(tmp_path, delimiter, bom):
    """Written by Python's csv."""
    import csv

    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        file.write(bom)
        writer = csv.DictWriter(file, ["instruction", "output"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    said = [{key: value for key, value in row.items() if value} for row in ROWS]  # an empty cell is no value
    assert [record for _, record in records(tmp_path / "x.csv")] == said
    assert recognise(tmp_path / "x.csv").name == "alpaca"
    (tmp_path / "v1.2.csv.xz").write_bytes(lzma.compress((tmp_path / "x.csv").read_bytes()))
    assert [record for _, record in records(tmp_path / "v1.2.csv.xz")] == said


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"instruction,output\na,b,c\nd,e\n", "row 2: has 3 cells"),
        (b"instruction,output\na,\xff\nd,e\n", "row 2: holds bytes that are not UTF-8"),
        (b'instruction,output\nd,e\na,"b\n', "row 3: not valid CSV"),
    ],
)
def test_a_bad_row_of_csv_is_that_rows(tmp_path, content, problem):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.csv, {problem}"):
        list(records(tmp_path / "x.csv"))
    bad = []
    assert [record for _, record in records(tmp_path / "x.csv", bad)] == [{"instruction": "d", "output": "e"}]
    assert len(bad) == 1


@pytest.mark.parametrize("pack", [lzma.compress, bz2.compress], ids=["xz", "bz2"])
def test_compressed_with_what_python_has(tmp_path, pack):
    (tmp_path / "x").write_bytes(pack(lines([MESSAGES] * 3)))
    assert len(list(records(tmp_path / "x"))) == 3
    (tmp_path / "x").write_bytes(pack(lines([MESSAGES] * 3))[:-20])
    with pytest.raises(DataError, match="damaged"):
        list(records(tmp_path / "x"))
    (tmp_path / "x.tar.gz").write_bytes(tar_gz([("a.jsonl.xz", lzma.compress(lines([MESSAGES])))]))
    assert len(list(records(tmp_path / "x.tar.gz"))) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PK\x03\x04....", "a zip archive"), (b"7z\xbc\xaf", "a 7z archive"), (b"SQLite format 3\0", "an SQLite database"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"), (b"<!DOCTYPE html>", "a web page"),
        (b"ORC\x08", "an ORC table"), (b"Obj\x01\x04", "an Avro file"), (b"\x04\x22\x4d\x18d", "packed with lz4"),
        (lzma.compress(b"x", format=lzma.FORMAT_ALONE), "packed with lzma"),
        (b"\x80\x04\x95", "a pickle"), ("é".encode("utf-16"), "UTF-16"), (b"%PDF-1.4", "a PDF"),
        (tar_gz([("b.zip", b"PK\x03\x04")]), "member b.zip: a zip archive"),
        (tar_gz([("b.parquet", b"PAR1")]), "member b.parquet: a Parquet file inside another"),
        (tar_gz([("b.md", b"x")]), "no .jsonl file in this archive \\(it holds b.md\\)"),
    ],
)  # fmt: skip
def test_files_of_other_kinds_are_named(tmp_path, content, problem):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        list(records(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("frames", [1, 300])
def test_a_cut_zstd_file_is_refused(tmp_path, frames):
    """Also where the cut is between two lines, and where bad records are skipped: the library's stream reader ends there in silence."""
    zstandard = pytest.importorskip("zstandard")
    rows = [{"n": i, "x": f"{i * 7919 % 10007:x}" * 40} for i in range(300)]
    data = lines(rows)
    parts = [data] if frames == 1 else data.splitlines(keepends=True)
    packed = b"".join(map(zstandard.compress, parts))
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(packed)
    assert [record for _, record in records(path)] == rows
    assert zstandard.ZstdDecompressor().stream_reader(packed[:-4], read_across_frames=True).read() != data
    for cut in (1, 4, len(packed) // 2):
        path.write_bytes(packed[:-cut])
        with pytest.raises(DataError, match=r"x\.jsonl\.zst: damaged archive \(the file ends within a zstd frame"):
            list(records(path, []))


def test_maps_of_arrow_are_objects(tmp_path):
    """An empty one too, which pyarrow gives as an empty list."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.struct(
        [("name", pyarrow.string()), ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.int64())))]
    )
    rows = [[("f", [("a", [1]), ("b", None)]), ("g", [])], []]
    column = pyarrow.array([[{"name": n, "arguments": a} for n, a in row] for row in rows], pyarrow.list_(kind))
    parquet.write_table(pyarrow.table({"calls": column}), tmp_path / "x")
    calls = [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]
    assert [record for _, record in records(tmp_path / "x")] == [{"calls": calls}, {"calls": []}]


def test_a_column_that_is_named_twice(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array([text]) for text in "qab"]
    parquet.write_table(
        pyarrow.Table.from_arrays(columns, names=["instruction", "output", "output"]), tmp_path / "x.parquet"
    )
    (tmp_path / "x.csv").write_text("instruction,output,output\nq,a,b\n")
    for name in ("x.parquet", "x.csv"):
        with pytest.raises(DataError, match="a column is named twice, 'output'"):
            list(records(tmp_path / name))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_that_is_compressed_or_cut(tmp_path, form):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table, path = pyarrow.Table.from_pylist(ROWS * 50), tmp_path / "x"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    for cut in (9, 200):
        path.write_bytes(whole[:-cut])
        with pytest.raises(DataError, match="damaged table"):
            list(records(path))
    path.write_bytes(bz2.compress(whole))
    with pytest.raises(DataError, match="file inside another"):
        list(records(path))

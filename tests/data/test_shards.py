"""Shards: what is written comes back, by us and by megatron-core; anything damaged is refused with the file's name."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.data.manifest import check_tokenizer, read_manifest
from megatron_ft.data.mmididx import HEADER
from megatron_ft.data.shards import ENDINGS, ShardWriter, open_shards, remove_shards
from megatron_ft.errors import DataError

SAMPLES = [([5, 6, 7], [0, 1, 2]), ([8], [2]), ([9, 10], [3, 2])]


def write(prefix, samples=SAMPLES, vocab_size=100, **info):
    with ShardWriter(prefix, vocab_size, **info) as writer:
        writer.source("test", "chats.jsonl", "xxh3:0")
        for ids, roles in samples:
            writer.add(np.array(ids), np.array(roles))
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "mine-train")


def test_what_is_written_comes_back(prefix):
    shards = open_shards(prefix, verify=True)
    assert len(shards) == 3
    assert shards.lengths.tolist() == [3, 1, 2]
    assert shards.lengths.dtype == np.int32
    for i, (ids, roles) in enumerate(SAMPLES):
        assert shards.tokens(i).tolist() == ids
        assert shards.roles(i).tolist() == roles
    assert shards.manifest.counts == {
        "samples": 3,
        "tokens": 6,
        "tokens_by_role": {"system": 1, "prompter": 1, "assistant": 3, "context": 1},
    }
    assert shards.manifest.sources == [{"name": "test", "file": "chats.jsonl", "digest": "xxh3:0", "documents": [0, 3]}]
    again = pickle.loads(pickle.dumps(shards))
    assert again.tokens(2).tolist() == [9, 10]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, np.uint16), (65536, np.int32), (200_000, np.int32)])
def test_number_types(tmp_path, vocab_size, dtype):
    write(tmp_path / "x", [([0, vocab_size - 1], [1, 2])], vocab_size)
    tokens = open_shards(tmp_path / "x").tokens(0)
    assert tokens.dtype == dtype
    assert tokens.tolist() == [0, vocab_size - 1]


def test_megatron_core_reads_them(prefix):
    """In a process of its own: its import is slow and changes warning filters."""
    program = f"""
import json
from megatron.core.datasets.indexed_dataset import IndexedDataset
result = {{}}
for kind in ("text", "role"):
    dataset = IndexedDataset("{prefix}-" + kind)
    result[kind] = [dataset[i].tolist() for i in range(len(dataset))]
    result[kind + " documents"] = dataset.document_indices.tolist()
print(json.dumps(result))
"""
    pytest.importorskip("megatron.core")
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == {
        "text": [ids for ids, _ in SAMPLES],
        "text documents": [0, 1, 2, 3],
        "role": [roles for _, roles in SAMPLES],
        "role documents": [0, 1, 2, 3],
    }


@pytest.mark.parametrize(
    ("ids", "roles", "message"),
    [
        ([1, 100], [1, 1], "vocabulary"),
        ([-1], [1], "vocabulary"),
        ([1], [4], "role"),
        ([1, 2], [1], "shapes"),
        ([], [], "shapes"),
    ],
)
def test_the_writer_refuses(tmp_path, ids, roles, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "x", [*SAMPLES, (ids, roles)])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(prefix):
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(RuntimeError), ShardWriter(prefix, 100) as writer:
        writer.add(np.array([1]), np.array([1]))
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_same_samples_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    for ending in (*ENDINGS, "-manifest.json"):
        assert Path(f"{tmp_path}/a{ending}").read_bytes() == Path(f"{tmp_path}/b{ending}").read_bytes()


def test_no_samples_at_all(tmp_path):
    assert len(open_shards(write(tmp_path / "x", []), verify=True)) == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_cut_short_or_gone_is_refused(prefix, ending):
    path = Path(f"{prefix}{ending}")
    content = path.read_bytes()
    for wrong in (content[:-1], content + b"\0", b""):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=path.name):
            open_shards(prefix)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        open_shards(prefix)


def test_a_file_cut_short_while_open_is_an_error_not_a_crash(prefix):
    shards = open_shards(prefix)
    with open(f"{prefix}-text.bin", "r+b") as file:
        file.truncate(1)
    with pytest.raises(DataError, match="shorter"):
        shards.tokens(2)


def test_a_file_replaced_while_open_goes_on_with_what_was_opened(prefix):
    shards = open_shards(prefix)
    write(prefix, [([1, 1, 1], [2, 2, 2])])
    assert [shards.tokens(i).tolist() for i in range(3)] == [ids for ids, _ in SAMPLES]
    assert open_shards(prefix).tokens(0).tolist() == [1, 1, 1]


def test_a_file_overwritten_in_place_while_open_is_an_error(prefix):
    """Even by bytes that could be tokens. A file whose time alone has changed is read on."""
    shards, path = open_shards(prefix), Path(f"{prefix}-text.bin")
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    assert shards.tokens(0).tolist() == [5, 6, 7]
    path.write_bytes(content[:6] + b"\x07" + content[7:])
    os.utime(path, ns=(2, 2))  # not within one tick of the clock
    with pytest.raises(
        DataError, match=r"text\.bin: has been written to while it was read, and its bytes are not those"
    ):
        shards.tokens(0)
    path.write_bytes(content)
    assert shards.tokens(0).tolist() == [5, 6, 7]


def test_every_flipped_bit_is_found(prefix):
    """In the indexes and the manifest at opening, in the tokens when asked to verify."""
    for ending in (*ENDINGS, "-manifest.json"):
        path = Path(f"{prefix}{ending}")
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 3):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(DataError):
                open_shards(prefix, verify=ending.endswith(".bin"))
        path.write_bytes(content)
    open_shards(prefix, verify=True)


def forge(prefix, ending, change):
    """Change a file and let the manifest agree, as a faulty writer would."""
    from megatron_ft import files
    from megatron_ft.data.manifest import manifest_path, write_manifest

    path = Path(f"{prefix}{ending}")
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    manifest = read_manifest(prefix)
    manifest.files[ending] = {"bytes": len(content), "digest": files.digest(path)}
    write_manifest(manifest, manifest_path(prefix))


LENGTHS, OFFSETS, DOCUMENTS = HEADER.size, HEADER.size + 12, HEADER.size + 36  # of three sequences


@pytest.mark.parametrize(
    ("place", "form", "value", "message"),
    [
        (0, "<B", 0, "not a Megatron index"),
        (9, "<Q", 2, "version 2"),
        (17, "<B", 6, "number type 6"),
        (18, "<Q", 1 << 60, "do not fit"),
        (26, "<Q", 1, "do not fit"),
        (LENGTHS, "<i", 0, "length 0"),
        (LENGTHS, "<i", -3, "length -3"),
        (LENGTHS, "<i", 1 << 30, "offset 1"),
        (OFFSETS + 8, "<q", 1 << 40, "offset 1 is"),
        (DOCUMENTS + 8, "<q", 7, "document 1 is 7"),
    ],
)
def test_wrong_numbers_in_an_index_are_refused(prefix, place, form, value, message):
    forge(prefix, "-text.idx", lambda content: struct.pack_into(form, content, place, value))
    with pytest.raises(DataError, match=rf"text\.idx: .*{message}"):
        open_shards(prefix)


def test_roles_of_other_tokens_are_refused(prefix, tmp_path):
    write(tmp_path / "other", [([1, 2], [1, 2]), ([3], [1]), ([4, 5, 6], [1, 1, 2])])
    for ending in ("-role.idx", "-role.bin"):
        content = Path(f"{tmp_path}/other{ending}").read_bytes()
        forge(prefix, ending, lambda old, new=content: old.__setitem__(slice(None), new))
    with pytest.raises(DataError, match="do not belong together"):
        open_shards(prefix)


def test_ids_and_roles_out_of_range_are_refused_when_read(prefix):
    forge(prefix, "-text.bin", lambda content: struct.pack_into("<H", content, 6, 100))
    forge(prefix, "-role.bin", lambda content: struct.pack_into("<B", content, 3, 9))
    shards = open_shards(prefix, verify=True)
    assert shards.tokens(0).tolist() == [5, 6, 7]
    with pytest.raises(DataError, match="sample 1 holds id 100"):
        shards.tokens(1)
    with pytest.raises(DataError, match="role 9"):
        shards.roles(1)


def test_shards_exist_once_their_manifest_does(prefix):
    Path(f"{prefix}-manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        open_shards(prefix)
    write(prefix)
    remove_shards(prefix)
    assert list(prefix.parent.iterdir()) == []


INFO = {"kind": "sentencepiece", "fingerprint": "f", "model_fingerprint": "m", "base_vocab_size": 98}


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        ({}, 100, None),
        ({}, 128, None),
        ({}, 99, "vocabulary of 100, the model's has 99"),
        (
            {"fingerprint": "g"},
            99,
            r"tokenizer: sentencepiece, 100 tokens, f; the model's: sentencepiece, 100 tokens, g\)",
        ),
        ({"fingerprint": "g", "model_fingerprint": "other"}, 100, "another tokenizer"),
        ({"fingerprint": "g", "added_tokens": {}}, 100, None),
        ({"fingerprint": "g", "added_tokens": {"<a>": 98, "<b>": 99, "<c>": 100}}, 101, None),
        ({"fingerprint": "g", "added_tokens": {"<a>": 99}}, 100, "'<a>' has id 98 there and 99"),
        ({"fingerprint": "g", "added_tokens": {"<z>": 98}}, 100, "id 98 is '<a>' there and '<z>'"),
    ],
)
def test_check_tokenizer(tmp_path, change, rows, message):
    info = {**INFO, "vocab_size": 100, "added_tokens": {"<a>": 98, "<b>": 99}}
    manifest = open_shards(write(tmp_path / "x", tokenizer=info)).manifest
    if message is None:
        check_tokenizer(manifest, {**info, **change}, rows)
        return
    with pytest.raises(DataError, match=message):
        check_tokenizer(manifest, {**info, **change}, rows, tmp_path / "x")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_samples_come_back(tmp_path_factory, data):
    vocab_size = data.draw(st.sampled_from([1, 255, 65535, 65536, 1 << 31]))
    token = st.tuples(st.integers(0, vocab_size - 1), st.integers(0, 3))
    samples = data.draw(st.lists(st.lists(token, min_size=1, max_size=40), max_size=8))
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder / "x", vocab_size) as writer:
        for sample in samples:
            ids, roles = np.array(sample).T
            writer.add(ids, roles)
    shards = open_shards(folder / "x", verify=True)
    read = [list(zip(shards.tokens(i).tolist(), shards.roles(i).tolist(), strict=True)) for i in range(len(shards))]
    assert read == samples


def test_marks_and_weights_are_kept_and_old_shards_stay_as_they_were(tmp_path):
    from megatron_ft.data.roles import loss_weights

    write(tmp_path / "old")
    assert json.loads((tmp_path / "old-manifest.json").read_text())["format_version"] == 1
    assert "weights" not in json.loads((tmp_path / "old-manifest.json").read_text())
    write(tmp_path / "new", [([5, 6, 7], [0, 0b1001, 0b10010])], weights=[1.0, 0.5])
    shards = open_shards(tmp_path / "new", verify=True)
    assert shards.roles(0).tolist() == [0, 1, 2]
    assert shards.role_bytes(0).tolist() == [0, 0b1001, 0b10010]
    assert shards.loss_weights(loss_weights())[shards.role_bytes(0)].tolist() == [0, 1, 0.5]
    assert read_manifest(tmp_path / "new").format_version == 2
    assert read_manifest(tmp_path / "new").counts["marked_tokens"] == 1
    for wrong in (4, 0b100010, 300):
        with pytest.raises(DataError, match="role outside"):
            write(tmp_path / "x", [([5], [wrong])], weights=[1.0, 0.5])


def test_many_samples_at_once_are_those_one_by_one(tmp_path):
    write(tmp_path / "a")
    with ShardWriter(tmp_path / "b", 100) as writer:
        writer.source("test", "chats.jsonl", "xxh3:0")
        ids, roles = (np.concatenate([np.array(part[i]) for part in SAMPLES]) for i in (0, 1))
        writer.add_many(ids, roles, np.array([3, 1, 2]))
        writer.add_many(ids[:0], roles[:0], np.empty(0, int))
    for ending in (*ENDINGS, "-manifest.json"):
        assert Path(f"{tmp_path}/a{ending}").read_bytes() == Path(f"{tmp_path}/b{ending}").read_bytes()
    with pytest.raises(DataError, match="must agree"), ShardWriter(tmp_path / "c", 100) as writer:
        writer.add_many(ids, roles, np.array([3, 1]))


def test_copying_samples_translates_their_weights(tmp_path):
    write(tmp_path / "a", [([1], [0b10010]), ([2], [2]), ([3], [0b100010])], weights=[1.0, 0.5, 2.0])
    with ShardWriter(tmp_path / "b", 100, weights=[1.0, 0.0, 0.5, 2.0]) as writer:
        writer.copy(open_shards(tmp_path / "a"), np.array([2, 0, 0, 1]))
    shards = open_shards(tmp_path / "b")
    assert [int(shards.tokens(i)[0]) for i in range(4)] == [3, 1, 1, 2]
    assert [int(shards.role_bytes(i)[0]) >> 4 for i in range(4)] == [3, 2, 2, 0]

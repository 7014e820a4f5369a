"""Five message trees with everything a tree can have, and what must come of them, worked out by hand.

Each text is one or more of the words w, so that a word count is a token count up to a constant.
"""

import gzip
import io
import json
import tarfile


def message(role, text, *replies, **more):
    return {
        "role": role,
        "text": text,
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "replies": [*replies],
        **more,
    }


def ask(text, *replies, **more):
    return message("prompter", text, *replies, **more)


def answer(text, *replies, **more):
    return message("assistant", text, *replies, **more)


def tree(number, prompt, state="ready_for_export"):
    return {"message_tree_id": f"tree-{number}", "tree_state": state, "prompt": prompt}


# 1: two ranked answers; below the best two unanswered questions, so that thread counts once, cut to the answer.
TREE_1 = tree(
    1,
    ask(
        "q1",
        answer("best", ask("more?"), ask("and?"), rank=0),
        answer("second", ask("why?", answer("because", rank=None)), rank=1),
    ),
)
# 2: answers without ranks: two siblings, both fall to top_k; one alone below a follow-up would not.
TREE_2 = tree(2, ask("q2", answer("left"), answer("right", ask("so?", answer("only")))))
# 3: one answer deleted, one synthetic, one fine and without rank among three.
TREE_3 = tree(3, ask("q3", answer("gone", deleted=True), answer("machine", synthetic=True), answer("fine", rank=0)))
# 4: German; a question nobody answered lies beside (never a sample).
TREE_4 = tree(4, ask("q4", answer("ja", ask("und?", answer("nein", rank=0)), rank=0), lang="de"))
# 5: not released.
TREE_5 = tree(5, ask("q5", answer("draft", rank=0)), state="aborted_low_grade")
TREES = [TREE_1, TREE_2, TREE_3, TREE_4, TREE_5]

# (options, samples as texts, what the reader leaves out)
EXPECTED = [
    (
        {},
        [
            ["q1", "best"],
            ["q1", "second", "why?", "because"],
            ["q2", "left"],
            ["q2", "right", "so?", "only"],
            ["q3", "fine"],
        ],
        {
            "unanswered question": 1,
            "deleted message": 1,
            "synthetic message": 1,
            "other language": 1,
            "tree not ready for export": 1,
        },
    ),
    (
        {"top_k": 1},
        [["q1", "best"], ["q3", "fine"]],
        {
            "unanswered question": 1,
            "not among the top 1": 3,
            "deleted message": 1,
            "synthetic message": 1,
            "other language": 1,
            "tree not ready for export": 1,
        },
    ),
    (
        {"top_k": 2, "lang": "de,en", "include_synthetic": True},
        [["q1", "best"], ["q1", "second", "why?", "because"], ["q3", "fine"], ["q4", "ja", "und?", "nein"]],
        {"unanswered question": 1, "not among the top 2": 3, "deleted message": 1, "tree not ready for export": 1},
    ),
]


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def tar_gz(members):
    """A .tar.gz with the given (name or TarInfo, content) pairs; the same bytes at any time, for test workers compare their parameters."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(written.getvalue(), mtime=0)


PACKINGS = {
    "plain.jsonl": lambda data: data,
    "packed.jsonl.gz": gzip.compress,
    "archive.tar.gz": lambda data: tar_gz([("folder/trees.jsonl", data), ("README", b"not data")]),
    "inner.tar.gz": lambda data: tar_gz([("trees.jsonl.gz", gzip.compress(data))]),
    "only-named.tar.gz": gzip.compress,  # the export's name for gzipped text
    "with-bom.jsonl": lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n"),
    "array.json": lambda data: json.dumps([json.loads(line) for line in data.splitlines()]).encode(),
}

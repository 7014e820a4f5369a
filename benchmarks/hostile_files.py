"""Gives files that want to run code, or to lead astray, to every command that reads models and checkpoints; none may run.

    python benchmarks/hostile_files.py [--few]

Every payload is first proved: a careless `pickle.load` runs it, and the interpreter's own audit hook (sys.addaudithook) sees it. Then
each is planted in every place that a model or checkpoint has, and each command reads each of them: the hook must see nothing, the
command must refuse it with an error of ours. --few: two payloads in each place, for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.payloads import CANARY, payloads, proved, ran, watch
from megatron_ft.checkpoints.restricted import read_metadata
from megatron_ft.errors import UserError

VOCABULARY = 203
EMBEDDING, EXTRA_STATE = "embedding.word_embeddings.weight", "decoder.layers.0.self_attention.linear_qkv._extra_state"

# Where a payload is planted: each takes a copy of sound folders and puts it there.


def archive(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def plant_bin(folder: Path, data: bytes) -> None:
    (folder / "hf" / "model.safetensors").unlink()
    (folder / "hf" / "pytorch_model.bin").write_bytes(data)


def plant_distcp(folder: Path, data: bytes, checkpoint: str = "torch_dist/release", name: str = EMBEDDING) -> None:
    """In place of the beginning of an entry's bytes."""
    folder = folder / checkpoint
    places = read_metadata(folder / ".metadata").storage_data
    found = next(info for index, info in places.items() if index.fqn.startswith(("model." + name, name)))
    with (folder / found.relative_path).open("r+b") as file:
        file.seek(found.offset)
        file.write(data)


def plant(name: str) -> Callable[[Path, bytes], None]:
    return lambda folder, data: (folder / name).write_bytes(data) and None


RANK_FILE = "release/mp_rank_00/model_optim_rng.pt"
RANK_OF_A_RUN = RANK_FILE.replace("release", "iter_0000001")
TRAINED = "trained/iter_0000001"
PLACES: dict[str, tuple[str, Callable[[Path, bytes], None]]] = {
    "pytorch_model.bin": ("hf", lambda f, d: plant_bin(f, archive(d))),
    "pytorch_model.bin, old": ("hf", plant_bin),
    "rank file": ("torch", lambda f, d: plant(f"torch/{RANK_FILE}")(f, archive(d))),
    "rank file, old": ("torch", plant(f"torch/{RANK_FILE}")),
    "Megatron-LLM's args": ("llm", lambda f, d: plant(f"llm/{RANK_FILE}")(f, archive(d))),
    ".metadata": ("torch_dist", plant("torch_dist/release/.metadata")),
    "common.pt": ("torch_dist", lambda f, d: plant("torch_dist/release/common.pt")(f, archive(d))),
    "common.pt, old": ("torch_dist", plant("torch_dist/release/common.pt")),
    "distcp": ("torch_dist", lambda f, d: plant_distcp(f, archive(d))),
    "a run's .metadata": ("trained", plant(f"{TRAINED}/.metadata")),
    "a run's common.pt": ("trained", lambda f, d: plant(f"{TRAINED}/common.pt")(f, archive(d))),
    "a run's common.pt, old": ("trained", plant(f"{TRAINED}/common.pt")),
    "a run's distcp": ("trained", lambda f, d: plant_distcp(f, archive(d), TRAINED)),
    "a run's extra state": ("trained", lambda f, d: plant_distcp(f, archive(d), TRAINED, EXTRA_STATE)),
    "a run's rank file": ("classic", lambda f, d: plant(f"classic/{RANK_OF_A_RUN}")(f, archive(d))),
    "a run's rank file, old": ("classic", plant(f"classic/{RANK_OF_A_RUN}")),
}


def change_index(folder: Path, name: str, link: Path | None = None) -> None:
    """A weight map in which one tensor lies in a file of that name."""
    hf = folder / "hf"
    keys = list(_header(hf / "model.safetensors"))
    weight_map = {**dict.fromkeys(keys, "model.safetensors"), keys[0]: name}
    if link:
        (hf / name).symlink_to(link)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_header(folder: Path, change: Callable[[dict], dict], tail: bytes = b"") -> None:
    path = folder / "hf" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + tail)


def _header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def first(header: dict, **entries) -> dict:
    name = next(iter(header))
    return {**header, name: {**header[name], **entries}}


def change_config(folder: Path, where: str = "hf", **entries) -> None:
    path = folder / where / ("config.json" if where == "hf" else "release/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def change_metadata(folder: Path, change: Callable) -> None:
    path = folder / "torch_dist" / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def lead_out(metadata, name: str = "../../secret") -> None:
    for info in metadata.storage_data.values():
        object.__setattr__(info, "relative_path", name)


def lie(folder: Path) -> Path:
    """A file outside the model's folder that would do as a part of it."""
    shutil.copy(folder / "hf" / "model.safetensors", folder / "outside.safetensors")
    return folder / "outside.safetensors"


OTHERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "index with ..": ("hf", lambda f: (lie(f), change_index(f, "../outside.safetensors"))),
    "index with an absolute path": ("hf", lambda f: change_index(f, str(lie(f)))),
    "index with a link": ("hf", lambda f: change_index(f, "link.safetensors", lie(f))),
    "index with a device": ("hf", lambda f: change_index(f, "zero.safetensors", Path("/dev/zero"))),
    "index with NUL": ("hf", lambda f: change_index(f, "a\0b")),
    "safetensors that is a link": ("hf", lambda f: (lie(f), (f / "hf/model.safetensors").unlink(),
                                   (f / "hf/model.safetensors").symlink_to(f / "outside.safetensors"))),
    "overlap": ("hf", lambda f: change_header(f, lambda h: first(h, data_offsets=[*h["model.norm.weight"]["data_offsets"]]))),
    "hole": ("hf", lambda f: change_header(f, lambda h: {k: v for k, v in h.items() if k != "model.norm.weight"})),
    "more bytes than described": ("hf", lambda f: change_header(f, lambda h: h, b"0" * 64)),
    "giant header": ("hf", lambda f: plant("hf/model.safetensors")(f, (1 << 60).to_bytes(8, "little") + b"{}")),
    "giant shape": ("hf", lambda f: change_header(f, lambda h: first(h, shape=[1 << 40, 1 << 40]))),
    "shapes that overflow": ("hf", lambda f: change_header(f, lambda h: first(h, shape=[1 << 32, 1 << 32]))),
    "a million axes": ("hf", lambda f: change_header(f, lambda h: first(h, shape=[10**9] * 10**6))),
    "negative offsets": ("hf", lambda f: change_header(f, lambda h: first(h, data_offsets=[-8, 0]))),
    "an entry twice": ("hf", lambda f: plant("hf/model.safetensors")(f, (9).to_bytes(8, "little") + b'{"a":1,"a":2}')),
    "deep header": ("hf", lambda f: plant("hf/model.safetensors")(f, (40000).to_bytes(8, "little") + b"[" * 40000)),
    "Git LFS pointer": ("hf", lambda f: plant("hf/model.safetensors")(f, b"version https://git-lfs.github.com/spec/v1\n")),
    "auto_map": ("hf", lambda f: (change_config(f, auto_map={"AutoModelForCausalLM": "evil.Evil"}),
                                  (f / "hf/evil.py").write_text(f"open('/tmp/{CANARY}', 'w')\n"))),
    "config of another size": ("hf", lambda f: change_config(f, hidden_size=64)),
    "config of a billion layers": ("hf", lambda f: change_config(f, num_hidden_layers=10**9)),
    "config of text": ("hf", lambda f: change_config(f, hidden_size="x" * 1000)),
    "config of lists": ("hf", lambda f: change_config(f, num_attention_heads=[8], rope_scaling=[[]])),
    "quantised": ("hf", lambda f: change_config(f, quantization_config={"quant_method": "evil"})),
    "deep config": ("hf", lambda f: plant("hf/config.json")(f, b"[" * 100_000)),
    "compressed rank file": ("torch", lambda f: compressed(f / "torch" / RANK_FILE)),
    "a bomb of zeros": ("torch", lambda f: bomb(f / "torch" / RANK_FILE)),
    "memo bomb": ("torch", lambda f: plant(f"torch/{RANK_FILE}")(f, archive(b"\x80\x02Nr\xff\xff\xff\x7f."))),
    "bytes bomb": ("torch", lambda f: plant(f"torch/{RANK_FILE}")(f, archive(b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little")))),
    "a dict in itself": ("llm", lambda f: plant(f"llm/{RANK_FILE}")(f, archive(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."))),
    "layout of a billion ranks": ("torch", lambda f: change_config(f, "torch", tensor_model_parallel_size=10**9)),
    "layout of text": ("torch", lambda f: change_config(f, "torch", pipeline_model_parallel_size="2; rm -rf")),
    "another format": ("torch", lambda f: change_config(f, "torch", ckpt_format="pickle")),
    "parts outside the folder": ("torch_dist", lambda f: change_metadata(f, lead_out)),
    "parts at an absolute path": ("torch_dist", lambda f: change_metadata(f, lambda m: lead_out(m, "/etc/passwd"))),
    "tracker that leads out": ("torch", lambda f: plant("torch/latest_checkpointed_iteration.txt")(f, b"../../secret")),
}  # fmt: skip


def compressed(path: Path) -> None:
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", b"\0" * (1 << 28))


# The commands


def commands(folder: Path, kind: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of everything that reads such a folder. Digests are left aside: they stop most of this sooner."""
    from checkpoints_conversion import hf_to_megatron, megatron_to_hf, reshard, verify
    from megatron_ft.commands import chat, generate, plan

    source, target, good = str(folder / kind), str(folder / "target"), folder
    llm = {"true_vocab_size": 203}
    if kind == "hf":
        yield (
            "hf-to-megatron",
            lambda: hf_to_megatron.convert(
                hf_to_megatron.HfToMegatron(source, target, verify_checkpoint=False, ckpt_format="torch")
            ),
        )
        yield (
            "verify --hf",
            lambda: verify.verify(verify.Verify(source, str(good / "sound"), verify_checkpoint=False, logits=False)),
        )
    else:
        o = dict(verify_checkpoint=False, **(llm if kind == "llm" else {}))
        yield "megatron-to-hf", lambda: megatron_to_hf.convert(megatron_to_hf.MegatronToHf(source, target, **o))
        yield "reshard", lambda: reshard.convert(reshard.Reshard(source, target, ckpt_format="torch", **o))
        yield "verify", lambda: verify.verify(verify.Verify(str(good / "sound-hf"), source, logits=False, **o))
    if kind != "llm":
        ask = generate.Generation(load=source, prompt=["a"], verify_checkpoint=False)
        yield (
            "generate",
            lambda: generate.run(
                ask, generate.SamplingOptions(max_new_tokens=1), generate.GenerationLayout(), generate.Processes()
            ),
        )
        yield (
            "chat",
            lambda: chat.run(
                chat.Chat(load=source, verify_checkpoint=False), generate.GenerationLayout(), generate.Processes()
            ),
        )
        yield "finetune", lambda: finetune(folder, load=source)
    if kind in ("trained", "classic"):
        yield (
            "finetune --auto_resume",
            lambda: finetune(folder, load=str(good / "sound"), save=source, auto_resume=True),
        )
    yield "plan", lambda: plan.run(plan.Plan(model=source), plan.Parallelism())


def finetune(folder: Path, **settings) -> None:
    """One step further than the run in trained/ went. Raises what finetune raises."""
    from megatron_ft.commands import finetune
    from megatron_ft.config.settings import TrainingSettings

    settings = {
        "data_path": [str(folder / "chats")], "train_iters": 2, "seq_length": 64, "global_batch_size": 1, "lr": 1e-3,
        "verify_checkpoint": False, "report": False, "log_interval": 10**6,
    } | settings  # fmt: skip
    finetune.run(TrainingSettings.of(**settings))


def make_sound(folder: Path) -> None:
    """hf, torch, torch_dist, llm (all of one model), and untouched copies."""
    from safetensors.torch import save_file

    from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
    from megatron_ft.models import llama
    from megatron_ft.models.weights import placed_rules

    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    arch = llama.from_hf(config)
    shapes = {}
    for one in placed_rules(arch, llama.rules(arch)):
        shapes.update(zip(one.hf_keys, one.rule.hf_shapes(arch), strict=True))
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, folder / "hf" / "model.safetensors")
    for kind in ("torch", "torch_dist"):
        convert(HfToMegatron(str(folder / "hf"), str(folder / kind), ckpt_format=kind))
    shutil.copytree(folder / "hf", folder / "sound-hf")
    shutil.copytree(folder / "torch", folder / "sound")
    llm = folder / "llm" / RANK_FILE
    llm.parent.mkdir(parents=True)
    llm.write_bytes(archive(pickle.dumps({}, 2)))
    (folder / "llm" / "latest_checkpointed_iteration.txt").write_text("release\n")


def make_runs(folder: Path) -> None:
    """chats; trained, classic: what finetune saved of the model that make_sound made."""
    import numpy as np

    from megatron_ft.data.roles import ASSISTANT
    from megatron_ft.data.shards import ShardWriter

    with ShardWriter(folder / "chats", VOCABULARY) as writer:
        for _ in range(8):
            writer.add(np.arange(40), np.full(40, ASSISTANT, np.uint8))
    for kind, ckpt_format in (("trained", "torch_dist"), ("classic", "torch")):
        finetune(folder, load=str(folder / "torch"), save=str(folder / kind), ckpt_format=ckpt_format, train_iters=1)


def campaign(work: Path, few: bool = False) -> tuple[Counter[str], list[str]]:
    """(counts, what went wrong): every hostile file before every command that reads such a folder."""
    sys.addaudithook(watch)
    pickles = payloads()
    counts, wrong = Counter[str](), []
    alive = proved(pickles)
    counts["payloads that a careless reader runs"] = len(alive)
    if few:
        alive = alive[:: (len(alive) + 1) // 2]
    make_sound(work / "sound")
    make_runs(work / "sound")
    hostile: list[tuple[str, str, Callable[[Path], object]]] = [
        (f"{payload} in {place}", kind, lambda f, put=put, payload=payload: put(f, pickles[payload]))
        for place, (kind, put) in PLACES.items()
        for payload in alive
    ]
    hostile += [(name, kind, put) for name, (kind, put) in OTHERS.items()]
    for name, kind, put in hostile:
        counts["hostile files"] += 1
        folder = work / "try"
        shutil.copytree(work / "sound", folder)
        put(folder)
        for command, call in commands(folder, kind):
            counts["attempts"] += 1
            wrong += judge(f"{name}, {command}", call, folder)
        shutil.rmtree(folder)
    counts["payloads that ran"] = sum("RAN" in line for line in wrong)
    return counts, wrong


def judge(what: str, call: Callable[[], object], folder: Path) -> list[str]:
    """What was wrong with how the command ended."""
    ended = []

    def attempt() -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call()
            ended.append("accepted")
        except UserError:
            ended.append("refused")
        except Exception as error:
            ended.append(f"crashed: {type(error).__name__}: {str(error)[:200]}")

    wrong = [f"{what}: RAN {event}" for event in ran(attempt)]
    if (folder / "target").exists() and ended != ["accepted"]:
        wrong.append(f"{what}: left a target behind")
    shutil.rmtree(folder / "target", ignore_errors=True)
    fine = ("refused", "accepted") if never_reads(what) else ("refused",)
    return wrong + [f"{what}: {end}" for end in ended if end not in fine]


def never_reads(what: str) -> bool:
    """Whether the command never looks where the payload lies: plan reads config.json alone, the converters no training state, and
    finetune takes from weights without training state nothing else.
    """
    command = what.rpartition(", ")[2]
    readers = ("generate", "chat", "finetune", "finetune --auto_resume")
    return command == "plan" or (("common.pt" in what or "extra state" in what) and command not in readers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = campaign(Path(folder), arguments.few)
    print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    print("\n".join(wrong[:40]) or "every one refused")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

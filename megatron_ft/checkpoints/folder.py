"""The folder of a checkpoint: its files and its config.json, without tensors.

ROOT/latest_checkpointed_iteration.txt      "release" (converted weights) or a number
ROOT/release/ or ROOT/iter_0000500/
    config.json                             architecture, layout, tokenizer, chat format
    tokenizer/                              the tokenizer's files
    mp_rank_TT[_PPP]/model_optim_rng.pt     format "torch": one file per rank; _PPP only with more than one stage
    .metadata, common.pt, metadata.json, *.distcp       format "torch_dist": megatron-core's own
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.digests import MANIFEST
from megatron_ft.errors import CheckpointError, UserError
from megatron_ft.files import atomic_file, read_json, write_json
from megatron_ft.models.architecture import Architecture, check_layout
from megatron_ft.models.families import family_of
from megatron_ft.models.hf_files import refuse_gguf
from megatron_ft.models.quantised import Quantization, check_blocks, stored_rules
from megatron_ft.wording import counted

if TYPE_CHECKING:
    from megatron_ft.models.pipeline import PipelineSplit
    from megatron_ft.models.weights import Rule

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "config.json"
RANK_FILE = "model_optim_rng.pt"
TOKENIZER_FOLDER = "tokenizer"
SETTINGS = "training.yaml"
TRAINED_ON = "trained_on.json"
CERTIFICATE = "certificate.json"
"""What `megatron-ft verify` found; written into a finished checkpoint."""
"""The resolved settings of the run that saved it: what a run writes into its checkpoints, and converters do not."""
MODEL_PREFIX = "model."
"""Before every model key of a torch_dist checkpoint, so that "optimizer." and others can lie beside them."""
FORMAT_VERSION = 1
_MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class CheckpointConfig:
    """config.json beside the tensors: everything a reader needs that is not a tensor."""

    architecture: Architecture
    ckpt_format: str
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    padded_vocab_size: int
    iteration: int | str
    """"release" for converted weights."""
    dtype: str
    """fp32, bf16 or fp16."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """kind, fingerprint, vocab_size, added_tokens."""
    chat_format: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    digested: bool = False
    """True if the checkpoint has digests.json. Without this file it was then never finished."""
    quantization: Quantization | None = None
    """How the linears are quantised; None: they are not."""
    adapter: dict[str, Any] | None = None
    """Not None: the checkpoint holds only adapters, with these values, and names the model that they belong to (adapters/spec.py)."""
    card: dict[str, Any] | None = None
    """Licence and languages in the model card of the base, which the card of an export repeats; None: it had none."""


def write_config(folder: Path, config: CheckpointConfig) -> None:
    entries = {**asdict(config), "architecture": config.architecture.to_dict()}
    for name in ("adapter", "quantization", "card"):  # not all checkpoints have them; earlier versions read the others
        del entries[name]
    if config.adapter is not None:
        entries["adapter"] = config.adapter
    if config.card:
        entries["card"] = config.card
    if config.quantization:
        entries["quantization"] = config.quantization.to_dict()
    write_json(Path(folder) / CONFIG, entries)


def read_config(folder: Path) -> CheckpointConfig:
    """Raise CheckpointError naming the file when it is missing, incomplete or of a newer format."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a checkpoint of ours; make one with megatron-ft hf-to-megatron")
    data = read_json(path)
    if isinstance(data, dict) and "model_type" in data:
        raise CheckpointError(f"{folder} is a Hugging Face model: convert it first, with megatron-ft hf-to-megatron")
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version}, this version reads {FORMAT_VERSION}")
    try:
        newer = ("digested", "adapter", "quantization", "card")  # not in checkpoints of earlier versions
        known = {f.name: data[f.name] for f in fields(CheckpointConfig) if f.name not in newer}
        known |= {
            "digested": bool(data.get("digested", False)),
            "adapter": data.get("adapter"),
            "card": data.get("card"),
        }
        if "quantization" in data:
            known["quantization"] = Quantization.from_dict(data["quantization"])
        config = CheckpointConfig(**{**known, "architecture": Architecture.from_dict(data["architecture"])})
        _check_entries(config)
        return config
    except KeyError as error:
        raise CheckpointError(f"{path}: entry {error} is missing; restore the file or convert again") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_entries(config: CheckpointConfig) -> None:
    """Raise CheckpointError for an entry that makes no sense: what is read from a file may hold anything."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "padded_vocab_size"):
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= 10**9:
            raise CheckpointError(f"{name} {value!r}: must be a whole number above 0")
    ranks = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    if ranks > _MOST_RANKS:  # before a loop runs over the ranks
        raise CheckpointError(f"{ranks} ranks hold the model, more than {_MOST_RANKS}: no checkpoint has so many")
    iteration = config.iteration
    kinds = {"ckpt_format": ("torch", "torch_dist"), "dtype": ("fp32", "bf16", "fp16")}
    for name, known in kinds.items():
        if getattr(config, name) not in known:
            raise CheckpointError(f"{name} {getattr(config, name)!r}: must be one of {', '.join(known)}")
    if iteration != "release" and (type(iteration) is not int or iteration < 0):
        raise CheckpointError(f"iteration {iteration!r}: must be release or a number")
    if not isinstance(config.adapter, dict | None):
        raise CheckpointError(f"adapter {str(config.adapter)[:40]!r}: must be a list of entries, or absent")
    if not isinstance(config.card, dict | None):
        raise CheckpointError(f"card {str(config.card)[:40]!r}: must be a list of entries, or absent")
    if not isinstance(config.tokenizer, dict) or not isinstance(config.chat_format, str | None):
        raise CheckpointError("tokenizer or chat_format is of another type than it should be")


def iteration_folder(root: Path, iteration: int | str) -> Path:
    """Return ROOT/release or ROOT/iter_0000500."""
    return Path(root) / ("release" if iteration == "release" else f"iter_{int(iteration):07d}")


def write_tracker(root: Path, iteration: int | str) -> None:
    with atomic_file(Path(root) / TRACKER, "w") as file:
        file.write(f"{iteration}\n")


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if the folder of a checkpoint or an export does not exist, or is for llama.cpp."""
    refuse_gguf(Path(folder))
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a checkpoint or an exported Hugging Face model")


def is_export(folder: Path) -> bool:
    """Say if a folder holds an exported Hugging Face model and no checkpoint."""
    return not (Path(folder) / TRACKER).exists() and "model_type" in hf_entries(folder)


def export_dtype(folder: Path) -> str | None:
    """Return the type of an export's weights, as its config.json has it."""
    config = hf_entries(folder)
    return config.get("dtype", config.get("torch_dtype"))


def hf_entries(folder: Path) -> dict[str, Any]:
    """Return the entries of config.json; {} where there is none, or it holds something else."""
    path = Path(folder) / CONFIG
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def find_checkpoint(root: Path, iteration: int | str | None = None) -> Path:
    """Return the release or iter_ folder to read: the requested one, else that of the tracker. `root` may be such a folder itself.

    Raise CheckpointError with what was found instead.
    """
    root = Path(root)
    if not (root / TRACKER).exists():
        refuse_gguf(root)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give a checkpoint's root or one of its iter_ folders")
    if iteration is None and (root / CONFIG).is_file() and not (root / TRACKER).exists():
        return root
    wanted = iteration if iteration is not None else _read_tracker(root)
    folder = iteration_folder(root, wanted)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; {root} holds: {_checkpoints(root)}")
    return folder


def _read_tracker(root: Path) -> int | str:
    path = root / TRACKER
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {root} holds: {_checkpoints(root)}; name one with --iteration")
    # Not every character that strip() removes: a flipped bit can produce one.
    text = path.read_text(errors="replace").strip(" \t\r\n")
    if text != "release" and not text.isdigit():
        raise CheckpointError(
            f"{path} says {text[:40]!r}, not 'release' or a number; {root} holds: {_checkpoints(root)}; "
            "name one with --iteration"
        )
    return text if text == "release" else int(text)


def iterations_in(root: Path) -> dict[int, str]:
    """Return iteration -> name of every iter_ folder of a root."""
    found = {
        name: name.removeprefix("iter_") for name in (path.name for path in Path(root).glob("iter_*") if path.is_dir())
    }
    return {int(digits): name for name, digits in found.items() if digits.isdigit()}


def _checkpoints(root: Path) -> str:
    names = sorted(p.name for p in root.iterdir() if p.name == "release" or p.name.startswith("iter_"))
    return ", ".join(names) or "no checkpoint"


def rank_file(folder: Path, tp_rank: int, pp_rank: int, tp_size: int, pp_size: int) -> Path:
    """Return the classic file of one rank. Raise ValueError for a rank outside the layout, which is a bug."""
    if not (0 <= tp_rank < tp_size and 0 <= pp_rank < pp_size):
        raise ValueError(f"rank ({tp_rank}, {pp_rank}) outside layout ({tp_size}, {pp_size})")
    stage = f"_{pp_rank:03d}" if pp_size > 1 else ""
    return Path(folder) / f"mp_rank_{tp_rank:02d}{stage}" / RANK_FILE


def missing_files(folder: Path) -> list[Path]:
    """Return the files that config.json names and that do not exist; empty for a complete checkpoint."""
    config = read_config(folder)
    if config.ckpt_format == "torch_dist":
        wanted = [Path(folder) / name for name in ("metadata.json", ".metadata", "common.pt")]
    else:
        tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        wanted = [rank_file(folder, t, p, tp, pp) for p in range(pp) for t in range(tp)]
    if config.digested:
        wanted.append(Path(folder) / MANIFEST)
    return [path for path in wanted if not path.is_file()]


def is_complete(folder: Path) -> bool:
    try:
        return not missing_files(folder)
    except UserError:
        return False


def describe(folder: Path) -> CheckpointConfig:
    """Return the description in a checkpoint's config.json. Raise CheckpointError when files that it promises are missing."""
    config = read_config(folder)
    gone = missing_files(folder)
    if gone:
        raise CheckpointError(
            f"{gone[0]} is missing ({counted(len(gone), 'file')} in all): the checkpoint is incomplete; copy or convert it again"
        )
    return config


def vocab_rows(config: CheckpointConfig) -> int | None:
    """Return the embedding rows that a model needs for this checkpoint: of a classic one its own number; None: any number."""
    return config.padded_vocab_size if config.ckpt_format == "torch" else None


def check_sizes(
    folder: Path, config: CheckpointConfig, tp_size: int, pp_size: int, split: PipelineSplit | None = None
) -> None:
    """Raise CheckpointError for a classic checkpoint cut for another layout, ConfigError for one the model does not allow.

    split: a PipelineSplit, where stages may hold several chunks or unequal numbers of layers.
    """
    check_layout(config.architecture, tp_size, pp_size if split is None else 1)
    check_quantised(config, tp_size)
    if config.ckpt_format == "torch" and split is not None and not split.is_plain:
        raise CheckpointError(
            f"{folder} is in the classic format, which knows one equal part a stage; this run's stages hold layers {split}: "
            f"make a torch_dist checkpoint with megatron-ft reshard, which loads into any layout"
        )
    written = (config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    if config.ckpt_format == "torch" and written != (tp_size, pp_size):
        raise CheckpointError(
            f"{folder} is in the classic format for TP{written[0]} x PP{written[1]}, this run is TP{tp_size} x PP{pp_size}: "
            f"run with the checkpoint's sizes, or make one for these with megatron-ft reshard (torch_dist loads into any layout)"
        )


def check_whole(folder: str | Path, config: CheckpointConfig) -> None:
    """Raise CheckpointError for a classic checkpoint that is cut for several processes, where one process reads all of it."""
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if config.ckpt_format == "torch" and tp * pp > 1:
        raise CheckpointError(
            f"{folder} is in the classic format for TP{tp} x PP{pp}, and sparse decoding runs in one process: make a torch_dist "
            f"checkpoint with megatron-ft reshard, which loads into any layout"
        )


def rules_in(config: CheckpointConfig) -> list[Rule]:
    """Return the rules of the tensors that a checkpoint holds: of a quantised one codes and scales."""
    return stored_rules(family_of(config.architecture).rules(config.architecture), config.quantization)


def check_quantised(config: CheckpointConfig, tp_size: int) -> None:
    """Raise ConfigError unless a quantised checkpoint can be cut for so many tensor-parallel ranks."""
    if config.quantization:
        check_blocks(config.architecture, family_of(config.architecture).rules(config.architecture), tp_size)


def refuse_quantised(folder: Path, config: CheckpointConfig) -> None:
    """Raise CheckpointError for a checkpoint whose weights cannot be trained."""
    if config.quantization:
        raise CheckpointError(
            f"{folder} holds NF4 weights (hf-to-megatron --quantize nf4), which cannot be trained: add --lora_rank to train adapters on "
            f"them, or convert the model again without --quantize"
        )


def check_training_state(folder: Path, config: CheckpointConfig) -> None:
    """Raise CheckpointError for converted weights in the classic format; the reader of the others raises if they have no training state."""
    if config.ckpt_format == "torch" and not (Path(folder) / SETTINGS).is_file():
        raise no_training_state(folder)


def no_training_state(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: holds weights only, no training state to resume: start from it with --finetune")

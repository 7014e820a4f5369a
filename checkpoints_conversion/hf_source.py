"""Reads a Hugging Face model folder: config.json and safetensors, one tensor at a time.

Everything that can be checked without reading numbers is checked when the folder is opened: every file there and whole,
every tensor of the architecture there with its shape, nothing left over. Executes nothing that lies in the folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_conversion.dtypes import SAFETENSORS_NAMES
from megatron_ft.errors import CheckpointError
from megatron_ft.files import read_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_for
from megatron_ft.models.weights import Placed, Rule, placed_rules

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_IGNORED = (".rotary_emb.inv_freq", ".rotary.inv_freq")  # a buffer that old exports hold; it follows from the config
# With _from_model_config, transformers would replace the file's token ids by the config's.
_NOT_CARRIED = ("transformers_version", "_from_model_config")
_FETCH_AGAIN = "fetch the file again"


class HfSource:
    """An opened model folder. Raises CheckpointError, naming the file, for whatever is missing or does not fit."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, Any] = {}
        config = self._config()
        family = family_for(config)
        self.arch: Architecture = family.from_hf(config)
        self.rules: list[Rule] = family.rules(self.arch)
        self.files: dict[str, Path] = self._tensor_files()
        self.dtype = self._check_tensors()

    def full(self, placed: Placed) -> Tensor:
        """The whole megatron-core tensor, in the source's type, with the source's vocabulary."""
        return placed.rule.to_megatron(self.arch, [self._tensor(key) for key in placed.hf_keys])

    def carried(self) -> dict[str, Any]:
        """What an export should give back besides the architecture: token ids, the generation config, the name."""
        path = self.folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        generation = {key: value for key, value in generation.items() if key not in _NOT_CARRIED}
        name = self._config().get("_name_or_path") or ""
        # A path on somebody's disk is nobody else's business: only its last part is kept.
        name = Path(name).name if os.path.isabs(name) else name
        return {
            **self.arch.hf,
            "_name_or_path": name or self.folder.resolve().name,
            **({"generation_config": generation} if generation else {}),
        }

    def _config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: --input_dir must be the folder of a Hugging Face model")
        config = read_json(path)
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not a Hugging Face config; {_FETCH_AGAIN}")
        return config

    def _tensor_files(self) -> dict[str, Path]:
        """Tensor name -> file that holds it."""
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map", {})
            for name in set(weight_map.values()):
                if not isinstance(name, str) or Path(name).name != name:
                    raise CheckpointError(f"{index}: {name!r} is not a plain file name; {_FETCH_AGAIN}")
            return {key: self.folder / name for key, name in weight_map.items()}
        single = self.folder / SINGLE
        if not single.is_file():
            pickled = any(self.folder.glob("pytorch_model*.bin"))
            remedy = "save it anew with transformers: model.save_pretrained(folder)" if pickled else _FETCH_AGAIN
            raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; {remedy}")
        return dict.fromkeys(self._handle(single).keys(), single)

    def _handle(self, path: Path) -> Any:
        """safe_open of a file, kept open: a model has few files and their pages are mapped, not read."""
        if path not in self._open:
            from safetensors import SafetensorError, safe_open

            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {_FETCH_AGAIN}")
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                small = " (a Git LFS pointer?)" if path.stat().st_size < 1000 else ""
                raise CheckpointError(f"{path} is cut short or no safetensors file{small}; {_FETCH_AGAIN}") from error
        return self._open[path]

    def _slice(self, key: str) -> Any:
        path = self.files[key]
        handle = self._handle(path)
        if key not in handle.keys():  # noqa: SIM118 (no mapping)
            raise CheckpointError(f"{path} does not hold {key}, though {INDEX} says so; {_FETCH_AGAIN}")
        return handle.get_slice(key)

    def _tensor(self, key: str) -> Tensor:
        return self._handle(self.files[key]).get_tensor(key)

    def _check_tensors(self) -> str:
        """Totality and shapes. Returns our name of the weights' type (the first tensor's)."""
        found = {key for key in self.files if not key.endswith(_IGNORED)}
        wanted: dict[str, tuple[int, ...]] = {}
        for placed in placed_rules(self.arch, self.rules):
            wanted.update(zip(placed.hf_keys, placed.rule.hf_shapes(self.arch), strict=True))
        if missing := sorted(set(wanted) - found):
            raise CheckpointError(f"{self.folder} lacks {len(missing)} tensors, first {missing[0]}; {_FETCH_AGAIN}")
        self._check_left_over(sorted(found - set(wanted)))
        for key, shape in wanted.items():
            if (stored := tuple(self._slice(key).get_shape())) != shape:
                raise CheckpointError(
                    f"{self.files[key]}: {key} is {list(stored)}, config.json says {list(shape)}; one of them is wrong"
                )
        kinds = {key: self._slice(key).get_dtype() for key in wanted}
        if odd := [key for key, kind in kinds.items() if kind not in SAFETENSORS_NAMES]:
            raise CheckpointError(
                f"{odd[0]} is of type {kinds[odd[0]]}: give the unquantised model (fp32, bf16 or fp16)"
            )
        return SAFETENSORS_NAMES[next(iter(kinds.values()))]

    def _check_left_over(self, keys: list[str]) -> None:
        if keys == ["lm_head.weight"] and self.arch.tied_embeddings:
            # Some exports hold tied embeddings twice. Equal copies say nothing new; others contradict the config.
            embedding = next(rule.hf_keys[0] for rule in self.rules if rule.cut == "vocab_rows")
            if self._tensor(keys[0]).equal(self._tensor(embedding)):
                return
            raise CheckpointError(
                f"{self.folder}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings; "
                "set it to false"
            )
        if keys:
            raise CheckpointError(
                f"{self.files[keys[0]]} holds {keys[0]} ({len(keys)} such), which a {self.arch.family} model does not "
                "have; check model_type in config.json"
            )

"""Reads a Hugging Face model folder: config.json and safetensors (or pytorch_model.bin), one tensor at a time.

When the folder is opened, everything is checked that needs no reading of weights: all files exist and are complete, all tensors of the
architecture exist with their shapes, and there are no others. Nothing in the folder is executed.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ft.errors import CheckpointError
from megatron_ft.files import read_json
from megatron_ft.log import logger
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.bitsandbytes_files import STATE, Matrix, open_matrix, without_sides
from megatron_ft.models.dtypes import name_of
from megatron_ft.models.families import parse_hf_config
from megatron_ft.models.hf_files import FETCH_AGAIN, PICKLED, SAFE, loose_shards, refuse_gguf, what_is_there
from megatron_ft.models.hf_names import renamed, state_dict_in, what_else
from megatron_ft.models.quantised import Quantization, is_quantised
from megatron_ft.models.safetensors_file import SafetensorsFile
from megatron_ft.models.stored_kinds import check_all, check_kinds, refuse_stated, stated
from megatron_ft.models.torch_file import TorchFile
from megatron_ft.models.weights import Placed, Rule, placed_rules
from megatron_ft.wording import counted

_IGNORED = (".rotary_emb.inv_freq", ".rotary.inv_freq")  # a buffer that old exports hold; it follows from the config
# With _from_model_config, transformers would replace the file's token ids by the config's.
_NOT_CARRIED = ("transformers_version", "_from_model_config")


class HfSource:
    """An opened model folder. Raise CheckpointError, naming the file, for whatever is missing or does not fit."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, SafetensorsFile | PickledFile] = {}
        config = self._config()
        if stated(config) is not None:
            check_kinds(config, self._tensor_files(), self.folder)
            refuse_stated(config, str(self.folder / "config.json"))
        family, arch = parse_hf_config(config)
        self.arch: Architecture = arch
        self.rules: list[Rule] = family.rules(self.arch)
        self._sides: dict[str, Path] = (
            self._tensor_files()
        )  # those beside NF4 matrices too, by their names in the files
        check_kinds(config, self._sides, self.folder)
        self.files: dict[str, Path] = {key: self._sides[key] for key in without_sides(self._sides)}
        self._stored = self._rename()
        self.matrices: dict[str, Matrix] = self._open_matrices()
        """Those that are stored in NF4, by name."""
        check_all(config, self._linears(), self.matrices, self.folder)
        self.dtype = self._check_tensors()

    def full(self, placed: Placed) -> Tensor:
        """Return the whole megatron-core tensor, with the type and vocabulary of the source."""
        return placed.rule.to_megatron(self.arch, [self.tensor(key) for key in placed.hf_keys])

    @property
    def quantization(self) -> Quantization | None:
        """Return how matrices are stored; None: all as plain numbers."""
        if not self.matrices:
            return None
        return Quantization(any(matrix.offset is not None for matrix in self.matrices.values()))

    def carried(self) -> dict[str, Any]:
        """Return what an export has to give back besides the architecture: token ids, the generation config, the name."""
        path = self.folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        generation = {key: value for key, value in generation.items() if key not in _NOT_CARRIED}
        name = self._config().get("_name_or_path") or ""
        # Only the last part of a path is stored, because it may be private.
        name = Path(name).name if os.path.isabs(name) else name
        return {
            **self.arch.hf,
            "_name_or_path": name or self.folder.resolve().name,
            **({"generation_config": generation} if generation else {}),
        }

    def _config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        refuse_gguf(self.folder)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: --input_dir must be the folder of a Hugging Face model")
        config = read_json(path)
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not a Hugging Face config; {FETCH_AGAIN}")
        return config

    def dtype_of(self, placed: Placed) -> torch.dtype:
        """Return the type of what `full` returns: the widest of its tensors' types."""
        kinds = [self._entry(key)[0] for key in placed.hf_keys]
        return functools.reduce(torch.promote_types, kinds)

    def _tensor_files(self) -> dict[str, Path]:
        """Return tensor name -> file that holds it. Safetensors are preferred to pickled weights if a folder has both."""
        for single, index in (SAFE, PICKLED):
            if (self.folder / index).is_file():
                return self._indexed(self.folder / index)
            if (self.folder / single).is_file():
                return dict.fromkeys(self._handle(self.folder / single).tensors, self.folder / single)
        if shards := loose_shards(self.folder):
            return {key: path for path in shards for key in self._handle(path).tensors}
        there = what_is_there(self.folder)
        raise CheckpointError(f"{self.folder} holds neither {' nor '.join((*SAFE, *PICKLED))}; {there}")

    def _open_matrices(self) -> dict[str, Matrix]:
        found = {}
        for key in without_sides(self.files):
            name, path = self._stored.get(key, key), self.files[key]
            if name + STATE in self._sides:
                found[key] = open_matrix(name, path, functools.partial(self._read, name))
        return found

    def _read(self, name: str, end: str) -> Tensor:
        """Return a tensor beside a matrix, by the ending of its name, or the matrix itself."""
        path = self._sides.get(name + end)
        if path is None or name + end not in self._handle(path).tensors:
            raise CheckpointError(f"{self.folder} lacks {name + end}; {FETCH_AGAIN}")
        return self._handle(path).read(name + end)

    def _linears(self) -> list[str]:
        """Return the names of the matrices that NF4 applies to."""
        placed = [one for one in placed_rules(self.arch, self.rules) if is_quantised(one.rule)]
        return [key for one in placed for key in one.hf_keys if key in self.files]

    def _rename(self) -> dict[str, str]:
        """Wanted name -> name in the files, where that is another one, for all files; self.files gets the wanted names."""
        for key, path in self.files.items():
            if key not in self._handle(path).tensors:
                raise CheckpointError(f"{path} does not hold {key}, though the index says so; {FETCH_AGAIN}")
        wanted = [key for placed in placed_rules(self.arch, self.rules) for key in placed.hf_keys]
        names = [key for key in self.files if not key.endswith(_IGNORED)]
        stored = renamed(names, wanted) or renamed(names, [key for key in wanted if key != "lm_head.weight"])
        if stored:
            logger("conversion").info(
                f"{self.folder}: tensors are named {stored[wanted[0]]} and so on; read as {wanted[0]}"
            )
            self.files = {name: self.files[key] for name, key in stored.items()}
        return stored

    def _entry(self, key: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        """(type, shape, ...) of a tensor; of an NF4 matrix those that it has dequantised."""
        if key in self.matrices:
            return self.matrices[key].dtype, self.matrices[key].shape, 0, 0
        return self._handle(self.files[key]).tensors[self._stored.get(key, key)]

    def _indexed(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; {FETCH_AGAIN}")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
                raise CheckpointError(f"{index}: {name!r} is not a plain file name; {FETCH_AGAIN}")
        return {key: self.folder / name for key, name in weight_map.items()}

    def _handle(self, path: Path) -> SafetensorsFile | PickledFile:
        """Return an opened file; it is kept open, because a model has few."""
        if path not in self._open:
            self._check_place(path)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {FETCH_AGAIN}")
            safe = path.suffix != ".bin"
            self._open[path] = SafetensorsFile(path, FETCH_AGAIN) if safe else PickledFile(path)
        return self._open[path]

    def _check_place(self, path: Path) -> None:
        """Refuse a link that leads out of the folder, except as in the cache of a hub: snapshots/REVISION/NAME -> blobs/HASH."""
        home, real = self.folder.resolve(), path.resolve()
        cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
        if not cached and not real.is_relative_to(home):
            raise CheckpointError(f"{path} is a link out of its folder, to {real}: put the file itself there")

    def tensor(self, key: str) -> Tensor:
        """Return a tensor by its name in Hugging Face, dequantised."""
        if key in self.matrices:
            return self.matrices[key].dense()
        return self._handle(self.files[key]).read(self._stored.get(key, key))

    def _check_tensors(self) -> str:
        """Check that all tensors exist, and their shapes and types. Return our name of the type of the weights (of the first tensor)."""
        found = {key for key in self.files if not key.endswith(_IGNORED)}
        wanted: dict[str, tuple[int, ...]] = {}
        for placed in placed_rules(self.arch, self.rules):
            wanted.update(zip(placed.hf_keys, placed.rule.hf_shapes(self.arch), strict=True))
        if missing := sorted(set(wanted) - found):
            raise CheckpointError(self._what_is_missing(missing, found, found - set(wanted)))
        self._check_left_over(sorted(found - set(wanted)))
        kinds = {}
        for key, shape in wanted.items():
            kinds[key], stored = self._entry(key)[:2]
            if stored != shape:
                raise CheckpointError(
                    f"{self.files[key]}: {key} is {list(stored)}, config.json says {list(shape)}; one of them is wrong"
                )
            name_of(kinds[key], key)
        return name_of(next(iter(kinds.values())))

    def _what_is_missing(self, missing: list[str], found: set[str], others: set[str]) -> str:
        """Return the message about missing tensors, with the reason that the names show. others: those that the model does not have."""
        if missing == ["lm_head.weight"]:
            given = self._config().get("tie_word_embeddings")
            says = "does not say" if given is None else "says"
            return (
                f"{self.folder} lacks lm_head.weight, and config.json {says} tie_word_embeddings{'' if given is None else ' false'}: "
                f"if the output layer is the embedding, set it to true; else the file is of a model without an output layer"
            )
        text = f"{self.folder} lacks {counted(len(missing), 'tensor')}, first {missing[0]}"
        if adapters := sorted(key for key in found if ".lora_" in key):
            return (
                f"{text}; it holds {adapters[0]}, a LoRA adapter: merge it into the base model first (merge_and_unload)"
            )
        if others:
            count = "its tensors" if others == found else f"{len(others)} of its {len(found)} tensors"
            return (
                f"{text}; {count} have other names ({min(others)}): rename them, or correct model_type in config.json"
            )
        return f"{text}; {FETCH_AGAIN}"

    def _check_left_over(self, keys: list[str]) -> None:
        if keys == ["lm_head.weight"] and self.arch.tied_embeddings:
            # Some exports contain tied embeddings twice. Equal copies are ignored; others contradict the config.
            embedding = next(rule.hf_keys[0] for rule in self.rules if rule.cut == "vocab_parallel")
            if self.tensor(keys[0]).equal(self.tensor(embedding)):
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


class PickledFile:
    """pytorch_model.bin: a pickled dict of tensors, of which nothing but the tensors is made. It may be in another dict."""

    def __init__(self, path: Path):
        content = TorchFile(path).value
        refs = state_dict_in(content)
        if refs is None:
            raise CheckpointError(
                f"{path} is not a plain dict of tensors{what_else(content)}: save the model's state_dict alone with torch.save"
            )
        self.path, self._refs = path, refs
        self.tensors = {key: (ref.dtype, ref.shape, 0, 0) for key, ref in refs.items()}

    def read(self, name: str) -> Tensor:
        return self._refs[name].read()

"""Weights that another program has written, for the entries of docs/troubleshooting.md about them."""

import json

from tests.errors.conftest import copy


def weights(change):
    """Convert a model whose weights another program has written. change: (folder, tensors) -> None, without model.safetensors."""

    def words(shop, tmp_path) -> list:
        from safetensors.torch import load_file

        folder = copy(shop.hf, tmp_path / "hf")
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        change(folder, tensors)
        return ["hf-to-megatron", folder, tmp_path / "out"]

    return words


def old_torch(folder, tensors) -> None:
    import torch

    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def saved(content, name="pytorch_model.bin"):
    """content: tensors -> what torch.save writes."""

    def change(folder, tensors) -> None:
        import torch

        torch.save(content(tensors), folder / name)

    return change


def whole_module(tensors):
    import torch

    return torch.nn.Linear(2, 2)


def without_output_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def of_an_adapter(tensors):
    return {f"{name}.lora_A.weight": tensor for name, tensor in tensors.items()}


def stated(name=str, **entry):
    """A config.json that says the weights are quantised. name: their names -> those that the linears get."""

    def change(folder, tensors) -> None:
        from safetensors.torch import save_file

        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
        renamed = {name(key) if "_proj." in key else key: tensor for key, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors")

    return change


CONVERSIONS = {
    "does not read": stated(lambda name: name.replace(".weight", ".qweight"), quant_method="gptq", bits=4),
    "dense, but": stated(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "before 1.6": old_torch,
    "not a plain dict": saved(lambda tensors: {"step": 3, "values": list(tensors.values())}),
    "objects other than tensors": saved(whole_module),
    "has no index": saved(dict, "pytorch_model-00001-of-00002.bin"),
    "lacks lm_head.weight": saved(without_output_layer),
    "have other names": saved(lambda tensors: {f"encoder.{name}": tensor for name, tensor in tensors.items()}),
    "a LoRA adapter": saved(of_an_adapter),
    "Git LFS": lambda folder, _: (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    ),
    "neither model.safetensors": lambda folder, _: (folder / "model.gguf").touch(),
}
"""A word of the entry's text -> what another program has written."""

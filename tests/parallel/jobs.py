"""What ranks are asked to do in the parallel tests. Module-level functions, so that they travel to forked ranks by name."""

import json
import logging
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import UserError

VOCAB, SEQ_LENGTH = 203, 64


def make_llama(folder: Path, **overrides) -> Path:
    """Write a random Llama with transformers; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 256, "rope_theta": 5e4,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | overrides)))
    with torch.no_grad():  # larger than the usual initialisation, so that differences show
        for weight in model.parameters():
            weight.mul_(2.0) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    return folder


def to_checkpoint(hf: Path, root: Path, ckpt_format: str, tp: int, pp: int) -> str:
    """Convert with our converter; returns the checkpoint's root."""
    from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert

    convert(
        HfToMegatron(
            input_dir=str(hf), output_dir=str(root), ckpt_format=ckpt_format,
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        )
    )  # fmt: skip
    return str(root)


def to_hf(root: str, folder: Path) -> dict[str, torch.Tensor]:
    """Export with our converter; returns the export's tensors."""
    from safetensors.torch import load_file

    from checkpoints_conversion.megatron_to_hf import MegatronToHf, convert

    convert(MegatronToHf(input_dir=root, output_dir=str(folder)))
    return load_file(folder / "model.safetensors")


def finetune(layout: tuple[int, int], **settings) -> int:
    """`megatron-ft finetune` as a rank runs it; settings by field name, whatever their section."""
    from megatron_ft.commands.finetune import run

    values = {
        "tensor_model_parallel_size": layout[0], "pipeline_model_parallel_size": layout[1], "sequence_parallel": True,
        "seq_length": SEQ_LENGTH, "micro_batch_size": 2, "global_batch_size": 8, "lr": 1e-3, "lr_warmup_iters": 2,
        "train_iters": 20, "log_interval": 1000,
    } | settings  # fmt: skip
    return run(TrainingSettings.of(**values))


def read_metrics(folder: Path, name: str = "train/loss") -> list[float]:
    """One metric of every training step in metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def logits(root: str, layout: tuple[int, int], sequence_parallel: bool, tokens: np.ndarray) -> np.ndarray | None:
    """Our model's logits [b, s, true vocabulary] from a checkpoint, gathered; None on stages without an output layer."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_ft.adapters.adapted import build_adapted
    from megatron_ft.checkpoints.folder import describe, find_checkpoint, vocab_rows
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import BuildOptions, build_model

    ids = torch.from_numpy(tokens)
    with process_groups(ParallelSizes(*layout, sequence_parallel=sequence_parallel)) as here, torch.no_grad():
        folder = find_checkpoint(Path(root))
        config = describe(folder)
        if config.adapter is None:
            model = build_model(config.architecture, here, BuildOptions(padded_vocab_size=vocab_rows(config))).eval()
            load_weights(folder, config, model, here)
        else:
            model = build_adapted(folder, config, here, BuildOptions()).eval()
        output = get_forward_backward_func()(
            forward_step_func=lambda _, m: (m(ids, torch.arange(ids.shape[1]).expand_as(ids), None), _same),
            data_iterator=iter(()), model=[model], num_microbatches=1, seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0], forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
        if not here.is_last_stage:
            return None
        whole = gather_from_tensor_model_parallel_region(output[0])
        return whole[..., : config.architecture.vocab_size].numpy()


def _same(output, non_loss_data=False):
    return output


def generate(root: str, layout: tuple[int, int], prompts: list[np.ndarray], **options) -> list[list[int]]:
    """Ids after each prompt, as this rank knows them."""
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.generation.decoding import Decoder
    from megatron_ft.models.build import build_model

    with process_groups(ParallelSizes(*layout)) as here:
        folder = find_checkpoint(Path(root))
        config = describe(folder)
        model = build_model(config.architecture, here)
        load_weights(folder, config, model, here)
        stop_ids = options.pop("stop_ids", ())
        decoder = Decoder(model, here, stop_ids, config.architecture.max_position_embeddings)
        return decoder.generate(prompts, **options)


def attempt(load, shards, save, until, settings, layout=(1, 1)):
    """A run as a rank does it: {"error": the user's error or None, "log": our lines, "steps": steps done}.

    Of the settings, `refuse` (save, errno) lets that save's first flush fail, `kill_writer` (rank, iteration) kills the background
    writer of that save during the step after it, and `patience` is how long a lock is waited for.
    """
    from megatron_ft.checkpoints import lock, writer
    from megatron_ft.training import step

    settings = dict(settings)
    lines, originals = [], (os.fsync, writer.write, lock._PATIENCE, step.update)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_ft").addHandler(handler)
    logging.getLogger("megatron_ft").setLevel(logging.INFO)
    steps, victim = [], settings.pop("kill_writer", None)

    def update(optimizer):
        steps.append(1)
        if victim and _is_rank(victim[0]) and len(steps) == victim[1] + 1:
            _kill_children()
        return originals[3](optimizer)

    step.update = update
    lock._PATIENCE = settings.pop("patience", lock._PATIENCE)
    if refusal := settings.pop("refuse", None):
        writer.write = partial(_refusing, originals, refusal, [0])
    if victim:
        writer.write = partial(_endless, originals[1], victim)
    try:
        finetune(layout, load=load, data_path=[shards], save=save, train_iters=until, hidden_dropout=0.1, **settings)
        error = None
    except (UserError, OSError) as caught:
        error = str(caught)
    finally:
        os.fsync, writer.write, lock._PATIENCE, step.update = originals
        logging.getLogger("megatron_ft").removeHandler(handler)
    return {"error": error, "log": "\n".join(lines), "steps": len(steps)}


def _refusing(originals, refusal, saves, part):
    """writing.write with a disk that is full (or broken) from the refusal[0]-th checkpoint on."""

    def fails(handle):
        raise OSError(refusal[1], os.strerror(refusal[1]))

    if int(part.folder.name.split("_")[1].split(".")[0]) >= 2 * refusal[0]:
        os.fsync = fails
    return originals[1](part)


def _endless(write, victim, part):
    if _is_rank(victim[0]) and f"{victim[1]:07d}." in part.folder.name:
        time.sleep(3600)
    return write(part)


def _kill_children():
    """Kill the background writer of this rank; returns when it is dead, so that no clock decides when the rank can know."""
    (child,) = multiprocessing.active_children()
    child.kill()
    child.join()


def _is_rank(number: int) -> bool:
    return os.environ["RANK"] == str(number)

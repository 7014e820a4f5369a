"""What ranks are asked to do in the family tests: many models in one go, because process groups are dear to make."""

from pathlib import Path

import numpy as np
import torch

from tests.parallel.jobs import finetune


def many(roots: list[str], layout: tuple[int, int], sequence_parallel: bool, tokens, decode: int) -> list:
    """For each checkpoint (logits [b, s, true vocabulary] or None, greedy ids after the first row's 20 tokens or [])."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups

    with process_groups(ParallelSizes(*layout, sequence_parallel=sequence_parallel)) as here, torch.no_grad():
        return [_one(Path(root), here, torch.from_numpy(tokens), decode) for root in roots]


def _one(root: Path, here, ids, decode: int):
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.generation.decoding import Decoder
    from megatron_ft.models.build import build_model

    folder = find_checkpoint(root)
    config = describe(folder)
    model = build_model(config.architecture, here).eval()
    load_weights(folder, config, model, here)
    if decode:
        decoder = Decoder(model, here, (), config.architecture.max_position_embeddings)
        return None, decoder.generate([ids[0, :20].numpy()], max_new_tokens=decode)[0]
    return logits(model, ids, config.architecture.vocab_size, here), []


def logits(model, ids, vocab_size: int, here):
    """Return logits [b, s, vocab_size] on the last stage, gathered over tensor-parallel ranks; None elsewhere. ids: [b, s]."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    output = get_forward_backward_func()(
        forward_step_func=lambda _, m: (m(ids, torch.arange(ids.shape[1]).expand_as(ids), None), _same),
        data_iterator=iter(()), model=[model], num_microbatches=1, seq_length=ids.shape[1],
        micro_batch_size=ids.shape[0], forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip
    if not here.is_last_stage:
        return None
    return gather_from_tensor_model_parallel_region(output[0])[..., :vocab_size].numpy()


def _same(output, non_loss_data=False):
    return output


def packed(roots: list[str], lengths: list[int], ids) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits [s, true vocabulary] of samples packed into a row, and of each alone, for each checkpoint. ids: [s], of all samples."""
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.models.build import build_model
    from megatron_ft.models.rows import packed_on

    params = packed_on(lengths, torch.device("cpu"))
    ids = torch.from_numpy(ids)[None]
    found = []
    with process_groups() as here, torch.no_grad():
        for root in roots:
            folder = find_checkpoint(Path(root))
            config = describe(folder)
            model = build_model(config.architecture, here).eval()
            load_weights(folder, config, model, here)
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            together = model(ids, positions, None, packed_seq_params=params)
            alone = [model(x, torch.arange(x.shape[1])[None], None) for x in ids.split(lengths, dim=1)]
            size = config.architecture.vocab_size
            found.append((together[0, :, :size].numpy(), torch.cat(alone, dim=1)[0, :, :size].numpy()))
    return found


def lima(root: str) -> tuple[float, float, bool]:
    """(dropout of the first layer, of the last, whether the last layer's output is its input) when it may reach 1."""
    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.models.build import BuildOptions, build_model
    from megatron_ft.models.dropout import token_keys
    from megatron_ft.models.rows import one_sample_a_row

    folder = find_checkpoint(Path(root))
    config = describe(folder)
    with process_groups() as here, torch.no_grad():
        model = build_model(config.architecture, here, BuildOptions(hidden_dropout=1.0, lima_dropout=True)).train()
        load_weights(folder, config, model, here)
        first, last = model.decoder.layers[0], model.decoder.layers[-1]
        seen = []
        last.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(torch.equal(kwargs["hidden_states"], output[0])),
            with_kwargs=True,
        )
        ids = torch.arange(16)[None]
        keys = torch.from_numpy(token_keys(0, np.arange(1), 16)).transpose(1, 2)
        model(ids, ids, None, packed_seq_params=one_sample_a_row(16, keys))
        return first.hidden_dropout, last.hidden_dropout, seen[0]


def train(layout, load, shards, run_dir):
    finetune(layout, load=load, data_path=[shards], run_dir=run_dir, train_iters=5, lr_warmup_iters=0)

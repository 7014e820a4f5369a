"""What ranks are asked to do in the tests of NF4."""

import torch

from megatron_ft.quantization import frozen, nf4


def freeze(chunks):
    """Quantise the linears of a plain model where they are."""
    assert all(frozen.freeze_linears(chunk) == 4 * len(chunk.decoder.layers) for chunk in chunks)


def freeze_and_shift_last_rank(chunks):
    """As freeze, with one scale of the last rank a little off."""
    freeze(chunks)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        list(frozen.frozen_linears(chunks[-1]).values())[-1].weight_absmax.data[0, 0] *= 1.2


def dequantise_in_place(chunks):
    """Give a plain model the weights that its quantised self computes with."""
    for chunk in chunks:
        for module in chunk.decoder.modules():
            if type(module) in frozen.FROZEN:
                module.weight.data.copy_(nf4.dequantise(*nf4.quantise(module.weight), module.weight.dtype))


def measured(problem, cases, prepare):
    """What invariance.measure finds in each case, on the first rank."""
    from megatron_ft.training.invariance import measure

    return [measure(problem, case, prepare) for case in cases]


def held_for_backward(arch):
    """Bytes that autograd keeps in a forward pass of one frozen linear, by type of tensor; and what bf16 makes of its parts."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import BuildOptions, build_model

    kept = {}

    def note(tensor):
        kept[str(tensor.dtype)] = kept.get(str(tensor.dtype), 0) + tensor.numel() * tensor.element_size()
        return tensor

    with process_groups(ParallelSizes()) as layout:
        model = build_model(arch, layout, BuildOptions(nf4=torch.float32))
        linear = model.decoder.layers[0].mlp.linear_fc1
        x = torch.ones(3, 1, arch.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            linear(x)
        sizes = {name: list(module.weight.shape) for name, module in frozen.frozen_linears(model).items()}
        linear.weight_absmax.data.fill_(1 / 3)
        linear.bfloat16()
        after = {name: str(value.dtype) for name, value in linear.named_parameters()}
    return kept, sizes, after, linear.weight_absmax[0, 0].item()


def held(root, parallel):
    """Load a quantised checkpoint in a layout; the number of this rank's linears whose codes and scales are the slices of the whole."""
    from pathlib import Path

    from checkpoints_conversion.megatron_source import open_megatron
    from checkpoints_conversion.options import CheckpointSource
    from megatron_ft.checkpoints.folder import describe, find_checkpoint, vocab_rows
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.checkpoints.quantised import nf4_of
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import BuildOptions, build_chunks
    from megatron_ft.models.pipeline import split_layers
    from megatron_ft.models.trainable import global_name
    from megatron_ft.models.weights import placed_rules

    folder = find_checkpoint(Path(root))
    config = describe(folder)
    split = split_layers(config.architecture.num_layers, parallel)
    rules, full = open_megatron(Path(root), CheckpointSource()).held()
    whole = {one.key: one for one in placed_rules(config.architecture, rules)}
    with process_groups(ParallelSizes.of(parallel, split.virtual_size)) as layout:
        options = BuildOptions(nf4=nf4_of(config), split=split, padded_vocab_size=vocab_rows(config))
        chunks = build_chunks(config.architecture, layout, options)
        load_weights(folder, config, chunks, layout)
        right = 0
        for chunk in chunks:
            for name, linear in frozen.frozen_linears(chunk).items():
                assert linear.rounded == nf4_of(config)
                for part in ("weight", "weight_absmax"):
                    place = whole[global_name(chunk, f"{name}.{part}")]
                    expected = place.rule.part(full(place), layout.tp_size, layout.tp_rank)
                    right += torch.equal(getattr(linear, part), expected)
    return right


def logits(roots, layout, tokens):
    """Logits [b, s, vocabulary] of each quantised checkpoint, and greedy ids after the first row; None and the ids elsewhere."""
    from tests.models import jobs

    def of(model, config, here):
        return jobs.logits(model, torch.from_numpy(tokens), config.architecture.vocab_size, here)

    return _each(roots, layout, lambda *loaded: (of(*loaded), _greedy(tokens[0, :10], *loaded)))


def answers(roots, layout, prompt):
    """Greedy ids after the prompt, of each quantised checkpoint."""
    return _each(roots, layout, lambda *loaded: _greedy(prompt, *loaded))


def frozen_where_it_is(dense, quantised):
    """A dense checkpoint in bf16, loaded in fp32 and frozen: the number of linears that hold what the quantised checkpoint does."""
    from pathlib import Path

    from megatron_ft.checkpoints.folder import describe, find_checkpoint
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import BuildOptions, build_model

    with process_groups(ParallelSizes(2)) as here:
        models = []
        for root, nf4_type in ((dense, None), (quantised, torch.bfloat16)):
            folder = find_checkpoint(Path(root))
            config = describe(folder)
            models.append(build_model(config.architecture, here, BuildOptions(nf4=nf4_type)))
            load_weights(folder, config, models[-1], here)
        frozen.freeze_linears(models[0], torch.bfloat16)
        ours, theirs = map(frozen.frozen_linears, models)
        same = [
            torch.equal(one.weight, theirs[name].weight)
            and torch.equal(one.weight_absmax, theirs[name].weight_absmax)
            and one.rounded == theirs[name].rounded
            for name, one in ours.items()
        ]
    return sum(same)


def _greedy(prompt, model, config, here):
    from megatron_ft.generation.decoding import Decoder

    decoder = Decoder(model, here, (), config.architecture.max_position_embeddings)
    return [int(token) for token in decoder.generate([prompt], max_new_tokens=8)[0]]


def _each(roots, layout, of):
    """of(model, config, layout) for each quantised checkpoint."""
    from pathlib import Path

    from megatron_ft.checkpoints.folder import describe, find_checkpoint, vocab_rows
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.checkpoints.quantised import nf4_of
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import BuildOptions, build_model

    found = []
    with process_groups(ParallelSizes(*layout)) as here, torch.no_grad():
        for folder in map(find_checkpoint, map(Path, roots)):
            config = describe(folder)
            options = BuildOptions(nf4=nf4_of(config), padded_vocab_size=vocab_rows(config))
            model = build_model(config.architecture, here, options).eval()
            load_weights(folder, config, model, here)
            found.append(of(model, config, here))
    return found


def bytes_of_ranks(arch, sizes):
    """Bytes of all parameters of a quantised model on this rank."""
    from megatron_ft.engine.parallel import ParallelSizes, process_groups
    from megatron_ft.models.build import BuildOptions, build_model

    with process_groups(ParallelSizes(*sizes)) as layout:
        model = build_model(arch, layout, BuildOptions(dtype=torch.bfloat16, nf4=torch.bfloat16))
        return sum(held.numel() * held.element_size() for held in model.parameters())

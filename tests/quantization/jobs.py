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

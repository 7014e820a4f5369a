"""Claim: saving and loading a distributed optimizer takes a rank's share of host memory and one parameter more, not the whole state.

The engine's way (`fully_reshardable`: the state is put together whole on every data-parallel rank, and read whole by each) and ours (by
owner) save and load the same run of N data-parallel processes, each in processes of its own, on a CPU. Printed for the rank that grew
most: peak resident memory over what it had before, bytes read from files while loading (rchar), and seconds; and the ratios. Then the
arithmetic for models that do not fit here, with the factors that were just measured.

    python benchmarks/checkpoint_memory.py [--ranks 4] [--hidden 1024] [--layers 2] [--bf16]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MEGATRON_FT_DEVICE"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.sections import Batch, Data, Numerics, Optimizer, Parallelism
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.pipeline import plain_split
from megatron_ft.planner import known, memory
from tests.ranks import Ranks

STATE = 12
"""Bytes of a parameter's state: main parameter and two moments, fp32."""


class Growth:
    """Peak resident memory of this process above what it was, MB; bytes read, MB; seconds. Sampled every 2 ms."""

    def __enter__(self):
        self._base = self._peak = _resident()
        self._read, self._start, self._over = _bytes_read(), time.monotonic(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over:
            self._peak = max(self._peak, _resident())
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self._over = True
        self._thread.join()
        self.grew = (max(self._peak, _resident()) - self._base) / 1e6
        self.read, self.seconds = (_bytes_read() - self._read) / 1e6, time.monotonic() - self._start


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


def job(root: str, hidden: int, layers: int, bf16: bool, engines_way: bool) -> dict:
    """Save a run after a step, then load it again; what it cost this rank."""
    from megatron_ft.checkpoints import training_state
    from megatron_ft.checkpoints.owned_state import Whole
    from megatron_ft.checkpoints.writer import Here
    from megatron_ft.engine.optimizer import make_optimizer, make_schedule
    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.training.setup import bare, make_model

    arch = Architecture(
        family="llama", num_layers=layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=8,
        num_query_groups=8, head_dim=hidden // 8, vocab_size=4096, max_position_embeddings=64, norm_epsilon=1e-5,
    )  # fmt: skip
    numerics, section, folder = Numerics(bf16=bf16), Optimizer(lr=1e-3), Path(root)
    with process_groups() as layout:
        model = make_model(arch, layout, Data(seq_length=32), Parallelism(use_distributed_optimizer=True), numerics)
        optimizer = make_optimizer(model, section, numerics, True)
        weights = list(model[0].parameters())
        for weight in weights:
            weight.main_grad.normal_()
        optimizer.step()
        schedule = make_schedule(optimizer, section, Batch(train_iters=2))
        config = CheckpointConfig(arch, "torch_dist", 1, 1, arch.vocab_size, 1, "bf16" if bf16 else "fp32")
        contents = training_state.Contents(config, bare(model), optimizer, schedule, layout, {})
        way = mock.patch.object(training_state, "optimizer_state", Whole) if engines_way else mock.MagicMock()
        with way:
            with Growth() as save:
                plan = training_state.plan_save(contents, "torch_dist", folder, training_state.Progress(1, 8))
                writer = Here(plan.part)
            assert writer.problem is None, writer.problem
            everyone = [None] * layout.world_size
            dist.all_gather_object(everyone, writer.written.places)
            if layout.is_main:
                plan.finish(everyone)
            del plan, writer
            dist.barrier()
            with Growth() as load:
                training_state.resume(folder, config, bare(model), optimizer, schedule, layout, 1)
        numbers = [weight.numel() for weight in weights]
        return {"save": save, "load": load, "numbers": sum(numbers), "largest": max(numbers)}


def measure(options: argparse.Namespace, engines_way: bool) -> dict[str, float]:
    """The largest figures over the ranks, in new processes."""
    ranks = Ranks(options.ranks)
    with tempfile.TemporaryDirectory() as root:
        found = ranks.run(_figures, root, options.hidden, options.layers, options.bf16, engines_way, timeout=500)
    ranks.close()
    return {name: max(rank[name] for rank in found) for name in found[0]}


def _figures(*arguments) -> dict[str, float]:
    found = job(*arguments)
    save, load = found["save"], found["load"]
    return {
        "save grew, MB": save.grew, "save, s": save.seconds, "load grew, MB": load.grew, "load read, MB": load.read,
        "load, s": load.seconds, "numbers": found["numbers"], "largest": found["largest"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    engine, ours = measure(options, True), measure(options, False)
    whole, largest = engine["numbers"] * STATE / 1e6, engine["largest"] * STATE / 1e6
    what = f"{engine['numbers'] / 1e6:.1f} M parameters, {'bf16' if options.bf16 else 'fp32'}, DP{options.ranks}"
    print(
        f"{what}: state {whole:.0f} MB, a share {whole / options.ranks:.0f} MB, the largest parameter's {largest:.0f} MB"
    )
    print(f"{'the rank with most':20} {'engine':>9} {'by owner':>9} {'ratio':>7}")
    for name in ("save grew, MB", "save, s", "load grew, MB", "load read, MB", "load, s"):
        print(f"{name:20} {engine[name]:9.1f} {ours[name]:9.1f} {ours[name] / engine[name]:7.2f}")
    print("\nby arithmetic, bf16, state on a node of 8 GPUs at a save, and read by it at a load (weights not counted):")
    factor = engine["save grew, MB"] / whole
    for name, tp, pp, dp in (("llama3-8b", 1, 1, 8), ("llama3-70b", 8, 4, 8)):
        print(_arithmetic(name, tp, pp, dp, factor))


def _arithmetic(name: str, tp: int, pp: int, dp: int, factor: float) -> str:
    """Of the fullest stage. factor: how often the engine's way holds the whole state at its peak, as measured."""
    arch = known.architecture(name)
    job = memory.Job(plain_split(arch.num_layers, pp), tp, dp, 4096, 1, 8 * dp, distributed_optimizer=True)
    state = max(stage.parameters for stage in memory.stages(arch, job)) * STATE / 1e9
    one = arch.vocab_size * arch.hidden_size / tp * 4 / 1e9
    return (
        f"{name} TP{tp} PP{pp} DP{dp}: engine {factor:.1f} x {state:.1f} GB x 8 = {8 * factor * state:,.0f} GB, read {8 * state:,.0f} GB; "
        f"by owner ({state:.1f} / {dp} + {one:.1f}) x 8 = {8 * (state / dp + one):,.0f} GB, read {8 * state / dp:,.0f} GB"
    )


if __name__ == "__main__":
    main()

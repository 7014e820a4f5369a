"""Which GPU a process takes, and that one which torch cannot use is not passed over in silence. torch.cuda is a stand-in here."""

import os
import types

import pytest
import torch
import torch.distributed as dist

from megatron_ft import device
from megatron_ft.engine.parallel import ParallelSizes, process_groups
from megatron_ft.errors import ConfigError

LAUNCHED = ("LOCAL_WORLD_SIZE", "SLURM_GPUS_PER_TASK", "MEGATRON_FT_DEVICE", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that gives this machine GPUs of torch and a driver; what was selected is in its `selected`."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    selected = []

    def make(gpus: int, driver: str | None = None, built_for: str | None = "13.0", opens: bool = True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", selected.append)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        node, version = tmp_path / "nvidia0", tmp_path / "version"
        if driver:
            node.touch() if opens else node.mkdir()  # a folder cannot be opened for writing, not even by root
            version.write_text(
                f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue Mar  7\nGCC version: 11\n"
            )
        monkeypatch.setattr(device, "_NODES", str(tmp_path / "nvidia[0-9]*"))
        monkeypatch.setattr(device, "_DRIVER", str(version))
        return selected

    return make


def test_a_gpu_that_torch_cannot_use_is_an_error(machine):
    machine(0, driver="470.57.02", built_for="13.0")
    with pytest.raises(ConfigError, match=r"driver 470\.57\.02.*built for CUDA 13\.0.*MEGATRON_FT_DEVICE=cpu"):
        device.select(0)


def test_so_is_a_build_of_torch_for_cpus(machine):
    machine(0, driver="580.65.06", built_for=None)
    with pytest.raises(ConfigError, match=r"build for CPUs: install torch's CUDA build.*MEGATRON_FT_DEVICE=cpu"):
        device.select(0)


@pytest.mark.parametrize("hidden", [{"MEGATRON_FT_DEVICE": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_a_gpu_that_is_hidden_on_purpose_is_none(machine, monkeypatch, hidden):
    selected = machine(0, driver="470.57.02")
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    device.select(0)
    assert not selected


def test_neither_is_one_that_the_job_may_not_open(machine):
    machine(0, driver="470.57.02", opens=False)
    assert device.installed_driver() is None
    device.select(0)


def test_a_machine_without_a_gpu_is_not_refused(machine):
    machine(0)
    device.select(3)


def test_each_rank_takes_the_gpu_of_its_number(machine, monkeypatch):
    selected = machine(8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    device.select(5)
    assert selected == [5]
    with pytest.raises(ConfigError, match="local rank 8 has no GPU: this machine has 8"):
        device.select(8)


@pytest.mark.parametrize(("gpus", "environment"), [(1, {}), (2, {"SLURM_GPUS_PER_TASK": "2"})])
def test_a_task_that_was_given_its_own_gpus_takes_the_first(machine, monkeypatch, gpus, environment):
    """As under `srun --gpus-per-task`: every task sees its own, numbered from 0."""
    selected = machine(gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    device.select(1)
    device.select(7)
    assert selected == [0, 0]


def test_more_processes_than_gpus_from_one_launcher_are_refused(machine, monkeypatch):
    machine(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="local rank 1 has no GPU"):
        device.select(1)


def test_two_processes_on_one_gpu_are_refused(machine, monkeypatch):
    machine(1)
    store = dist.HashStore()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for uuid in ("a", "b"):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: types.SimpleNamespace(uuid=uuid))
        device.claim(store)
    with pytest.raises(ConfigError, match="two processes of this run were given the same GPU"):
        device.claim(store)


def test_streams_keep_their_order_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    device.order_streams()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    device.order_streams()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_groups_end_in_the_order_in_which_they_were_made(four_ranks):
    """Ending one may wait for its other members: an order that differs between ranks can hang."""
    for made, ended in four_ranks.run(order_of_ending):
        assert ended == [name for name in made if name in ended] and len(ended) > 5


def order_of_ending():
    """Return the names of this rank's groups as they were made, and as they were ended."""
    ended, destroy = [], dist.destroy_process_group
    dist.destroy_process_group = lambda group: (ended.append(group.group_name), destroy(group))[1]
    try:
        with process_groups(ParallelSizes(2, 2)):
            made = [group.group_name for group in dist.distributed_c10d._world.pg_map]
    finally:
        dist.destroy_process_group = destroy
    return made, ended


@pytest.mark.parametrize("hidden", [{"MEGATRON_FT_DEVICE": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, device.CPU])
def test_processes_are_forked_where_no_driver_may_be_used(hidden, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    assert device.may_use_driver()
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    assert not device.may_use_driver() and device.hidden()

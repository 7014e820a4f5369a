"""One nursery for a whole test run, pools of ranks for a module; and the CPU backend's pools beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu_path.nursery import GpuRanks, Nursery

if TYPE_CHECKING:
    from tests.gpu_path.scenarios import Scenario


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


class Pools:
    """Ranks by their number, made when asked for, and made again after one has failed."""

    def __init__(self, make: Callable[[int], Any]):
        self._make, self._made = make, {}

    def run(self, size: int, function: Callable, *args: Any, timeout: float = 180.0) -> list:
        """Return what each of `size` ranks returned."""
        ranks = self._made.get(size) or self._made.setdefault(size, self._make(size))
        try:
            return ranks.run(function, *args, timeout=timeout)
        except Exception:
            del self._made[size]
            raise

    def walk(self, scenario: Scenario, **options: Any) -> list:
        """Return each rank's steps.Walked."""
        from tests.gpu_path.steps import walk

        return self.run(scenario.processes, walk, scenario, options.get("trace_with"))

    def close(self) -> None:
        for ranks in self._made.values():
            ranks.close()


@pytest.fixture(scope="module")
def gpus(nursery: Nursery) -> Iterator[Pools]:
    """Pools of ranks on pretended GPUs."""
    pools = Pools(lambda size: GpuRanks(nursery, size))
    yield pools
    pools.close()


@pytest.fixture(scope="module")
def cpus() -> Iterator[Pools]:
    """Pools of ranks of the CPU backend."""
    from tests.ranks import Ranks  # it imports the engine

    pools = Pools(Ranks)
    yield pools
    pools.close()

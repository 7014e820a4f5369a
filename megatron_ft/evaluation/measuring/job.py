"""What is measured: a model in one precision, and what came out. Plain values that go to a process and back as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_ft.errors import ConfigError
from megatron_ft.wording import counted

BITS = {"transformers": (32, 16, 8, 4), "engine": (32, 16, 4)}
"""Backend -> the precisions that it can load."""
DEFAULT_BITS = {"transformers": (16, 8, 4), "engine": (16, 4)}
PROMPTS = (
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "List three ways to save energy at home.",
    "Summarise the story of Robinson Crusoe in five sentences.",
    "Write an email that asks a colleague to move a meeting to Thursday.",
)
"""Five prompts, where the user gives none."""

NO_ROOM = "out of memory on this GPU"
KILLED = "killed, usually because this machine's memory is full"

Message = dict[str, str]


@dataclass(frozen=True)
class Job:
    """One configuration, which a process of its own measures."""

    model: str
    backend: str
    bits: int
    conversations: list[list[Message]]
    max_new_tokens: int
    stored: bool = False
    """The Hugging Face model is quantised to these bits already, and is loaded as it is."""
    adapter: str | None = None
    tp: int = 1
    pp: int = 1

    @property
    def processes(self) -> int:
        """Return the number of processes that hold the model."""
        return self.tp * self.pp


@dataclass(frozen=True)
class Run:
    """One prompt."""

    prompt_tokens: int
    new_tokens: int
    seconds: float
    peak_bytes: int
    answer: str


@dataclass(frozen=True)
class Product:
    """One token through the largest linear, alone. dequantise_ms: making its plain weight; None where no step of its own does that."""

    name: str
    shape: tuple[int, int]
    ms: float
    dequantise_ms: float | None = None


@dataclass(frozen=True)
class Measured:
    """The result of a job. failed: why there is none."""

    bits: int
    kind: str
    failed: str | None = None
    weight_bytes: int = 0
    start_bytes: int = 0
    """Peak before the model was loaded: the libraries. 0 on a GPU."""
    load_seconds: float = 0.0
    load_peak_bytes: int = 0
    peaks_are_of_runs: bool = True
    """False: the system cannot count a peak anew, so those of the runs include loading."""
    runs: list[Run] = field(default_factory=list)
    product: Product | None = None

    @property
    def is_full(self) -> bool:
        """Return whether it failed because the memory does not suffice, which is a result."""
        return self.failed in (NO_ROOM, KILLED)

    @property
    def seconds(self) -> float:
        """Return the mean of a run."""
        return sum(run.seconds for run in self.runs) / len(self.runs)

    @property
    def peak_bytes(self) -> int:
        """Return the largest peak of a run."""
        return max(run.peak_bytes for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        return sum(run.new_tokens for run in self.runs) / sum(run.seconds for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measured:
        product = values["product"]
        made = Product(**{**product, "shape": tuple(product["shape"])}) if product else None
        return cls(**{**values, "runs": [Run(**run) for run in values["runs"]], "product": made})


def together(parts: Sequence[Measured]) -> Measured:
    """Return the result of a model from those of its processes, the first one's first: all weights, the fullest process's peaks."""
    first = parts[0]
    runs = [replace(run, peak_bytes=max(part.runs[n].peak_bytes for part in parts)) for n, run in enumerate(first.runs)]
    return replace(
        first, weight_bytes=sum(part.weight_bytes for part in parts), start_bytes=max(part.start_bytes for part in parts),
        load_seconds=max(part.load_seconds for part in parts), load_peak_bytes=max(part.load_peak_bytes for part in parts),
        runs=runs, peaks_are_of_runs=all(part.peaks_are_of_runs for part in parts),
    )  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, whichever backend loaded it."""

    kind: str
    """Number format and library, for people."""
    prompts: list[list[int]]
    generate: Callable[[list[int], int], list[int]]
    """(ids of a prompt, count) -> exactly so many new ids; an end-of-text token does not end it."""
    decode: Callable[[list[int]], str]
    weight_bytes: int
    product: Callable[[], Product]
    together: Callable[[Measured], Measured] = lambda measured: measured
    """What this process measured -> the model's, of all its processes."""


def check_lengths(prompts: list[list[int]], max_new_tokens: int, positions: int) -> None:
    """Raise ConfigError for a prompt that, with its answer, is longer than the model's context, or that is empty."""
    for number, ids in enumerate(prompts, 1):
        if not ids:
            raise ConfigError(f"prompt {number} has no tokens: write some text")
        if len(ids) + max_new_tokens > positions:
            raise ConfigError(
                f"prompt {number} has {counted(len(ids), 'token')}, with --max_new_tokens {max_new_tokens} more than the model's "
                f"{positions} "
                f"positions: shorten it, or lower --max_new_tokens"
            )

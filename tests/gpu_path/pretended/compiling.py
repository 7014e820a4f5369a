"""torch.compile on the pretended GPU: each call is traced by Dynamo with ordinary CPU tensors, or not at all.

Tracing shows whether a function is one graph, and how many graphs its calls need; the compiler behind it (Triton) is not run. The
result that the model goes on with is always that of the function itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

from tests.gpu_path.pretended.patches import ordinary_torch, replace
from tests.gpu_path.pretended.tensor import Gpu

GRAPHS: Counter = Counter()
"""Function -> graphs that Dynamo made of it."""
CALLS: Counter = Counter()
"""Function -> calls."""
FAILED: dict[str, str] = {}
"""Function -> why Dynamo cannot make one graph of it, or how its graph differs from it."""
_TRACING: list[str] = []
"""Not empty: the backend with which calls are traced."""
_COMPILE = torch.compile


def install() -> None:
    """Replace torch.compile."""
    replace(torch, "compile", _traced)


def trace(backend: str | None) -> None:
    """From now on trace calls with this Dynamo backend; None: no longer. Forget what was counted."""
    if backend or _TRACING:
        torch._dynamo.reset()
    _TRACING[:] = [backend] if backend else []
    for found in (GRAPHS, CALLS, FAILED):
        found.clear()


def _traced(model: Callable | None = None, **options: Any) -> Callable:
    """torch.compile(model, ...) or, as a decorator, torch.compile(...)."""
    if model is None:
        return lambda function: _traced(function, **options)
    name = f"{model.__module__}.{model.__qualname__}"

    @functools.cache
    def compiled(backend: str) -> Callable:
        def count(graph: torch.fx.GraphModule, examples: list) -> Callable:
            GRAPHS[name] += 1
            return torch._dynamo.lookup_backend(backend)(graph, examples)

        return _COMPILE(model, **options | {"backend": count, "fullgraph": True, "mode": None})

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _TRACING:
            CALLS[name] += 1
            if name not in FAILED and (failure := _run_aside(compiled(_TRACING[0]), model, args, kwargs)):
                FAILED[name] = failure
        return model(*args, **kwargs)

    return call


def _run_aside(compiled: Callable, model: Callable, args: tuple, kwargs: dict) -> str | None:
    """Run the compiled function and the function itself, forward and backward, on copies of the arguments. Return what went wrong."""

    def copy(x: Gpu) -> torch.Tensor:
        return x.host.detach().clone().requires_grad_(x.requires_grad)

    def results(function: Callable) -> list[torch.Tensor]:
        """The outputs, and the gradients of what can be differentiated."""
        ours, options = _pytree.tree_map_only(Gpu, copy, (args, kwargs))
        outputs = _pytree.tree_leaves(function(*ours, **options))
        wanted = [x for x in _pytree.tree_leaves((ours, options)) if isinstance(x, torch.Tensor) and x.requires_grad]
        made = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        grads = torch.autograd.grad(made, wanted, [torch.ones_like(x) for x in made]) if made and wanted else ()
        return [*outputs, *grads]

    try:
        with ordinary_torch():
            found, expected = results(compiled), results(model)
        torch.testing.assert_close(found, expected)
    except Exception as error:  # Dynamo's are of many kinds
        return f"{type(error).__name__}: {error}"
    return None

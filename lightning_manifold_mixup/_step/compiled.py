"""What hooks must mind under torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def compiled_parts(module: nn.Module) -> list[str]:
    """Names of the modules inside ``module`` (``""`` is itself) that torch.compile has wrapped."""
    if "torch._dynamo" not in sys.modules:  # then nothing can have been compiled; importing it takes a second
        return []
    from torch._dynamo import OptimizedModule

    named = [
        name
        for name, part in module.named_modules()
        if isinstance(part, OptimizedModule) or part._compiled_call_impl is not None
    ]
    return named or ([""] if getattr(module, "_compiler_ctx", None) is not None else [])


@contextmanager
def fresh_graphs(layers: int) -> Iterator[None]:
    """Forgets graphs that were compiled without the mixing hooks, and makes room for one graph for each layer.

    A graph that is already cached would go on without the hooks, since torch.compile does not guard on them. Mixing at
    each of ``layers`` layers, and at none, in training and in evaluation, with a full and an odd last batch, gives at
    most ``2 * layers + 2`` graphs; the default limit is 8.
    """
    import torch._dynamo

    torch._dynamo.reset()
    limit = max(torch._dynamo.config.recompile_limit, 2 * layers + 2)
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield


@contextmanager
def eager() -> Iterator[None]:
    """What torch.compile has wrapped runs uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        yield

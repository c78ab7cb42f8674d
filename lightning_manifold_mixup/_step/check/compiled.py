"""What hooks need under torch.compile: new graphs, and versions that take them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

WHOLE_MODULE = (2, 8)
"""The first torch whose compiler takes a training step with a MixedTarget in it."""


def compiled_parts(module: nn.Module) -> list[str]:
    """Return the names of the modules inside ``module`` (``""`` is itself) that torch.compile has wrapped."""
    if "torch._dynamo" not in sys.modules:  # then nothing can have been compiled; importing it takes a second
        return []
    from torch._dynamo import OptimizedModule

    named = [
        name
        for name, part in module.named_modules()
        if isinstance(part, OptimizedModule) or part._compiled_call_impl is not None
    ]
    return named or ([""] if getattr(module, "_compiler_ctx", None) is not None else [])


def check_compiled(module: nn.Module) -> None:
    """Refuse compiled modules that the installed versions would not mix.

    Raises:
        MisconfigurationException: for a LightningModule compiled as a whole before torch 2.8, and for anything compiled
            under Python 3.13.0.
    """
    parts = compiled_parts(module)
    if parts and sys.version_info[:3] == (3, 13, 0):
        raise MisconfigurationException(
            "Expected Python 3.13.1 or later with torch.compile, got 3.13.0: there the compiler does not notice that "
            "another layer is to be mixed. Upgrade Python, or train uncompiled."
        )
    if parts == [""] and torch_version() < WHOLE_MODULE:
        raise MisconfigurationException(
            f"Expected torch {'.'.join(map(str, WHOLE_MODULE))} or later for a LightningModule that is compiled as a "
            f"whole, got {torch.__version__}: its compiler cannot follow labels in superposition. Compile the network "
            "inside instead: `module.model = torch.compile(module.model)`."
        )


def torch_version() -> tuple[int, ...]:
    """Major and minor version of torch."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


@contextmanager
def fresh_graphs(layers: int) -> Iterator[None]:
    """Forget graphs that were compiled without the mixing hooks, and make room for one graph for each layer.

    torch.compile does not notice new hooks, so a cached graph would go on without them. Mixing at each of ``layers``
    layers, and at none, in training and in evaluation, with a full and an odd last batch, gives at most ``2 * layers +
    2`` graphs; the default limit is 8.
    """
    import torch._dynamo

    torch._dynamo.reset()
    name = limit_of_graphs()
    limit = max(getattr(torch._dynamo.config, name), 2 * layers + 2)
    with torch._dynamo.config.patch({name: limit}):
        yield


def limit_of_graphs() -> str:
    """Name the option of ``torch._dynamo.config`` that limits the graphs of a function (renamed after 2.6)."""
    import torch._dynamo

    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"


@contextmanager
def eager() -> Iterator[None]:
    """Run what torch.compile has wrapped without the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield

"""A ghost: a copy of a LightningModule that shares its parameters and has its own of all else.

A training step that runs on a ghost leaves the module as it was: buffers, counters, lists, metrics, memory banks. It
logs nowhere and steps no optimizer. No weights are copied.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import io
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_manifold_mixup._step.check.compiled import compiled_parts, eager
from lightning_manifold_mixup._step.check.random_states import replayed
from lightning_manifold_mixup._step.check.rebinding import rebind
from lightning_manifold_mixup._step.check.writes import Writes
from lightning_manifold_mixup._step.host import Callback
from lightning_manifold_mixup._step.labels.targets import plain


class NoGhostError(Exception):
    """A module cannot be copied; the message says why."""


def ghost_of(module: nn.Module, own: Collection[nn.Parameter] = ()) -> Any:
    """Return a copy that shares the parameters of ``module``, and nothing else.

    Args:
        module: a LightningModule, or a part of one. Tensors kept on it that are results of a computation are copied
            without their graph; trainers, data modules, callbacks of this package and locks are shared; files that
            are written to are replaced by nothing.
        own: parameters that the ghost is to have copies of, because its step writes into them. Their gradients still
            arrive at the originals.

    Raises:
        NoGhostError: if something on the module cannot be copied.

    Example:
        >>> module = nn.BatchNorm1d(2)
        >>> ghost = ghost_of(module)
        >>> ghost.weight is module.weight, ghost.running_mean is module.running_mean
        (True, False)
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo |= {id(p): p.clone() if p.requires_grad else nn.Parameter(p.clone(), requires_grad=False) for p in own}
    trainer = getattr(module, "_trainer", None)
    if trainer is not None:
        memo[id(trainer)] = _trainer_of_ghosts(trainer)
        ours = (callback for callback in trainer.callbacks if isinstance(callback, Callback))
        for shared in (getattr(trainer, "datamodule", None), trainer.strategy, *ours):
            memo[id(shared)] = shared
        for logger in trainer.loggers:
            memo[id(logger)] = DummyLogger()
        for optimizer in trainer.optimizers:
            memo[id(optimizer)] = _Disarmed(optimizer)
    if context := getattr(module, "_compiler_ctx", None):
        memo[id(context["dynamo_ctx"])] = context["dynamo_ctx"]
    try:
        with _copyable():
            ghost = copy.deepcopy(module, memo)
            rebind(ghost, memo)
    except Exception as error:  # any error of an object that the user keeps on the module
        raise NoGhostError(f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error})") from error
    for name, original in (getattr(ghost, "_compiler_ctx", None) or {}).items():
        if name.startswith("original_"):  # compiled as a whole: these are functions of the module, not of the copy
            vars(ghost)[name.removeprefix("original_")] = original
    for part in ghost.modules():
        if hasattr(part, "_trainer") and hasattr(part, "manual_backward"):
            vars(part)["_trainer"] = memo.get(id(trainer))  # deepcopy leaves it out
            _disarm(part)
    return ghost


def batch_of_ghosts(batch: Any) -> Any:
    """Return a copy of a batch, for a step that may write into it, or take parts out of it.

    Raises:
        NoGhostError: if something in the batch cannot be copied.
    """
    try:
        with _copyable(), warnings.catch_warnings():
            # Of the batch's own package about how it copies: tensordict before 0.15, with which filters that make
            # errors of warnings would stop the self-check.
            warnings.simplefilter("ignore")
            return copy.deepcopy(batch)
    except Exception as error:
        raise NoGhostError(f"the batch cannot be copied ({type(error).__name__}: {error})") from error


def _trainer_of_ghosts(trainer: Any) -> Any:
    copied = copy.copy(trainer)
    vars(copied)["_loggers"] = [DummyLogger() for _ in trainer.loggers]
    return copied


def _disarm(module: Any) -> None:
    """Keep a LightningModule from logging, and its optimizers from stepping."""
    own = vars(module)
    own.update(dict.fromkeys(("log", "log_dict", "print", "clip_gradients"), _nothing))
    optimizers, schedulers = type(module).optimizers, type(module).lr_schedulers
    own["optimizers"] = lambda *args, **kwargs: _disarmed(optimizers(module, *args, **kwargs))
    own["lr_schedulers"] = lambda: _disarmed(schedulers(module))
    own["manual_backward"] = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)  # ``Backwards`` notes it


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of a method that must not run."""


def _disarmed(value: Any) -> Any:
    if isinstance(value, list):
        return [_disarmed(item) for item in value]
    return None if value is None else _Disarmed(value)


class _Disarmed:
    """An optimizer or a scheduler that steps nothing; all that can be read is that of the real one."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, *args: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        closure = next((arg for arg in args if callable(arg)), closure)
        return closure() if closure else None

    def __getattr__(self, name: str) -> Any:
        if name == "_real":
            raise AttributeError(name)
        return getattr(self._real, name)


class Backwards(TorchFunctionMode):
    """Notes the losses of a step's own backward passes, which run: the step may read gradients after them.

    Args:
        note: called with each loss before its backward pass, as a plain tensor.
    """

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._note = note

    @override
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            loss = plain(args[0])
            self._note(loss)
            return loss.backward(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def isolated(module: nn.Module) -> Iterator[Writes]:
    """Keep what runs inside, on a ghost of ``module``, from leaving a trace outside of the ghost.

    Parameters, their gradients and flags, and random numbers are as they were afterwards; nothing is printed, and
    ``breakpoint()`` does not stop. Tells which parameters were written into.
    """
    parameters = list(module.parameters())
    before = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    hook = sys.breakpointhook
    sys.breakpointhook = _nothing
    try:
        for parameter in parameters:
            parameter.grad = None
        with ExitStack() as stack:
            stack.enter_context(replayed(parameters))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if compiled_parts(module):
                stack.enter_context(eager())
            yield stack.enter_context(Writes(parameters))
    finally:
        sys.breakpointhook = hook
        for parameter, gradient, flag in before:
            parameter.grad = gradient
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def out_of_reach(module: nn.Module) -> Iterator[None]:
    """Refuse calls of the parts of ``module`` itself while its step runs on a ghost.

    Raises:
        NoGhostError: at such a call: the step has reached the module past the ghost.
    """
    names = {id(part): name or type(module).__name__ for name, part in module.named_modules()}

    def refuse(part: nn.Module, args: Any) -> None:
        if id(part) in names:
            raise NoGhostError(
                f"the training step calls {names[id(part)]!r} by a global name, or in another way that a copy of "
                f"{type(module).__name__} does not know of"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _copyable() -> Iterator[None]:
    """Let ``copy.deepcopy`` take results of computations, locks, files and generators as well."""
    original = Tensor.__deepcopy__

    def detached(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if tensor.is_leaf:
            return original(tensor, memo)  # type: ignore[no-untyped-call,no-any-return]
        memo[id(tensor)] = copied = tensor.detach().clone()
        return copied

    table = copyreg.dispatch_table
    replaced = {kind: table.get(kind) for kind in _REDUCERS}
    Tensor.__deepcopy__ = detached  # type: ignore[method-assign]
    table.update(_REDUCERS)
    try:
        yield
    finally:
        Tensor.__deepcopy__ = original  # type: ignore[method-assign]
        for kind, reducer in replaced.items():
            if reducer is None:
                del table[kind]
            else:
                table[kind] = reducer


def _shared(value: Any) -> str:
    return ""  # any text tells copy.deepcopy to take the object itself


def _file(value: Any) -> Any:
    text = isinstance(value, io.TextIOWrapper)
    if value.closed or value.writable():
        return (io.StringIO if text else io.BytesIO), ()
    return _reopened, (value.name, value.tell(), value.encoding if text else None)


class _Quiet(io.FileIO):
    """A file of a ghost. It is closed when the ghost is freed, without a warning."""

    def _dealloc_warn(self, source: Any) -> None:
        """Give no warning that the file was not closed."""

    def __del__(self) -> None:
        self.close()  # before FileIO would warn


def _reopened(name: str, position: int, encoding: str | None) -> Any:
    binary = io.BufferedReader(_Quiet(name))
    file = binary if encoding is None else io.TextIOWrapper(binary, encoding)
    file.seek(position)
    return file


def _generator(value: torch.Generator) -> Any:
    return _generator_at, (value.device, value.get_state())


def _generator_at(device: torch.device, state: Tensor) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


_REDUCERS: dict[Any, Any] = {
    type(threading.Lock()): _shared,
    type(threading.RLock()): _shared,
    type(sys): _shared,
    io.TextIOWrapper: _file,
    io.BufferedWriter: _file,
    io.BufferedReader: _file,
    torch.Generator: _generator,
}

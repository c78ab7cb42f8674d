"""The object that replaces ``training_step`` during a fit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_manifold_mixup._step.fit import Fit


class StandIn:
    """What stands in the place of ``training_step`` during a fit; for a batch that is not armed, the step itself."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        own = vars(fit.module)
        self._own: Any = own.get("training_step")  # Lightning puts a compiled step there
        self._original = self._inner = fit.module.training_step
        self._running = False
        # Lightning reads the signature at each step; this spares it from doing so by ``inspect``.
        self.__wrapped__ = _Signature(self._original)
        own["training_step"] = self

    def enter(self) -> None:
        """Take the place again if somebody else has put another step there since."""
        current = vars(self._fit.module).get("training_step")
        if current is not self:
            self._inner = self._fit.module.training_step
            vars(self._fit.module)["training_step"] = self

    def leave(self) -> None:
        """Give the place back."""
        own = vars(self._fit.module)
        if own.get("training_step") is self:
            if self._own is None:
                del own["training_step"]
            else:
                own["training_step"] = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._running:  # a wrapper around this one, or a step that calls itself: mixed already
            return self._original(*args, **kwargs)
        self._running = True
        try:
            if self._fit.step is None:
                return self._inner(*args, **kwargs)
            return self._fit.run(self._inner, args, kwargs)
        finally:
            self._running = False

    # A copy of the module gets its own training step back, uncompiled and not mixed.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        context = getattr(self._fit.module, "_compiler_ctx", None) or {}
        return copy.deepcopy(context.get("original_training_step", self._original), memo)

    def __reduce__(self) -> Any:
        return getattr, (self._fit.module, "training_step")


class _Signature:
    """Has the signature of a training step, found once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        unbound = getattr(inspect.unwrap(function), "__func__", inspect.unwrap(function))
        self.__signature__ = inspect.signature(unbound)
        self.__code__ = getattr(unbound, "__code__", None)  # by which Lightning tells what is overridden

    def __call__(self) -> None:
        """Do nothing: ``inspect`` asks for a callable."""

"""Dependencies that may be missing, imported where they are needed and not before.

``import lightning_manifold_mixup`` needs none of torchvision, scikit-learn, timm, matplotlib or rich. Code that needs
one of them calls ``require``, so that one place says how to install it.
"""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str = "") -> ModuleType:
    """Import a module that may not be installed.

    Args:
        module: the name to import, for example ``"torchvision.transforms.v2"``.
        extra: the extra of this package that installs it, ``"cli"`` or ``"all"``; without one, the module is a package
            of that name.

    Returns:
        The imported module.

    Raises:
        ModuleNotFoundError: if it is not installed; the message has the pip command. If the package is installed and
            cannot import one of its own dependencies, that error is passed on unchanged.

    Example:
        >>> require("math", "cli").sqrt(4.0)
        2.0
        >>> require("nowhere.sub", "cli")
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: `nowhere` is needed here and not installed: pip install "lightning-manifold-mixup[cli]"
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is installed but lacks a dependency of its own, which the message already names
        advice = f'"lightning-manifold-mixup[{extra}]"' if extra else package
        raise ModuleNotFoundError(
            f"`{package}` is needed here and not installed: pip install {advice}", name=package
        ) from None

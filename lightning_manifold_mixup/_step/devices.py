"""What devices cannot do.

Copies are left to themselves (``non_blocking``) on their way to CUDA alone. Apple's GPUs may read the memory when it
holds other things already (https://github.com/pytorch/pytorch/issues/83015), and the host before anything has come.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; the host does not wait for CUDA, and the copy has its memory until it is done."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)


def float64_device(device: torch.device) -> torch.device:
    """Where float64 tensors of a device go: there, or to the host, since Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on its device or on the host, with gradient."""
    return tensor.to(float64_device(tensor.device)).double()

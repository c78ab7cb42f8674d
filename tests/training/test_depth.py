"""How deep a batch goes: at most six frames of ours between ``training_step`` and the arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_manifold_mixup
from lightning_manifold_mixup import ManifoldMixupCallback
from tests.exactness import Module
from tests.helpers import trainer

ROOT = str(Path(lightning_manifold_mixup.__file__).parent)
BATCH = 3  # the first ones are observed and checked


class Frames(L.Callback):
    """Notes which of our functions run inside the training step of one batch, each with those that called it."""

    def __init__(self) -> None:
        self.chains: set[tuple[str, ...]] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == BATCH:
            sys.setprofile(self.note)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        sys.setprofile(None)

    def note(self, frame: FrameType | None, event: str, argument: Any) -> None:
        chain: list[str] = []
        while event == "call" and frame is not None:
            if frame.f_code.co_filename.startswith(ROOT):
                chain.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
                if chain[-1] == "stand_in.__call__":  # what Lightning calls as ``training_step``
                    self.chains |= {tuple(reversed(chain[:-1]))} - {()}
                    return
            frame = frame.f_back


@pytest.mark.parametrize("width", [16, 4096])  # small states have a shorter way
@pytest.mark.parametrize("layer", ["input", "model.1"])
def test_six_frames_lead_from_the_training_step_to_the_arithmetic(layer: str, width: int) -> None:
    frames = Frames()
    module = Module(F.cross_entropy)
    module.model = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))
    data = TensorDataset(torch.randn(5 * 16, 8), torch.randint(0, 3, (5 * 16,)))
    trainer(frames, ManifoldMixupCallback(layers=[layer])).fit(module, DataLoader(data, 16))
    called = {chain[-1] for chain in frames.chains}
    assert called & {"interpolation.differentiable", "interpolation.interpolate"}  # the arithmetic was reached
    assert "targets.hold" in called
    assert max(map(len, frames.chains)) <= 6, max(frames.chains, key=len)

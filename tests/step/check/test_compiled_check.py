"""A compiler that computes something else than the uncompiled step is found on the batches of the self-check."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from tests.exactness import Module, data
from tests.helpers import trainer, weights_of


def backend(change):
    """A compiler that changes the floating point outputs of its graphs in training."""

    def compiler(graph, inputs):
        def run(*args):
            return tuple(change(o) if o.is_floating_point() and o.requires_grad else o for o in graph(*args))

        return run

    return compiler


def fit(change):
    torch._dynamo.reset()
    module = Module(F.cross_entropy)
    module.model = torch.compile(module.model, backend=backend(change))
    before = weights_of(module)
    try:
        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(module, DataLoader(TensorDataset(*data()), 8))
    finally:
        changed = any(not torch.equal(value, before[name]) for name, value in weights_of(module).items())
    return changed


def test_right_ones_pass():
    assert fit(lambda output: output * (1 + 1e-7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output * 1.1, "compiled training step has the loss"),
        (lambda output: output.detach() + 0 * output, "has no gradient below the mixed layer"),
    ],
    ids=["value", "gradient"],
)
def test_wrong_ones_are_refused(change, message):
    with pytest.raises(MixingError, match=rf"{message}[\s\S]*No weight has changed"):
        fit(change)

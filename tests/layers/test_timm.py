"""Networks of timm's families, against a test of behaviour that knows nothing of graphs.

In eval mode samples do not meet. If the whole state is what a layer returns, then replacing it by that of other
samples, h by h[partners], gives their logits: logits[partners]. If some of the state goes around the layer, it
does not.
"""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_manifold_mixup.layers import LayerReport, LayerRow, eligible_layers, named_layers
from lightning_manifold_mixup.layers.cutpoints import Verdict

timm = pytest.importorskip("timm", reason="timm comes with the extra [all]")

# The lightest of each family, with a small image that it takes.
FAMILIES = {
    "resnet10t": 32,
    "regnetx_002": 32,
    "regnety_002": 32,
    "dla46_c": 32,
    "repvgg_a0": 32,
    "mobilenetv2_035": 32,
    "mobilenetv3_small_050": 32,
    "tinynet_e": 32,
    "ghostnet_050": 32,
    "lcnet_035": 32,
    "vit_tiny_patch16_224": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "mixer_s32_224": 32,
    "resmlp_12_224": 32,
    "gmlp_ti16_224": 32,
    "poolformer_s12": 32,
    "pit_ti_224": 32,
    "cait_xxs24_224": 32,
    "coat_lite_tiny": 32,
    "mobilevit_xxs": 32,
    "edgenext_xx_small": 32,
    "eva02_tiny_patch14_224": 28,
}
SLOW_FAMILIES = {
    "resnet26d": 32,
    "resnetv2_18": 32,
    "legacy_seresnet18": 32,
    "skresnet18": 32,
    "vgg11": 32,
    "rexnet_100": 32,
    "convnext_atto": 32,
    "convnextv2_atto": 32,
    "swin_s3_tiny_224": 56,
    "crossvit_tiny_240": 240,
    "levit_128s": 224,
    "xcit_nano_12_p16_224": 32,
    "hrnet_w18_small": 32,
    "cspdarknet53": 32,
    "focalnet_tiny_srf": 32,
    "fastvit_t8": 64,
    "davit_tiny": 32,
    "res2net50_26w_4s": 32,
    "dpn48b": 32,
}
# Those that have to be told the size of the image, besides all that are made of patches.
SIZED = {
    "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "pit_ti_224", "cait_xxs24_224", "coat_lite_tiny",
    "xcit_nano_12_p16_224", "swin_s3_tiny_224",
}  # fmt: skip
# ResNets of all kinds (deep stems, pre-activation, squeeze and excitation): the paper's S.
DEFAULTS = {
    "resnet10t": ["input", "layer1", "layer2"],
    "resnet26d": ["input", "layer1", "layer2"],
    "legacy_seresnet18": ["input", "layer1", "layer2"],
    "skresnet18": ["input", "layer1", "layer2"],
    "resnetv2_18": ["input", "stages.0", "stages.1"],
}
BATCH = 5
SAMPLED = 8


def bring_to_life(network: nn.Module, x: torch.Tensor) -> None:
    """Give zero-initialised heads and residual scales a value: a branch that does nothing would hide that it bypasses.

    Then let batch normalisation see a batch, or the signal would fade before it reaches the logits.
    """
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() > 1 and parameter.std() < 1e-3:
                noise = torch.rand_like(parameter) + 0.5 if parameter.ndim == 1 else torch.randn_like(parameter) * 0.2
                parameter.copy_(noise)
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        network(x)
        network.eval()


def swapped_logits(network: nn.Module, x: torch.Tensor, row: LayerRow, partners: torch.Tensor) -> torch.Tensor:
    """Run the network with the rows of one layer's output exchanged."""
    dims = dict(zip(row.shapes, row.batch_dims, strict=True))

    def swap(tensor):
        if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
            return tensor
        dim = dims.get(tuple(tensor.shape), 0)
        return tensor if dim is None else tensor.index_select(dim, partners)

    hook = named_layers(network)[row.name].register_forward_hook(lambda _, args, output: tree_map(swap, output))
    try:
        return network(x)
    finally:
        hook.remove()


def sample(report: LayerReport, eligible: bool) -> list[LayerRow]:
    """Some layers from all over the network, one of each group that returns the same tensor."""
    verdicts = (Verdict.ELIGIBLE,) if eligible else (Verdict.BYPASSED,)
    groups = {row.group: row for row in reversed(report.rows) if row.verdict in verdicts and row.name != "input"}
    rows = sorted(groups.values(), key=lambda row: row.order)
    rows = [row for row in rows if any(dim is not None for dim in row.batch_dims)]
    return rows[:: max(1, len(rows) // SAMPLED)]


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)])
def test_swapping_samples_at_a_layer_swaps_the_logits_exactly_if_it_is_eligible(name):
    torch.manual_seed(0)
    size = {**FAMILIES, **SLOW_FAMILIES}[name]
    options = {"img_size": size} if "patch" in name or name in SIZED else {}
    network = timm.create_model(name, pretrained=False, num_classes=4, **options).double()
    x = torch.randn(BATCH, 3, size, size, dtype=torch.double)
    bring_to_life(network, x)
    report = eligible_layers(network, x)
    partners = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        logits = network(x)
        scale = (logits - logits.mean(0)).std()  # of what tells samples apart
        error = {
            row.name: (swapped_logits(network, x, row, partners) - logits[partners]).abs().max() / scale
            for row in (*sample(report, eligible=True), *sample(report, eligible=False))
        }
    assert len(report.default) > 1
    assert report.default == DEFAULTS.get(name, report.default)
    assert {row: error for row, error in error.items() if report.row(row).eligible and error > 1e-8} == {}
    assert {row: error for row, error in error.items() if not report.row(row).eligible and error < 1e-6} == {}

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup.cli.training import ManifoldMixupCLI
from lightning_manifold_mixup.layers import eligible_layers
from lightning_manifold_mixup.paper.models import (
    MLP,
    BottleneckMLP,
    ConvNet,
    GaussianNoise,
    PreActResNet,
    WideResNet,
)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


class TestPreActResNet:
    @pytest.mark.parametrize(
        ("depth", "published"),
        [(18, 11.17), (34, 21.28)],
    )
    def test_parameter_counts_are_the_published_ones(self, depth, published):
        assert parameters(on_meta(PreActResNet, depth, num_classes=10)) / 1e6 == pytest.approx(published, abs=0.005)

    @pytest.mark.parametrize(
        ("depth", "blocks"),
        [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))],
    )
    def test_parameter_counts_follow_the_architecture(self, depth, blocks):
        c, classes, channels = 8, 7, 5
        total = channels * c * 9
        into = c
        for stage, count in enumerate(blocks):
            out = c * 2**stage
            for block in range(count):
                total += 2 * into + 9 * into * out + 2 * out + 9 * out**2
                if block == 0 and stage > 0:
                    total += into * out
                into = out
        total += out * classes + classes
        model = PreActResNet(depth, num_classes=classes, initial_channels=c, in_channels=channels)
        assert parameters(model) == total

    @pytest.mark.parametrize("depth", [18, 34])
    def test_forward_is_the_formula(self, depth):
        """Against the network written out with functions, on the same weights."""
        model = PreActResNet(depth, num_classes=10, initial_channels=4).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        w = dict(model.named_parameters())

        def pre(h, name):
            mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
            scaled = (h - mean) / (var + 1e-5).sqrt()
            return (scaled * w[f"{name}.weight"].view(1, -1, 1, 1) + w[f"{name}.bias"].view(1, -1, 1, 1)).clamp(min=0)

        x = torch.randn(4, 3, 32, 32)
        h = F.conv2d(x, w["conv1.weight"], padding=1)
        for stage, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
            for block, _ in enumerate(getattr(model, f"layer{stage}")):
                name = f"layer{stage}.{block}"
                s = stride if block == 0 else 1
                a = pre(h, f"{name}.bn1")
                shortcut = h
                if f"{name}.shortcut.weight" in w:
                    shortcut = F.conv2d(a, w[f"{name}.shortcut.weight"], stride=s)
                a = F.conv2d(a, w[f"{name}.conv1.weight"], stride=s, padding=1)
                a = F.conv2d(pre(a, f"{name}.bn2"), w[f"{name}.conv2.weight"], padding=1)
                h = a + shortcut
        assert h.shape[2:] == (4, 4)
        expected = F.linear(F.avg_pool2d(h, 4).flatten(1), w["linear.weight"], w["linear.bias"])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("size", "stride", "channels"), [(8, 1, 1), (32, 1, 3), (64, 2, 3)])
    def test_sizes(self, size, stride, channels):
        model = PreActResNet(18, num_classes=6, initial_channels=4, in_channels=channels, stride=stride)
        shapes = []
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 6)
        side = size // stride
        assert shapes == [
            (4, side, side),
            (8, side // 2, side // 2),
            (16, side // 4, side // 4),
            (32, side // 8, side // 8),
        ]

    def test_unknown_depth(self):
        with pytest.raises(ValueError, match=r"expected a depth among \[18, 34\], got 20"):
            PreActResNet(20)


class TestWideResNet:
    @pytest.mark.parametrize(
        ("depth", "factor", "published"), [(28, 10, 36.5), (28, 2, 1.5), (40, 4, 8.9), (16, 8, 11.0), (40, 2, 2.2)]
    )
    def test_parameter_counts_are_the_published_ones(self, depth, factor, published):
        """Zagoruyko and Komodakis 2016, table 4 and 5, to the digit they print."""
        assert parameters(on_meta(WideResNet, depth, factor)) / 1e6 == pytest.approx(published, abs=0.05)

    def test_28_2(self):
        assert parameters(on_meta(WideResNet, 28, 2)) == 1_467_610  # 1.47 M in the semi-supervised literature

    def test_forward_is_the_formula(self):
        model = WideResNet(16, 2, num_classes=10).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.bias)
        w = model.state_dict()

        def pre(h, name):
            values = [w[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
            return F.relu(F.batch_norm(h, *values))

        x = torch.randn(2, 3, 16, 16)
        h = F.conv2d(x, w["conv1.weight"], padding=1)
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            for block in range(2):
                name, s = f"layer{stage}.{block}", stride if block == 0 else 1
                a = pre(h, f"{name}.bn1")
                shortcut = F.conv2d(a, w[f"{name}.shortcut.weight"], stride=s) if block == 0 else h
                a = F.conv2d(a, w[f"{name}.conv1.weight"], stride=s, padding=1)
                h = shortcut + F.conv2d(pre(a, f"{name}.bn2"), w[f"{name}.conv2.weight"], padding=1)
        expected = F.linear(pre(h, "bn").mean((2, 3)), w["linear.weight"], w["linear.bias"])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)

    def test_dropout_is_between_the_convolutions(self):
        model = WideResNet(10, 1, dropout=0.3)
        rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
        assert rates == [0.3] * 3
        x = torch.randn(2, 3, 8, 8)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))

    def test_stride(self):
        model = WideResNet(10, 1, stride=2)
        assert model.layer1(model.conv1(torch.zeros(1, 3, 64, 64))).shape == (1, 16, 32, 32)

    def test_unknown_depth(self):
        with pytest.raises(ValueError, match=r"6 b \+ 4 .* got 27"):
            WideResNet(27, 10)


class TestConvNet:
    def test_forward_is_the_formula(self):
        model = ConvNet(num_classes=3, in_channels=2, widths=(4, 6, 5), hidden=7).eval()
        state = model.state_dict()
        x = torch.randn(2, 2, 16, 16)
        h = x
        for i in (1, 2, 3):
            h = F.conv2d(h, state[f"layer{i}.0.weight"], padding=1)
            h = F.relu(h / (1 + 1e-5) ** 0.5)  # of fresh running statistics, 0 and 1
            h = h if i == 1 else F.max_pool2d(h, 2)
        h = h.view(2, 5, 2, 2, 2, 2).mean((3, 5))  # 4x4 positions, averaged two by two
        h = F.relu(F.linear(h.flatten(1), state["hidden.2.weight"], state["hidden.2.bias"]))
        torch.testing.assert_close(model(x), F.linear(h, state["linear.weight"], state["linear.bias"]))

    @pytest.mark.parametrize("side", [4, 8, 28, 32])
    def test_takes_images_of_any_size(self, side):
        assert ConvNet(num_classes=7)(torch.zeros(2, 3, side, side)).shape == (2, 7)

    def test_its_layers_are_eligible(self):
        report = eligible_layers(ConvNet(in_channels=1), torch.randn(4, 1, 8, 8))
        assert not any(report.refusal(name) for name in ("input", "layer1", "layer2", "layer3", "hidden"))


class TestMLP:
    def test_is_the_plain_sequence(self):
        model = MLP(64, 10, widths=[32, 16])
        x = torch.randn(5, 1, 8, 8)
        w = model.state_dict()
        h = x.view(5, 64)
        for name in ("layer1.0", "layer2.0"):
            h = h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            h = torch.where(h > 0, h, 0.01 * h)
        torch.testing.assert_close(model(x), h @ w["linear.weight"].T + w["linear.bias"])

    def test_options(self):
        model = MLP(4, 2, widths=[8, 8], activation="tanh", dropout=0.5, batch_norm=True, noise=0.1)
        for name in ("layer1", "layer2"):
            kinds = [type(module) for module in getattr(model, name)]
            assert kinds == [nn.Linear, nn.BatchNorm1d, nn.Tanh, nn.Dropout, GaussianNoise]
        assert model.layer1[3].p == 0.5
        assert model.layer1[4].std == 0.1

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match=r"expected an activation among .*leaky_relu.* got 'leakyrelu'"):
            MLP(activation="leakyrelu")

    def test_noise(self):
        noise = GaussianNoise(0.5)
        x = torch.zeros(20_000)
        assert noise(x).std() == pytest.approx(0.5, rel=0.03)
        assert torch.equal(noise.eval()(x), x)

    def test_bottleneck_is_linear_and_where_it_is_said(self):
        """The default is the net of Figure 1: nine layers, two dimensions in the fifth."""
        model = BottleneckMLP()
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        assert len(linear) == 9
        assert linear[4] is model.bottleneck[0]
        assert linear[4].out_features == 2
        assert len(model.bottleneck) == 1

    def test_bottleneck_state_is_what_the_rest_sees(self):
        model = BottleneckMLP(64, 10, before=[16] * 3, bottleneck=12, after=[16] * 4, bottleneck_norm=True)
        names = [name for name, _ in model.named_children()]
        assert names == [
            *["layer1", "layer2", "layer3", "bottleneck", "layer4", "layer5", "layer6", "layer7", "linear"]
        ]
        assert isinstance(model.bottleneck[1], nn.BatchNorm1d)
        x = torch.randn(6, 64)
        model.bottleneck.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        assert torch.equal(model(x), model(x.flip(0) * 3))
        assert model.bottleneck(torch.randn(6, 16)).shape == (6, 12)


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (
            {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 6}},
            ["input", "model.layer1", "model.layer2"],
        ),
        (
            {
                "class_path": "torchvision.models.get_model",
                "init_args": {"name": "shufflenet_v2_x0_5"},
                "dict_kwargs": {"num_classes": 6},
            },
            ["input", "model.stage2", "model.stage3"],
        ),
        (
            {
                "class_path": "timm.create_model",
                "init_args": {"model_name": "resnet10t"},
                "dict_kwargs": {"num_classes": 6},
            },
            ["input", "model.layer1", "model.layer2"],
        ),
    ],
)
def test_a_network_by_name_from_yaml_is_trained_with_manifold_mixup(tmp_path, network, layers):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    model = {
        "class_path": "lightning_manifold_mixup.ManifoldMixupModule",
        "init_args": {"model": network, "num_classes": 6},
    }
    trainer = {"fast_dev_run": True, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    file = tmp_path / "mine.yaml"
    data = {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}  # the CLI wants one
    file.write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": data}))
    made = ManifoldMixupCLI(["--config", str(file)], run=False)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 6
    made.trainer.fit(made.model, DataLoader(TensorDataset(images, labels), batch_size=8))
    (callback,) = (c for c in made.trainer.callbacks if isinstance(c, ManifoldMixupCallback))
    chosen = list(callback.state_dict()["layers"])
    assert chosen == layers

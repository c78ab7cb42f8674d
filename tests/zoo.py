"""Networks whose cut points were judged by hand, by reading their source: the truth that `test_layers_*.py` compares
with.

`NETWORKS` are whole families, `MICRO_CASES` each isolate one way in which a state can go around a layer or seem to. The
names listed are all cut points, the final output included.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision.models as vision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BATCH = 3


# ---------------------------------------------------------------------------------------------- networks


class PreActBlock(nn.Module):
    """A block whose shortcut convolution also reads the first activation: where it has one, `bn1` is a cut point."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += skip
        return out


class WideBlock(nn.Module):
    """A block with ReLU in place and a shortcut that is a module even where it does nothing."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = width_in == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(out))))
        return out + self.shortcut(x)


class ResidualNet(nn.Module):
    """Stages of two blocks each, named `<stage>1`, `<stage>2`, ..."""

    def __init__(self, block: type[nn.Module], stage: str, stages: int, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.stages = [f"{stage}{index + 1}" for index in range(stages)]
        before = width
        for index, name in enumerate(self.stages):
            after = width * 2**index
            self.add_module(name, nn.Sequential(block(before, after, 2 if index else 1), block(after, after, 1)))
            before = after
        self.bn = nn.BatchNorm2d(before)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


def double_conv(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, 1, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
    )


class UNet(nn.Module):
    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = double_conv(3, width), double_conv(width, 2 * width), double_conv(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.dec2, self.dec1 = double_conv(32, 16), double_conv(16, 8)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enc1(x)
        middle = self.enc2(self.pool(fine))
        coarse = self.enc3(self.pool(middle))
        middle = self.dec2(torch.cat([self.up2(coarse), middle], 1))
        return self.out(self.dec1(torch.cat([self.up1(middle), fine], 1)))


class LSTMClassifier(nn.Module):
    """Reads either the output at the last step or the last hidden state."""

    def __init__(self, batch_first: bool = True, last_hidden: bool = False, layers: int = 1) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, layers, batch_first=batch_first)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(24, 4)
        self.last_hidden = last_hidden

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.emb(ids)
        output, (hidden, _) = self.lstm(embedded if self.lstm.batch_first else embedded.transpose(0, 1))
        if self.last_hidden:
            return self.fc(self.drop(hidden[-1]))
        return self.fc(self.drop(output[:, -1] if self.lstm.batch_first else output[-1]))


class TransformerClassifier(nn.Module):
    """Positions are a parameter, or come from a second look-up; the padding mask comes from the ids."""

    def __init__(
        self, batch_first: bool = True, layers: int = 4, padding: bool = False, position_module: bool = False
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        if position_module:
            self.positions = nn.Embedding(20, 16)
        else:
            self.position = nn.Parameter(torch.randn(20, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 4)
        self.batch_first, self.padding, self.position_module = batch_first, padding, position_module

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        position = self.positions(torch.arange(length)) if self.position_module else self.position[:length]
        h = self.emb(ids) + position
        mask = ids == 0 if self.padding else None
        h = self.encoder(h if self.batch_first else h.transpose(0, 1), src_key_padding_mask=mask)
        return self.fc(h.mean(1 if self.batch_first else 0))


class Bert(nn.Module):
    """The module tree of BERT, with three look-ups that come together inside of `embeddings`."""

    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.position, self.kind = nn.Embedding(50, 16), nn.Embedding(20, 16), nn.Embedding(2, 16)
            self.norm, self.dropout = nn.LayerNorm(16), nn.Dropout(0.1)

        def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
            positions = torch.arange(ids.shape[1])
            return self.dropout(self.norm(self.word(ids) + self.position(positions) + self.kind(kinds)))

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = self.Embeddings(), nn.Module()
        self.encoder.layer = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))
        self.pooler = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.classifier = nn.Linear(16, 4)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        h = self.embeddings(ids, kinds)
        for layer in self.encoder.layer:
            h = layer(h)
        return self.classifier(self.pooler(h[:, 0]))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ReLU(True),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.ReLU(True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.table = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.fuse = nn.Sequential(nn.Linear(16, 32), nn.ReLU(True), nn.Linear(32, 32), nn.ReLU(True))
        self.fuse2 = nn.Sequential(nn.Linear(32, 32), nn.ReLU(True), nn.Linear(32, 32), nn.ReLU(True))
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(self.fuse2(self.fuse(torch.cat([self.image(image), self.table(table)], 1))))


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(20, 32), nn.ReLU())
        self.block = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.norm = nn.LayerNorm(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.fc(self.norm(x))


def mlp() -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (20, 32, 32):
        layers += [nn.Linear(width, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 5))


def mlp_of_blocks() -> nn.Sequential:
    blocks = [
        (f"l{index}", nn.Sequential(nn.Linear(width, 32), nn.BatchNorm1d(32), nn.ReLU(True)))
        for index, width in ((1, 20), (2, 32))
    ]
    return nn.Sequential(OrderedDict([("net", nn.Sequential(OrderedDict(blocks))), ("head", nn.Linear(32, 5))]))


class CausalBlock(nn.Module):
    """A block of a GPT: pre-normalised, with a causal mask from a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.register_buffer("mask", torch.ones(32, 32).tril())

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn(self.ln_1(x)).chunk(3, -1)
        length = x.shape[1]
        scores = (query @ key.transpose(1, 2)).masked_fill(self.mask[:length, :length] == 0, float("-inf"))
        x = x + self.proj(scores.softmax(-1) @ value)
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """Its embedding and its head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(50, 16), nn.Embedding(32, 16), nn.Dropout(0.1)
        self.h = nn.ModuleList(CausalBlock() for _ in range(4))
        self.ln_f, self.lm_head = nn.LayerNorm(16), nn.Linear(16, 50, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class FourierNet(nn.Module):
    """FNet, with its residual sums outside of modules: the whole state is only what normalisations return."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for mix, mlp, norm in zip(self.mix, self.mlps, self.norms, strict=True):
            x = mix(x + torch.fft.fft2(x).real)
            x = norm(x + mlp(x))
        return self.fc(x.mean(1))


class PackedLSTM(nn.Module):
    """A packed sequence has no batch dimension; the last states of both directions have."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lstm = nn.Embedding(50, 16), nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True)
        self.hidden, self.fc = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.emb(ids), lengths, batch_first=True, enforce_sorted=False)
        _, (states, _) = self.lstm(packed)
        return self.fc(F.relu(self.hidden(torch.cat([states[-2], states[-1]], 1))))


class MixtureOfExperts(nn.Module):
    """Rows are routed to experts by indices, and their results are added up by indices."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(20, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.after, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.inp(x))
        values, chosen = self.gate(h).softmax(1).topk(2, 1)
        out = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            rows, ranks = torch.where(chosen == index)
            out.index_add_(0, rows, expert(h[rows]) * values[rows, ranks, None])
        return self.fc(F.relu(self.after(out)))


def images(size: int = 64) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(BATCH, 3, size, size),)


def features(size: int = 20) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(BATCH, size),)


def token_ids(length: int = 7, tokens: int = 50) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(1, tokens, (BATCH, length)),)


@dataclass(frozen=True)
class Network:
    """A network, an example input, its cut points, and the default S.

    `cut_points` is a pattern for the names of layers called once, or a function from the network and such a name to the
    truth.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    cut_points: str | Callable[[nn.Module, str], bool]
    default: tuple[str, ...]

    def is_cut_point(self, network: nn.Module, name: str) -> bool:
        if isinstance(self.cut_points, str):
            return re.fullmatch(self.cut_points, name) is not None
        return self.cut_points(network, name)


def outside_of_residual_branches(network: nn.Module, name: str) -> bool:
    """The truth for torchvision's networks of inverted residuals: a chain of blocks, some of which skip."""
    parts = name.split(".")
    around = [network.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    skipped = any(getattr(module, "use_res_connect", False) for module in around)
    return not skipped and not any(type(module).__name__ == "SqueezeExcitation" for module in around)


def numbered(prefix: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{number}" for number in numbers)


RESNET = r"conv1|bn1|relu|maxpool|layer\d(\.\d+)?|avgpool|fc"
ENCODER = r"emb|encoder|encoder\.layers\.\d|encoder\.layers\.\d\.norm[12]|fc"
FIRST_TWO_STAGES = ("input", "layer1", "layer2")

NETWORKS: dict[str, Network] = {
    "resnet18": Network(lambda: vision.resnet18(num_classes=10), images(), RESNET, FIRST_TWO_STAGES),
    "resnet50": Network(lambda: vision.resnet50(num_classes=10), images(), RESNET, FIRST_TWO_STAGES),
    "wide_resnet50_2": Network(lambda: vision.wide_resnet50_2(num_classes=10), images(), RESNET, FIRST_TWO_STAGES),
    "resnext50": Network(lambda: vision.resnext50_32x4d(num_classes=10), images(), RESNET, FIRST_TWO_STAGES),
    "preact_resnet": Network(
        lambda: ResidualNet(PreActBlock, "layer", 4),
        images(32),
        r"conv1|layer\d(\.\d+)?|layer[234]\.0\.bn1|bn|fc",
        FIRST_TWO_STAGES,
    ),
    "wide_resnet_identity": Network(
        lambda: ResidualNet(WideBlock, "block", 3),
        images(32),
        r"conv1|block\d(\.\d+)?|bn|fc",
        ("input", "block1", "block2"),
    ),
    "densenet121": Network(
        lambda: vision.densenet121(num_classes=10),
        images(),
        r"features(\.(conv0|norm0|relu0|pool0|denseblock\d|transition\d(\.\w+)?|norm5))?|classifier",
        ("input", "features.denseblock1", "features.denseblock2"),
    ),
    "vgg11_bn": Network(
        lambda: vision.vgg11_bn(num_classes=10),
        images(),
        r"features(\.\d+)?|avgpool|classifier(\.\d)?",
        ("input", *numbered("features.", 3, 7, 10, 14, 17)),
    ),
    "mobilenet_v3_small": Network(
        lambda: vision.mobilenet_v3_small(num_classes=10),
        images(),
        outside_of_residual_branches,
        ("input", *numbered("features.", 1, 2, 3, 4, 5, 6)),
    ),
    "efficientnet_b0": Network(
        lambda: vision.efficientnet_b0(num_classes=10),
        images(),
        # The chain ends in `stochastic_depth`, which is called only where the block skips.
        outside_of_residual_branches,
        ("input", *numbered("features.", 1, 2, 3, 4)),
    ),
    "convnext_tiny": Network(
        lambda: vision.convnext_tiny(num_classes=10),
        images(),
        r"features(\.\d(\.\d)?)?|avgpool|classifier(\.\d)?",
        ("input", "features.1", "features.3"),
    ),
    "vit_b_16": Network(
        lambda: vision.vit_b_16(num_classes=10, image_size=64),
        images(),
        r"conv_proj|encoder|encoder\.(dropout|ln|layers|layers\.encoder_layer_\d+)|heads|heads\.head",
        ("input", *numbered("encoder.layers.encoder_layer_", 0, 1, 2, 3, 4, 5)),
    ),
    "swin_t": Network(
        lambda: vision.swin_t(num_classes=10),
        images(),
        r"features|features\.\d|features\.[0246]\.\w+|features\.[1357]\.\d|norm|permute|avgpool|flatten|head",
        ("input", "features.1", "features.3"),
    ),
    "googlenet": Network(
        lambda: vision.googlenet(num_classes=10, aux_logits=False, init_weights=False),
        images(),
        r"(conv\d|conv\d\.\w+)|maxpool\d|inception\d\w|avgpool|dropout|fc",
        ("input", "inception3a", "inception3b", "inception4a", "inception4b", "inception4c"),
    ),
    "unet": Network(UNet, images(32), r"enc1(\.\d)?|dec1(\.\d)?|out", ("input", "enc1")),
    "lstm": Network(LSTMClassifier, token_ids(), r"emb|lstm|drop|fc", ("emb", "drop")),
    "lstm_time_major": Network(
        lambda: LSTMClassifier(False, True, 2), token_ids(), r"emb|lstm|drop|fc", ("emb", "drop")
    ),
    "transformer": Network(
        TransformerClassifier, token_ids(), ENCODER, ("emb", "encoder.layers.0", "encoder.layers.1")
    ),
    "transformer_time_major": Network(
        lambda: TransformerClassifier(False), token_ids(), ENCODER, ("emb", "encoder.layers.0", "encoder.layers.1")
    ),
    "bert": Network(
        Bert,
        lambda: (torch.randint(1, 50, (BATCH, 7)), torch.randint(2, (BATCH, 7))),
        r"embeddings|embeddings\.(norm|dropout)|encoder\.layer\.\d(\.norm[12])?|pooler(\.\d)?|classifier",
        ("embeddings", "encoder.layer.0", "encoder.layer.1"),
    ),
    "r3d_18": Network(
        lambda: vision.video.r3d_18(num_classes=10),
        lambda: (torch.randn(BATCH, 3, 4, 32, 32),),
        r"stem(\.\d)?|layer\d(\.\d+(\.relu)?)?|avgpool|fc",
        FIRST_TWO_STAGES,
    ),
    "fcn_resnet50": Network(
        lambda: vision.segmentation.fcn_resnet50(weights_backbone=None, num_classes=4),
        images(32),
        r"backbone|backbone\.(conv1|bn1|relu|maxpool|layer\d(\.\d+)?)|classifier(\.\d)?",
        ("input", "backbone.layer1", "backbone.layer2"),
    ),
    "gpt": Network(Gpt, token_ids(), r"wte|drop|h\.\d|ln_f|lm_head", ("wte", "h.0", "h.1")),
    "fourier_net": Network(
        FourierNet,
        lambda: (torch.randn(BATCH, 6, 8),),
        r"(mix|norms)\.\d|fc",
        ("input", "mix.1", "mix.2"),
    ),
    "packed_lstm": Network(
        PackedLSTM,
        lambda: (torch.randint(1, 50, (BATCH, 7)), torch.tensor([4, 7, 2])),
        r"emb|hidden|fc",
        ("emb", "hidden"),
    ),
    "mixture_of_experts": Network(MixtureOfExperts, features(), r"inp|after|fc", ("input", "inp")),
    "mlp_of_blocks": Network(mlp_of_blocks, features(), r"net(\..*)?|head", ("input", "net.l1")),
    "mlp": Network(mlp, features(), r"\d", ("input", "1", "3")),
    "two_inputs": Network(
        TwoInputs,
        lambda: (torch.randn(BATCH, 3, 32, 32), torch.randn(BATCH, 6)),
        r"fuse2?(\.\d)?|head",
        ("input", "fuse"),
    ),
    "shared_block": Network(SharedBlock, features(), r"stem(\.\d)?|norm|fc", ("input", "stem")),
}
"""Small first; those that take seconds are marked slow where they are used."""


# ------------------------------------------------------------------------------------------- micro-cases


def square() -> nn.Linear:
    return nn.Linear(8, 8)


class Case(nn.Module):
    """Four layers of eight features to play with. `cut_points` is the truth."""

    cut_points: frozenset[str] = frozenset()
    inputs = staticmethod(features(8))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = square(), square(), square(), square()


MICRO_CASES: list[type[Case]] = []


def micro_case(*cut_points: str, inputs: Callable[[], tuple[Tensor, ...]] | None = None):  # type: ignore[no-untyped-def]
    def register(case: type[Case]) -> type[Case]:
        case.cut_points = frozenset(cut_points)
        if inputs is not None:
            case.inputs = staticmethod(inputs)
        MICRO_CASES.append(case)
        return case

    return register


@micro_case("a", "fc")
class EmptySequentialShortcut(Case):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(F.relu(self.b(x)) + self.shortcut(x))


@micro_case("a", "fc")
class DropoutInABranch(Case):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(x + self.b(self.drop(x)))


@micro_case("a", "b", "fc")
class InPlaceResultIgnored(Case):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.act(h)
        return self.fc(self.b(h))


@micro_case("a", "b", "flat", "act", "fc")
class InPlaceOnAView(Case):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.act = nn.Flatten(), nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.flat(self.a(x).view(-1, 2, 4)))
        return self.fc(self.b(h))


@micro_case("a", "fc")
class BaseChangedThroughAView(Case):
    """A ReLU in place on a view changes what the view was taken of; its result is used, and the base as well."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.act = nn.Flatten(), nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(-1, 2, 4) * 1
        flat = self.act(self.flat(h))
        return self.fc(self.b(flat) + h.view(-1, 8))


@micro_case("fc")
class InputWrittenIntoASlice(Case):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        h[:, :4] += x[:, :4]
        return self.fc(h)


@micro_case("a", "fc")
class DetachedSkip(Case):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.fc(F.relu(self.b(h)) + h.detach())


@micro_case("fc")
class NoGradBranch(Case):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = self.a(x)
        return self.fc(self.b(x) + frozen)


@micro_case("b", "fc")
class NoGradTrunk(Case):
    """Everything runs through `a`, but nothing is trained there: it is refused for that."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
        return self.fc(F.relu(self.b(h)))


@micro_case("a", "b", "fc")
class FrozenTrunk(Case):
    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)
        self.b.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))))


@micro_case("p", "b", "fc", inputs=token_ids(tokens=20))
class OneHot(Case):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(20, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.p(F.one_hot(ids, 20).float()).mean(1))))


@micro_case("b", "fc", inputs=token_ids(tokens=20))
class IndexedParameter(Case):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.table[ids].mean(1))))


class ThroughNumpy(torch.autograd.Function):
    """Stands for any kernel that PyTorch cannot look into."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * 2


@micro_case("a", "b", "fc")
class ForeignKernel(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(ThroughNumpy.apply(self.a(x)))))


@micro_case("a", "b", "fc")
class ForeignKernelBeforeAFunction(Case):
    """No layer between the kernel and the sum: only autograd knows what went in."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(ThroughNumpy.apply(self.b(self.a(x)) * 2) + 1))


@micro_case("a", "fc")
class ForeignKernelInABranch(Case):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.fc(h + self.b(ThroughNumpy.apply(h)))


@micro_case("a", "fc")
class ForeignKernelAsSkip(Case):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.fc(ThroughNumpy.apply(h) + self.b(h))


@micro_case("a", "c", "fc", "block", "block.0", "block.1", "block.2")
class Checkpointed(Case):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(square(), nn.ReLU(), square())

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.block, self.a(x), use_reentrant=self.reentrant)
        return self.fc(F.relu(self.c(h)))


@micro_case("a", "c", "fc", "block", "block.0", "block.1", "block.2")
class CheckpointedReentrant(Checkpointed):
    reentrant = True


@dataclass
class Record:
    h: Tensor


class Returning(nn.Module):
    """Returns its state in some structure, with a part of it beside."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.wrap = square(), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.linear(x))


@micro_case("tuple", "tuple.linear", "dict", "dict.linear", "record.linear", "fc")
class StructuredOutputs(Case):
    """What a hook cannot replace (a dataclass) is refused, although everything runs through it."""

    def __init__(self) -> None:
        super().__init__()
        self.tuple = Returning(lambda h: (h, h.mean(-1), torch.arange(3)))
        self.dict = Returning(lambda h: OrderedDict(h=h, n=3))
        self.record = Returning(Record)

    def forward(self, x: Tensor) -> Tensor:
        h, mean, _ = self.tuple(x)
        h = self.dict(h + mean[:, None])["h"]
        return self.fc(self.record(h).h)


@micro_case("tuple", "tuple.linear", "fc")
class StateOfTwoTensors(Case):
    """Only the tuple as a whole is the state."""

    def __init__(self) -> None:
        super().__init__()
        self.tuple = Returning(lambda h: (h, h.mean(-1)))

    def forward(self, x: Tensor) -> Tensor:
        h, mean = self.tuple(x)
        return self.fc(F.relu(self.b(h)) + mean[:, None])


@micro_case("a", "fc")
class KeptInside(Case):
    """What a layer keeps for itself is not replaced by what a hook makes of its result."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = square()

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.linear(x) * 1
            return self.kept

    def __init__(self) -> None:
        super().__init__()
        self.keeping = self.Keeping()

    def forward(self, x: Tensor) -> Tensor:
        h = self.keeping(self.a(x))
        return self.fc(self.b(h) + self.keeping.kept)


KeptInside.cut_points = frozenset({"a", "keeping.linear", "fc"})


@micro_case("fuse", "fc", "enc", "enc.0", "enc.1")
class Siamese(Case):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(square(), nn.ReLU())
        self.fuse = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.fuse(torch.cat([self.enc(x), self.enc(x * 2)], 1))))


@micro_case("a", "b")
class AuxiliaryHead(Case):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(F.relu(self.c(h))), F.linear(h, self.fc.weight)


@micro_case("a", "b", "fc")
class ControlFlow(Case):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.fc(F.relu(self.b(h) if h.sum() > -1e9 else self.c(h)))


@micro_case("a", "fc")
class ZeroBranch(Case):
    """To a test by behaviour alone the projection would seem a cut point."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.fc(self.b(h) + self.c(h))


@micro_case("a", "fc")
class ZeroHead(Case):
    """To a test by behaviour alone every layer would seem a cut point."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.fc(h + self.b(h))


TRANSFORMER_CUTS = ("m", "m.emb", "m.encoder", "m.fc", *numbered("m.encoder.layers.", 0, 1))
TRANSFORMER_CUTS += tuple(f"{layer}.norm{index}" for layer in TRANSFORMER_CUTS[4:] for index in (1, 2))


@micro_case(*TRANSFORMER_CUTS, inputs=token_ids(tokens=20))
class PositionModule(Case):
    """Positions are looked up too, but they do not come from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.m = TransformerClassifier(layers=2, position_module=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.m(ids)


@micro_case(*TRANSFORMER_CUTS, inputs=token_ids(length=BATCH, tokens=20))
class PositionModuleOfBatchSize(PositionModule):
    pass


@micro_case(*TRANSFORMER_CUTS, inputs=token_ids(tokens=20))
class PaddingMask(Case):
    """A mask made from the ids goes to every layer, around all others, but it is no content."""

    def __init__(self) -> None:
        super().__init__()
        self.m = TransformerClassifier(layers=2, padding=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.m(ids)


@micro_case("a", "b", "fc")
class LearnedQueries(Case):
    """A second stream meets the first, but it does not come from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.project = nn.Parameter(torch.randn(1, 8)), square()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.fc(F.relu(self.b(h) * self.project(self.query).expand(len(x), -1)))


@micro_case("net", *(f"net.{index}" for index in range(7)), inputs=features())
class CompiledPart(Case):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(mlp(), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@micro_case("a", "b", "fc")
class SplitAndJoined(Case):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.fc(self.b(torch.cat([F.relu(first), second * 2], 1)))


@micro_case("a", "b", "fc")
class Preallocated(Case):
    """Two halves are written into memory that was there before."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        joined = torch.empty_like(h)
        joined[:, :4] = F.relu(h[:, :4])
        joined[:, 4:] = h[:, 4:] * 2
        return self.fc(self.b(joined))


@micro_case("a", "b", "fc")
class ShapeOnly(Case):
    """Noise in the shape of a state and a constant in its type: they look at the state, and do not hold it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        constant = torch.ones(1).type_as(h).expand_as(h)
        h = self.b(h) + torch.randn_like(h) * constant + h.new_zeros(8)
        return self.fc(F.relu(h))


@micro_case("a", "b", "fc")
class FourierDomain(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(torch.fft.ifft(torch.fft.fft(self.a(x))).real)))


@micro_case("a", "fc")
class FourierSkip(Case):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.fc(self.b(h) + torch.fft.ifft(torch.fft.fft(h)).real)


@micro_case("a", "b", "fc")
class PreNormalisedWeights(Case):
    """Weights that are computed from weights (weight normalisation)."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.utils.parametrizations.weight_norm(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))))


@micro_case("fc")
class InputWrittenThroughAView(Case):
    """What is written is a view; what is used is its base."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        view = h[:, :4]
        view += x[:, :4]
        return self.fc(h)


@micro_case("a", "b", "fc")
class RunningMean(Case):
    """A buffer that follows the states is the module's own, and no way around the layers in between."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.fc(F.relu(self.b(h)) - self.mean)


@micro_case("a", "fc")
class PassedThroughWithoutGrad(Case):
    """Under no_grad a layer hands on a tensor that keeps its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            same = self.same(h)
        return self.fc(self.b(h) + same)


@micro_case("a", "b", "fc")
class Codebook(Case):
    """What is looked up was chosen by the state: `a` is not gone around by it, and neither is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(self.a(x), self.code).argmin(1)
        return self.fc(F.relu(self.b(self.code[nearest])))


@micro_case("fc")
class CodebookOfTheInput(Case):
    """The same, chosen by the input itself: what is looked up goes around `a` and `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.a(x))) + self.code[torch.cdist(x, self.code).argmin(1)])


@micro_case("a", "fc")
class StraightThrough(Case):
    """What is quantised is the value, but the gradient goes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.quantised = nn.Hardtanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.fc(h + (self.quantised(h).round() - h).detach())


@micro_case("a", "m", "fc")
class Ensemble(Case):
    """Members run inside `torch.vmap`, where no hook can replace what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(square(), nn.ReLU()) for _ in range(3))
        self.m = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parameters, buffers = torch.func.stack_module_state(list(self.members))

        def member(parameters: dict[str, Tensor], buffers: dict[str, Tensor], h: Tensor) -> Tensor:
            return torch.func.functional_call(self.members[0], (parameters, buffers), (h,))

        return self.fc(self.m(torch.vmap(member, (0, 0, None))(parameters, buffers, self.a(x)).mean(0)))


@micro_case("a", "b", "fc")
class GeneratedWeights(Case):
    """Weights made by a network of their own, from nothing that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.seed, self.hyper = nn.Parameter(torch.randn(3)), nn.Linear(3, 64)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.hyper(self.seed).view(8, 8)
        return self.fc(F.relu(torch.func.functional_call(self.b, {"weight": weight}, (self.a(x),))))


@micro_case("fc")
class WeightsGeneratedFromTheInput(Case):
    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(torch.bmm(self.hyper(x).view(-1, 8, 8), self.a(x)[..., None])[..., 0]))


@micro_case("a", "b", "c", "fc")
class Parametrised(Case):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(self.a)
        self.b = nn.utils.parametrizations.weight_norm(self.b)
        self.c = nn.utils.parametrizations.orthogonal(self.c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


@micro_case("a", "fc")
class SparseMatrices(Case):
    """Sparse tensors have no memory to be known by."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mixed = torch.sparse.mm(h.to_sparse(), torch.eye(8))
        return self.fc(self.b(h) + mixed)


@micro_case("a", "b", "fc")
class SparseConstant(Case):
    """One sparse tensor that holds the state, and one that does not."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.sparse.mm(self.a(x).to_sparse(), torch.eye(8)))
        return self.fc(F.relu(torch.sparse.mm(torch.eye(8).to_sparse(), h.T).T))

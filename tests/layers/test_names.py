"""Names of layers: wrappers are invisible, globs stop at dots, slips are met with near misses."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_manifold_mixup.layers import named_layers, resolve_layers, unknown_layer


def network() -> nn.Module:
    stages = {f"layer{index}": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for index in (1, 2, 3, 4)}
    return nn.ModuleDict({"model": nn.ModuleDict({"conv1": nn.Linear(2, 2), **stages, "fc": nn.Linear(2, 2)})})


def test_names_are_those_of_named_modules_without_wrappers():
    plain = network()
    assert list(named_layers(plain)) == [name for name, _ in plain.named_modules() if name]


def test_a_compiled_module_is_hooked_inside():
    net = network()
    inner = net["model"]["layer1"]
    net["model"]["layer1"] = torch.compile(inner)
    layers = named_layers(net)
    assert list(layers) == list(named_layers(network()))
    assert layers["model.layer1"] is inner
    assert layers["model.layer1.0"] is inner[0]


def test_a_checkpointed_module_is_hooked_outside():
    net = network()
    wrapper = checkpoint_wrapper(net["model"]["layer1"])
    net["model"]["layer1"] = wrapper
    layers = named_layers(net)
    assert list(layers) == list(named_layers(network()))
    assert layers["model.layer1"] is wrapper
    net["model"]["layer2"] = torch.compile(checkpoint_wrapper(net["model"]["layer2"]))
    assert type(named_layers(net)["model.layer2"]).__name__ == "CheckpointWrapper"


def test_a_checkpointed_module_is_mixed_once_and_back_propagated_right():
    """The hook on the wrapper fires once; on the module inside it would fire again, with the same gradient."""
    torch.manual_seed(0)
    x, calls, gradients = torch.randn(3, 2), [], []
    for inside in (False, True):
        linear = nn.Linear(2, 2)
        linear.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        wrapped = checkpoint_wrapper(linear)
        net = nn.Sequential(wrapped, nn.Linear(2, 2))
        net[1].load_state_dict({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
        fired = []

        def hook(module, args, h, fired=fired):
            fired.append(1)
            return 0.3 * h + 0.7 * h[[1, 2, 0]]

        (linear if inside else named_layers(net)["0"]).register_forward_hook(hook)
        net(x).square().sum().backward()
        calls.append(len(fired))
        gradients.append(linear.weight.grad)
    assert calls == [1, 2]
    torch.testing.assert_close(*gradients)


def test_module_is_a_wrapper_only_below_a_parallel_one():
    net = nn.ModuleDict(
        {"module": nn.ModuleDict({"a": nn.Linear(2, 2)}), "net": nn.DataParallel(nn.Sequential(nn.ReLU()))}
    )
    assert list(named_layers(net)) == ["module", "module.a", "net", "net.0"]
    assert type(named_layers(net)["net"]) is nn.Sequential


def test_a_module_under_two_names_has_both():
    shared = nn.Linear(2, 2)
    layers = named_layers(nn.ModuleDict({"a": shared, "b": shared}))
    assert layers["a"] is layers["b"] is shared


def test_exact_names_globs_and_input_in_order_without_repeats():
    net = network()
    assert resolve_layers(net, ["model.layer2", "input", "model.layer[12]"]) == [
        "model.layer2",
        "input",
        "model.layer1",
    ]
    assert resolve_layers(net, ["model.layer*"]) == [f"model.layer{index}" for index in (1, 2, 3, 4)]
    assert resolve_layers(net, ["model.layer1.*"]) == ["model.layer1.0", "model.layer1.1"]
    assert resolve_layers(net, ["*"]) == ["model"]


def test_names_with_wrapper_components_are_understood():
    net = network()
    net["model"]["layer1"] = torch.compile(net["model"]["layer1"])
    assert resolve_layers(net, ["model.layer1._orig_mod.0"]) == ["model.layer1.0"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "Expected at least one layer name, got none. Name layers, or use layers='auto'."),
        ("model.layer1", "Expected a list of layer names, got the text 'model.layer1'. Write ['model.layer1']."),
        (
            ["model.layr1"],
            "Expected the name of a layer of ModuleDict, got 'model.layr1'."
            " Did you mean 'model.layer1', 'model.layer4', 'model.layer3'?",
        ),
        (["layer1"], "Expected the name of a layer of ModuleDict, got 'layer1'. Did you mean 'model.layer1',"),
        (["Input"], "Did you mean 'input'"),
        (["xyz123"], "Expected the name of a layer of ModuleDict, got 'xyz123'. The outermost ones: 'model'."),
        (
            ["layer*"],
            "Expected a glob that matches layers of ModuleDict, got 'layer*', which matches none"
            " ('*' does not cross a dot).",
        ),
    ],
)
def test_refusals(patterns, message):
    with pytest.raises(ValueError, match="Expected") as error:
        resolve_layers(network(), patterns)
    assert message in str(error.value)


def test_unknown_layer_says_the_same_as_resolving_it():
    with pytest.raises(ValueError, match="Expected") as error:
        resolve_layers(network(), ["model.layr1"])
    assert str(error.value) == unknown_layer("model.layr1", network())

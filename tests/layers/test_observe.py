"""Observation of training steps: nothing changes for them, and the mixing path is told from everything else in them."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_manifold_mixup._step.mix.hooks import is_training_forward
from lightning_manifold_mixup.layers import eligible_layers, observe
from lightning_manifold_mixup.layers.cutpoints import Verdict
from tests import zoo


class Plain:
    """Stands in for `observe` where nothing is observed."""

    def __enter__(self):
        return None

    def __exit__(self, *exception):
        return None


def trace_of_a_step(network, inputs, step, observed):
    """Everything that a training step leaves behind."""
    network = copy.deepcopy(network)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with observe(network, inputs) if observed else Plain():
        loss = step(network, *inputs)
    loss.backward()
    return {
        "loss": loss.detach(),
        **{f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None},
        **{f"buffer {name}": b for name, b in network.named_buffers()},
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1][:-1]),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
    }


def sum_of_squares(network, *inputs):
    outputs = network(*inputs)
    return sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))


SMALL = [
    "resnet18", "preact_resnet", "wide_resnet_identity", "mobilenet_v3_small", "unet", "lstm", "transformer", "bert",
    "two_inputs", "shared_block", "googlenet",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_observed_step_of_a_network_is_bitwise_the_same(name):
    known = zoo.NETWORKS[name]
    torch.manual_seed(0)
    network, inputs = known.build(), known.inputs()
    plain = trace_of_a_step(network, inputs, sum_of_squares, observed=False)
    observed = trace_of_a_step(network, inputs, sum_of_squares, observed=True)
    assert plain.keys() == observed.keys()
    assert [key for key in plain if not torch.equal(plain[key], observed[key])] == []


@pytest.mark.parametrize("name", ["preact_resnet", "transformer", "lstm"])
def test_observed_step_in_mixed_precision_is_bitwise_the_same(name):
    known = zoo.NETWORKS[name]
    torch.manual_seed(0)
    network, inputs = known.build(), known.inputs()

    def step(network, *inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(network(*inputs), torch.arange(zoo.BATCH))

    plain = trace_of_a_step(network, inputs, step, observed=False)
    observed = trace_of_a_step(network, inputs, step, observed=True)
    assert plain.keys() == observed.keys()
    assert [key for key in plain if not torch.equal(plain[key], observed[key])] == []


@pytest.mark.parametrize("case", zoo.MICRO_CASES, ids=lambda case: case.__name__)
def test_observed_step_of_a_micro_case_is_bitwise_the_same(case):
    torch.manual_seed(0)
    network, inputs = case(), case.inputs()
    plain = trace_of_a_step(network, inputs, sum_of_squares, observed=False)
    observed = trace_of_a_step(network, inputs, sum_of_squares, observed=True)
    assert plain.keys() == observed.keys()
    assert [key for key in plain if not torch.equal(plain[key], observed[key])] == []


def test_no_trace_is_left_after_an_exception():
    network = zoo.mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), observe(network, torch.randn(3, 9)):
        network(torch.randn(3, 9))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_eligible_layers_leaves_no_trace():
    torch.manual_seed(0)
    network, inputs = nn.Sequential(zoo.ResidualNet(zoo.PreActBlock, "layer", 3), nn.Dropout(0.5)), zoo.images(16)()
    before = copy.deepcopy(network.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    eligible_layers(network, *inputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_eligible_layers_runs_in_the_mode_of_the_model_and_under_no_grad():
    modes = []

    class Spy(nn.Linear):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    network = nn.Sequential(Spy(4, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        assert eligible_layers(network, torch.randn(3, 4)).eligible == ["input", "0"]
    assert modes == [False]


# ------------------------------------------------------------------------- which content is the mixing path


class Step(nn.Module):
    """A LightningModule in miniature: a network of three layers and a training step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.other = nn.Linear(8, 8)

    def report(self, step, x=None, y=None):
        x = torch.randn(5, 8) if x is None else x
        y = torch.randint(8, (5,)) if y is None else y
        with observe(self, x, y) as seen:
            loss = step(x, y)
        loss.backward()
        return seen.report()


PATH = ["input", "net.0", "net.1", "net.2", "net.3"]


LOSSES = [
    F.cross_entropy,
    nn.CrossEntropyLoss(label_smoothing=0.1),
    lambda logits, y: -logits.log_softmax(1)[range(5), y].mean(),
    lambda logits, y: -logits.log_softmax(1).gather(1, y[:, None]).mean(),
    lambda logits, y: -(F.one_hot(y, 8) * logits.log_softmax(1)).sum(1).mean(),
    lambda logits, y: F.mse_loss(logits.softmax(1), torch.zeros(5, 8).scatter_(1, y[:, None], 1.0)),
    lambda logits, y: F.cross_entropy(logits[y != 3], y[y != 3]),
    lambda logits, y: (torch.ops.aten.log_softmax.int(logits, 1)[torch.arange(5), y] * -1).sum(),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_end_is_what_the_loss_receives(loss):
    module = Step()
    report = module.report(lambda x, y: loss(module.net(x), y))
    assert report.sinks_found
    assert report.eligible == PATH
    assert report.row("net").verdict is Verdict.FINAL


def test_float_targets():
    module = Step()
    assert module.report(lambda x, y: F.mse_loss(module.net(x), y), y=torch.randn(5, 8)).eligible == PATH


def test_criterion_with_a_custom_autograd_function():
    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, y):
            p = logits.softmax(1)
            ctx.save_for_backward(p, y)
            return (p - F.one_hot(y, 8)).square().sum()

        @staticmethod
        def backward(ctx, grad):
            p, y = ctx.saved_tensors
            return grad * 2 * (p - F.one_hot(y, 8)), None

    module = Step()
    assert module.report(lambda x, y: Squared.apply(module.net(x), y)).eligible == PATH
    assert module.report(lambda x, y: Squared.apply(module.net(x), y) * 2).eligible == PATH

    def beside_another(x, y):
        h = module.net[0](x)
        return F.cross_entropy(module.other(h), y) + 2 * Squared.apply(module.net[2](h), y)

    report = module.report(beside_another)
    assert report.eligible == ["input", "net.0"]
    assert report.row("other").verdict is report.row("net.2").verdict is Verdict.BYPASSED


def test_teacher_inside_a_custom_autograd_function_hides_nothing():
    class Distilled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, teacher, y):
            return (logits - teacher / 2 - F.one_hot(y, 8) / 2).square().sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(5, 8), None, None

    module = Step()

    def step(x, y):
        with torch.no_grad():
            teacher = module.net(x)
        return 2 * Distilled.apply(module.net(x), teacher, y)

    assert module.report(step).eligible == PATH


def test_teacher_pass_of_the_same_network_hides_nothing():
    module = Step()

    def step(x, y):
        logits = module.net(x)
        with torch.no_grad():
            teacher = module.net(x + 0.1)
        distillation = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        return F.cross_entropy(logits, y) + distillation

    report = module.report(step)
    assert report.eligible == PATH
    assert report.row("net.0").calls == 2
    assert report.row("net.0").live_calls == (0,)


def test_teacher_first_and_labels_softened_by_it():
    module = Step()

    def step(x, y):
        with torch.no_grad():
            soft = module.net(x).softmax(1) / 2 + F.one_hot(y, 8) / 2
        return -(soft * module.net(x).log_softmax(1)).sum()

    report = module.report(step)
    assert report.eligible == PATH
    assert report.row("net.0").live_calls == (1,)


def test_second_pass_for_a_consistency_loss_is_no_reuse():
    module = Step()

    def step(x, y):
        loss = F.cross_entropy(module.net(x), y)
        return loss + F.mse_loss(module.net(torch.randn(5, 8)), module.net(torch.randn(5, 8)))

    report = module.report(step)
    assert report.eligible == PATH
    assert report.row("net.2").live_calls == (0,)


def test_metrics_sample_weights_and_penalties_are_no_ends():
    module = Step()
    weight = torch.rand(5)

    def step(x, y):
        logits = module.net(x)
        accuracy = (logits.argmax(1) == y).float().mean()
        brier = (logits.detach().softmax(1) - F.one_hot(y, 8)).square().mean()
        penalty = sum(parameter.square().sum() for parameter in module.net.parameters())
        return (F.cross_entropy(logits, y, reduction="none") * weight).mean() + penalty + 0 * (accuracy + brier)

    x, y = torch.randn(5, 8), torch.randint(8, (5,))
    with observe(module, (x, weight), y) as seen:
        step(x, y).backward()
    assert seen.report().eligible == PATH


def test_two_losses_have_two_ends():
    module = Step()

    def step(x, y):
        h = module.net[0](x)
        return F.cross_entropy(module.net[2](h), y) + F.cross_entropy(module.other(h), y)

    report = module.report(step)
    assert report.eligible == ["input", "net.0"]


def test_autoencoder_whose_target_is_its_input():
    module = Step()
    x = torch.randn(5, 8)
    assert module.report(lambda x, y: F.mse_loss(module.net(x), y), x=x, y=x).eligible == PATH


def test_autoencoder_with_a_long_skip():
    """The input joins again before weights (other): a real bypass of the first layers."""
    module = Step()
    x = torch.randn(5, 8)
    report = module.report(lambda x, y: (module.net(module.other(module.net[0](x) + x)) - y).square().mean(), x=x, y=x)
    assert report.row("net.0").verdict is Verdict.REPEATED
    assert report.eligible == ["input", "net.1", "net.2", "net.3", "other"]


def test_language_model_whose_targets_are_its_ids_shifted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.lstm, self.head = nn.Embedding(9, 4), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 9)

    model, ids = Model(), torch.randint(9, (4, 7))
    with observe(model, ids, ids) as seen:
        h, _ = model.lstm(model.emb(ids[:, :-1]))
        F.cross_entropy(model.head(h).flatten(0, 1), ids[:, 1:].flatten())
    report = seen.report()
    assert report.eligible == ["emb", "lstm"]
    assert report.default == ["emb", "lstm"]


def test_labels_that_enter_the_network_too():
    """A conditional network: the label's embedding joins in the middle, which is no end."""

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.label, self.second, self.head = (
                nn.Linear(8, 8),
                nn.Embedding(8, 8),
                zoo.square(),
                zoo.square(),
            )

    model, x, y = Conditional(), torch.randn(5, 8), torch.randint(8, (5,))
    with observe(model, x, y) as seen:
        F.cross_entropy(model.head(model.second(model.first(x) + model.label(y)).relu()), y).backward()
    assert seen.report().eligible == ["input", "first", "second"]


def test_loss_against_prototypes_looked_up_by_label():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.table = nn.Linear(8, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(8, 4))

    model, x, y = Prototypes(), torch.randn(5, 8), torch.randint(8, (5,))
    with observe(model, x, y) as seen:
        (model.head(model.body(x)) - model.table[y]).square().mean().backward()
    assert seen.report().sinks_found
    assert seen.report().eligible == ["input", "body"]


def test_targets_that_no_loss_used():
    module = Step()
    with observe(module, torch.randn(5, 8), torch.randint(8, (5,))) as seen:
        module.net(torch.randn(5, 8)).sum().backward()
    assert not seen.report().sinks_found


def test_outputs_can_be_named_as_the_end():
    module, x = Step(), torch.randn(5, 8)
    with observe(module, x) as seen:
        output = module.net(x)
    assert seen.report({"logits": output}).eligible == PATH
    assert seen.report(torch.randn(3)).sinks_found is False


def test_a_mixing_hook_does_not_disturb():
    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, lam, partners):
            ctx.save_for_backward(lam, partners)
            return lam * h + (1 - lam) * h[partners]

        @staticmethod
        def backward(ctx, grad):
            lam, partners = ctx.saved_tensors
            return lam * grad + (1 - lam) * grad[partners.argsort()], None, None

    module = Step()
    lam, partners = torch.tensor(0.3), torch.randperm(5)
    hooks = [
        module.get_submodule(name).register_forward_hook(lambda _, args, h: Mixed.apply(h, lam, partners))
        for name in ("net.0", "net.2")
    ]
    assert module.report(lambda x, y: F.cross_entropy(module.net(x), y)).eligible == PATH
    for hook in hooks:
        hook.remove()


def test_backward_inside_and_gradient_penalty():
    """Manual optimisation: backward and the optimiser step run inside, then a second forward on changed weights."""
    module = Step()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, y = torch.randn(5, 8), torch.randint(8, (5,))
    with observe(module, x, y) as seen:
        loss = F.cross_entropy(module.net(x), y)
        (gradient,) = torch.autograd.grad(loss, module.net[0].weight, create_graph=True)
        torch.autograd.backward(loss + gradient.square().sum())
        optimizer.step()
        optimizer.zero_grad()
        module.net(torch.randn(5, 8)).sum().backward()
        optimizer.step()
    assert seen.report().eligible == PATH


# ------------------------------------------------------------------------------ checkpoints, compile, precision


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_with_operations_in_place(reentrant):
    """Recomputation in backward runs without hooks; it must save the same tensors, which checkpoints verify."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.blocks = nn.ModuleList(
                [nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3)) for _ in "12"]
            )
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            h = self.stem(x)
            for block in self.blocks:
                h = checkpoint(lambda z, block=block: self.drop(block(z)), h, use_reentrant=reentrant)
            return self.fc(h.mean((2, 3)))

    torch.manual_seed(0)
    network, inputs = Checkpointed(), (torch.randn(4, 3, 12, 12),)
    plain = trace_of_a_step(network, inputs, sum_of_squares, observed=False)
    observed = trace_of_a_step(network, inputs, sum_of_squares, observed=True)
    assert [key for key in plain if not torch.equal(plain[key], observed[key])] == []
    report = eligible_layers(network, *inputs)
    assert {"stem", "blocks.0", "blocks.0.1", "blocks.1"} <= set(report.eligible)
    assert report.row("drop").verdict is Verdict.REPEATED


def test_backward_inside_a_checkpointed_step_counts_each_call_once():
    module = Step()
    x, y = torch.randn(5, 8), torch.randint(8, (5,))
    with observe(module, x, y) as seen:
        torch.autograd.backward(F.cross_entropy(checkpoint(module.net, x, use_reentrant=False), y))
    assert seen.report().eligible == PATH
    assert seen.report().row("net.0").calls == 1


def test_is_training_forward_sees_through_reentrant_checkpoints():
    seen = []

    def probe(x):
        seen.append(is_training_forward())
        return x * 1

    x = torch.randn(2, requires_grad=True)
    checkpoint(probe, x, use_reentrant=True)
    with torch.no_grad():
        checkpoint(probe, x.detach(), use_reentrant=False)
        probe(x)
    with torch.inference_mode():
        probe(x)
    probe(x)
    assert seen == [True, False, False, False, True]


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_networks_are_observed_eagerly(whole):
    module = Step()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    module.net = torch.compile(module.net, backend=backend)
    step = torch.compile(lambda x, y: F.cross_entropy(module.net(x), y), backend=backend) if whole else None
    report = module.report(step or (lambda x, y: F.cross_entropy(module.net(x), y)))
    assert report.eligible == PATH
    assert compilations == []
    module.net(torch.randn(5, 8))
    assert len(compilations) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    module = Step()

    def step(x, y):
        with torch.autocast("cpu", dtype):
            return F.cross_entropy(module.net(x), y)

    assert module.report(step).eligible == PATH


def test_double_precision_cast_in_the_step():
    module = Step().double()
    assert module.report(lambda x, y: F.cross_entropy(module.net(x.double()), y.long())).eligible == PATH


def test_frozen_backbone_in_inference_mode_of_a_teacher():
    module = Step()

    def step(x, y):
        with torch.inference_mode():
            module.net(x)
        return F.cross_entropy(module.net(x), y)

    assert module.report(step).eligible == PATH


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_part_is_seen_through():
    """TorchScript is opaque to the record, but autograd tells what went in."""
    module = Step()
    module.other = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    report = module.report(lambda x, y: F.cross_entropy(module.net[2](module.other(module.net[0](x))), y))
    assert report.eligible == ["input", "net.0"]
    assert report.row("other").verdict is Verdict.SCRIPTED


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def token_classifier_step(model):
    ids, y = torch.randint(1, 50, (3, 7)), torch.randint(4, (3,))
    with observe(model, ids, y) as seen:
        loss = F.cross_entropy(model(ids), y)
    loss.backward()
    return seen.report()


@pytest.mark.filterwarnings("ignore")  # what torch.distributed says about a group of one process on a CPU
def test_fully_sharded_network(one_process):
    """While a module runs its parameters are other tensors; they are known as parameters all the same."""
    model = zoo.TransformerClassifier(layers=2)
    plain = token_classifier_step(model)
    for layer in (*model.encoder.layers, model.emb, model):
        torch.distributed.fsdp.fully_shard(layer, mesh=one_process)
    sharded = token_classifier_step(model)
    assert type(model.emb.weight).__name__ == "DTensor"
    assert sharded.eligible == plain.eligible
    assert sharded.default == plain.default == ["emb", "encoder.layers.0"]


@pytest.mark.filterwarnings("ignore")
def test_network_in_ddp(one_process):
    module = Step()
    module.net = nn.parallel.DistributedDataParallel(module.net)
    report = module.report(lambda x, y: F.cross_entropy(module.net(x), y))
    assert report.eligible == PATH
    assert all(parameter.grad is not None for parameter in module.net.parameters())

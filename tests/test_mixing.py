import collections
import copy
import dataclasses
import gc
import weakref

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_manifold_mixup import Mix, MixedTarget, MixingError, draw_mix, mixing
from lightning_manifold_mixup._step.compiled import torch_version
from lightning_manifold_mixup._step.hooks import MixingHook
from lightning_manifold_mixup._step.switches import is_unmixed, mixing_is_open
from lightning_manifold_mixup.mixing import Draw, unmixed
from tests.helpers import ConvNet, images

MIX = Mix(torch.tensor(0.3), torch.tensor([2, 0, 3, 1]))


def formula(h, mix=MIX):
    lam = mix.lam.reshape(-1, *[1] * (h.ndim - 1)) if mix.lam.ndim else mix.lam
    return lam * h + (1 - lam) * h[mix.partners]


# One lam, and one for each sample, 1 and 0 among them; a permutation, partners that repeat, one for all, none at all.
ANY = [
    Mix(lam, torch.tensor(partners))
    for lam in (torch.tensor(0.3), torch.tensor([0.3, 1.0, 0.0, 0.9]))
    for partners in ([2, 0, 3, 1], [1, 1, 0, 0], [3, 3, 3, 3], [0, 1, 2, 3])
]


class Allocations(TorchDispatchMode):
    """Notes the memory of each tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.made.append(weakref.ref(output))
        return output

    def alive(self):
        found = {tensor.data_ptr(): tensor for each in self.made if (tensor := each()) is not None}
        return list(found.values())


class TestMix:
    def test_is_the_formula(self):
        h = torch.randn(4, 3, 5)
        torch.testing.assert_close(MIX(h), formula(h))

    def test_lam_is_the_weight_of_the_original(self):
        h = torch.eye(4)
        assert torch.equal(Mix(torch.tensor(1.0), MIX.partners)(h), h)
        assert torch.equal(Mix(torch.tensor(0.0), MIX.partners)(h), h[MIX.partners])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_keeps_the_dtype_and_rounds_once(self, dtype):
        h = torch.randn(4, 257).to(dtype)
        mixed = MIX(h)
        assert mixed.dtype == dtype
        exact = formula(h.double(), Mix(MIX.lam.double(), MIX.partners))
        # One rounding to `dtype`, give or take the float32 rounding before it.
        step = torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-6
        assert ((mixed.double() - exact).abs() <= step).all()

    @pytest.mark.parametrize("mix", ANY)
    def test_gradcheck_and_gradgradcheck(self, mix):
        h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(mix, (h,))
        assert torch.autograd.gradgradcheck(mix, (h,))

    @pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 6, 2)])
    @pytest.mark.parametrize("mix", ANY)
    def test_equals_the_formula_in_value_and_gradient(self, mix, shape):
        """Also where the number of features is that of samples: a lam for each sample goes along the samples."""
        h = torch.randn(shape, requires_grad=True)
        weight = torch.randn(shape)
        torch.testing.assert_close(mix(h), formula(h, mix))
        ours = torch.autograd.grad((mix(h).square() * weight).sum(), h)[0]
        torch.testing.assert_close(ours, torch.autograd.grad((formula(h, mix).square() * weight).sum(), h)[0])

    @pytest.mark.parametrize("mix", ANY)
    def test_keeps_no_activation(self, mix):
        """Neither the state nor a copy of it lives on for backward: all that is held is the result."""
        leaf = torch.randn(4, 1000, requires_grad=True)
        state = leaf * 1
        alive = weakref.ref(state)
        with Allocations() as made:
            mixed = mix(state)
        del state
        assert alive() is None
        gc.collect()
        assert [tensor.shape for tensor in made.alive() if tensor.numel() >= 1000] == [mixed.shape]
        mixed.sum().backward()
        assert leaf.grad is not None

    def test_a_lam_for_each_sample_goes_along_the_batch_dimension(self):
        square = torch.randn(4, 4)
        for mix in ANY:
            torch.testing.assert_close(mix(square, batch_dim=1), formula(square.T, mix).T)

    def test_structures(self):
        Point = collections.namedtuple("Point", "h index")

        @dataclasses.dataclass
        class Output:
            hidden: torch.Tensor
            mask: torch.Tensor

        h, mask = torch.randn(4, 3), torch.tensor([True, False, True, True])
        mixed = MIX({"a": (h, [h, Point(h, 7)]), "b": Output(h, mask)})
        assert type(mixed["a"][1][1]) is Point
        for leaf in (mixed["a"][0], mixed["a"][1][0], mixed["a"][1][1].h, mixed["b"].hidden):
            torch.testing.assert_close(leaf, formula(h))
        assert mixed["b"].mask is mask

    def test_batch_dimension(self):
        h = torch.randn(5, 4, 3)
        expected = formula(h.transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(MIX(h), expected)
        torch.testing.assert_close(MIX(h, batch_dim=1), expected)
        square = torch.randn(4, 4)
        torch.testing.assert_close(MIX(square, batch_dim=1), formula(square.T).T)

    @pytest.mark.parametrize("gradient", [False, True])
    def test_channels_last_stays(self, gradient):
        h = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_(gradient)
        mixed = MIX(h)
        torch.testing.assert_close(mixed, formula(h))
        assert mixed.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize(
        ("lam", "partners", "error", "message"),
        [
            (0.3, [0, 1], TypeError, r"lam to be a tensor of torch\.float32 or .*`torch\.tensor\(lam\)`.*float: 0\.3"),
            (torch.tensor(1), torch.arange(2), TypeError, r"lam to be.*`lam\.float\(\)`.*torch\.int64"),
            (torch.rand(2).bfloat16(), torch.arange(2), TypeError, r"lam.*got one of torch\.bfloat16"),
            (torch.tensor(0.3), [1, 0], TypeError, r"partners to be.*`torch\.tensor\(partners\)`.*list: \[1, 0\]"),
            (torch.tensor(0.3), torch.arange(2).int(), TypeError, r"`partners\.long\(\)`.*torch\.int32"),
            (torch.tensor(0.3), torch.eye(2).long(), ValueError, r"shape \(n,\).*got \(2, 2\)"),
            (torch.tensor(0.3), torch.tensor(1), ValueError, r"shape \(n,\).*got \(\)"),
            (torch.rand(3), torch.arange(2), ValueError, r"each of the 2 samples.*shape \(2,\), got shape \(3,\)"),
            (torch.rand(2, 1), torch.arange(2), ValueError, r"got shape \(2, 1\)"),
            (torch.tensor(1.5), torch.arange(2), ValueError, r"lam in \[0, 1\].*got 1\.5"),
            (torch.tensor([0.5, -0.5]), torch.arange(2), ValueError, r"lam in \[0, 1\].*got \[0\.5, -0\.5\]"),
            (torch.tensor(float("nan")), torch.arange(2), ValueError, r"lam in \[0, 1\].*got nan"),
            (torch.tensor(0.3), torch.tensor([0, 2]), ValueError, r"partners in 0\.\.1.*got \[0, 2\]"),
            (torch.tensor(0.3), torch.tensor([0, -1]), ValueError, r"partners in 0\.\.1.*got \[0, -1\]"),
            (
                torch.tensor(0.3).requires_grad_(),
                torch.arange(2),
                ValueError,
                r"lam that is drawn.*requires a gradient",
            ),
        ],
    )
    def test_what_is_no_draw_is_refused(self, lam, partners, error, message):
        with pytest.raises(error, match=message):
            Mix(lam, partners)

    def test_values_on_a_device_are_not_waited_for(self):
        """A meta tensor stands for one on a device: it has no values, and raises where it is asked for them."""
        for lam in (torch.tensor(0.3), torch.rand(4)):
            mix = Mix(lam.to("meta"), MIX.partners.to("meta"))
            h = torch.randn(4, 3, device="meta", requires_grad=True)
            mix(h).sum().backward()
            assert h.grad.shape == (4, 3)

    def test_moving_keeps_what_is_known(self):
        """The faster gradient of a permutation, also where nobody can look at the partners any more."""
        for mix in ANY:
            assert mix.to("meta").permutation == mix.to("cpu").permutation == (mix.partners.unique().numel() == 4)
        assert draw_mix(9).permutation
        assert torch.equal(copy.deepcopy(MIX)(torch.eye(4)), MIX(torch.eye(4)))

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            MIX.lam = torch.tensor(0.5)
        assert dataclasses.replace(MIX, lam=torch.rand(4)).lam.shape == (4,)

    def test_can_be_made_in_a_compiled_function(self):
        h = torch.randn(4, 3)
        made = torch.compile(lambda lam, h: Mix(lam, torch.tensor([1, 1, 0, 2]))(h), backend="eager", fullgraph=True)
        torch.testing.assert_close(made(MIX.lam, h), formula(h, Mix(MIX.lam, torch.tensor([1, 1, 0, 2]))))

    def test_another_batch_size_is_refused(self):
        with pytest.raises(MixingError, match=r"4 samples in dimension 0 or 1, got shape \(5, 3\).*`batch_dim`"):
            MIX(torch.randn(5, 3))
        with pytest.raises(MixingError, match=r"in dimension 1 \(`batch_dim`\)"):
            MIX(torch.randn(4, 3), batch_dim=1)

    def test_nothing_to_mix_is_refused(self):
        with pytest.raises(MixingError, match=r"floating point tensors to mix, got a torch\.int64 tensor"):
            MIX(torch.arange(4))

    def test_batch_size_one(self):
        h = torch.randn(1, 3)
        mix = draw_mix(1, alpha=1.0)
        torch.testing.assert_close(mix(h), h)
        assert mix.target(torch.tensor([2])).shown.tolist() == [2]


class TestTarget:
    def test_indices_are_in_superposition(self):
        y = torch.tensor([0, 1, 2, 3])
        target = MIX.target(y)
        assert isinstance(target, MixedTarget)
        assert torch.equal(target.labels, y)
        assert torch.equal(target.partners, y[MIX.partners])

    @pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 3)])
    @pytest.mark.parametrize("mix", ANY)
    def test_floats_are_mixed(self, mix, shape):
        y = torch.rand(shape)
        target = mix.target(y)
        assert type(target) is torch.Tensor
        torch.testing.assert_close(target, formula(y, mix))

    def test_structure(self):
        target = MIX.target({"class": torch.arange(4), "value": torch.rand(4)})
        assert isinstance(target["class"], MixedTarget)
        assert type(target["value"]) is torch.Tensor

    def test_refusals(self):
        with pytest.raises(TypeError, match=r"A sparse target .* cannot be mixed: hand it on as `y.to_dense\(\)`"):
            MIX.target(torch.eye(4).to_sparse())
        with pytest.raises(TypeError, match=r"float16 cannot be mixed.*y\.long\(\)"):
            MIX.target(torch.rand(4).half())
        with pytest.raises(ValueError, match=r"target of 4 samples in dimension 0.*got shape \(3,\)"):
            MIX.target(torch.arange(3))


class TestDraw:
    @pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
    def test_lam_follows_beta(self, alpha):
        generator = torch.Generator().manual_seed(1)
        lams = [draw_mix(2, alpha, generator).lam.item() for _ in range(4000)]
        assert scipy.stats.kstest(lams, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01

    def test_permutation_is_uniform(self):
        generator = np.random.default_rng(1)
        counts = collections.Counter(tuple(draw_mix(3, 1.0, generator).partners.tolist()) for _ in range(6000))
        assert len(counts) == 6
        assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01

    def test_generator_decides(self):
        a, b = (draw_mix(9, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
        assert a.lam == b.lam
        assert torch.equal(a.partners, b.partners)

    def test_alpha_zero_mixes_nothing(self):
        assert draw_mix(4, 0.0).lam == 1

    @pytest.mark.parametrize("pair", [(0.5, 2.0), [3, 1], collections.UserList([5, 1.5])])
    def test_a_pair_is_beta_of_both(self, pair):
        generator = np.random.default_rng(1)
        lams = [draw_mix(2, pair, generator).lam.item() for _ in range(4000)]
        assert scipy.stats.kstest(lams, scipy.stats.beta(*pair).cdf).pvalue > 0.01

    @pytest.mark.parametrize("alpha", [0.5, 2.0, (2.0, 1.0)])
    def test_dominant_folds_lam(self, alpha):
        """The same draw, at 1/2 or above: the density there is that of both sides."""
        lams = [
            [draw_mix(2, alpha, generator, dominant).lam.item() for _ in range(4000)]
            for dominant in (False, True)
            for generator in [np.random.default_rng(1)]
        ]
        assert lams[1] == pytest.approx([max(lam, 1 - lam) for lam in lams[0]], abs=1e-7)
        a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        beta = scipy.stats.beta(a, b)
        assert scipy.stats.kstest(lams[1], lambda lam: beta.cdf(lam) - beta.cdf(1 - lam)).pvalue > 0.01

    def test_chosen_partners(self):
        partners = torch.tensor([1, 1, 0])
        assert torch.equal(draw_mix(3, 1.0, partners=partners).partners, partners)
        with pytest.raises(ValueError, match="partners of the 4 samples, got 3"):
            draw_mix(4, 1.0, partners=partners)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_only_the_given_generator_counts(self, seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.random.get_rng_state()
        mix = draw_mix(4, 1.0, np.random.default_rng(7))
        expected = np.random.default_rng(7)
        assert mix.lam == np.float32(expected.beta(1.0, 1.0))
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize(
        "alpha",
        [-1.0, float("nan"), float("inf"), "0.2", None, (0, 1), (1, 0.0), (1,), (1, 2, 3), (1, float("nan")), ("1", 1)],
    )
    def test_wrong_alpha(self, alpha):
        with pytest.raises(ValueError, match=r"finite number >= 0 .*pair \(a, b\) of numbers > 0.*, got"):
            draw_mix(4, alpha)

    @given(st.floats(1e-4, 1e3), st.integers(1, 50), st.integers(0, 2**31))
    @settings(max_examples=100, deadline=None)
    def test_any_draw_is_a_draw(self, alpha, n, seed):
        mix = draw_mix(n, alpha, torch.Generator().manual_seed(seed))
        assert 0 <= mix.lam <= 1
        assert sorted(mix.partners.tolist()) == list(range(n))


class TestMixing:
    def test_plain_loop_equals_a_hand_written_one(self):
        net, (x, y) = ConvNet(), images(8)
        mix = draw_mix(8, 2.0)
        with mixing(net.layer1, mix):
            logits = net(x)
        loss = F.cross_entropy(logits, mix.target(y))
        gradients = torch.autograd.grad(loss, list(net.parameters()))

        before, after = net.states(x)["model.layer1"]
        logits = after(formula(before(x), mix))
        by_hand = mix.lam * F.cross_entropy(logits, y) + (1 - mix.lam) * F.cross_entropy(logits, y[mix.partners])
        torch.testing.assert_close(loss.item(), by_hand.item())
        torch.testing.assert_close(gradients, torch.autograd.grad(by_hand, list(net.parameters())))

    @pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.tensor([0.3, 0.9, 0.1, 0.6])])
    def test_repeated_partners_equal_a_hand_written_loop(self, lam):
        """Nearest neighbours, class-balanced and the like: a sample is the partner of several others, or of none."""
        net, (x, _) = ConvNet(), images(4)
        value = torch.rand(4, net(x).shape[1])
        mix = Mix(lam, torch.tensor([1, 1, 0, 1]))
        with mixing(net.layer1, mix):
            loss = F.mse_loss(net(x), mix.target(value))
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        before, after = net.states(x)["model.layer1"]
        by_hand = F.mse_loss(after(formula(before(x), mix)), formula(value, mix))
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(gradients, torch.autograd.grad(by_hand, list(net.parameters())))

    def test_is_open_while_the_context_is(self):
        net, x = ConvNet(), images(4)[0]
        assert not mixing_is_open()
        with mixing(net.layer1, MIX):
            with mixing(net.layer2, MIX):
                net(x)
            assert mixing_is_open()
        with pytest.raises(ZeroDivisionError), mixing(net.layer1, MIX):
            raise ZeroDivisionError
        assert not mixing_is_open()

    def test_hook_is_gone_also_after_an_exception(self):
        net = ConvNet()
        with pytest.raises(ZeroDivisionError), mixing(net.layer1, MIX):
            raise ZeroDivisionError
        assert not net.layer1._forward_hooks

    def test_what_is_no_layer_or_no_tensor_is_refused(self):
        mix = draw_mix(2)
        refused = pytest.raises(TypeError, match=r"Expected a layer, an nn.Module, got 'body.0': `model.get_submodule")
        with refused, mixing("body.0", mix):
            pass
        for labels in ([0, 1], torch.tensor([0, 1]).numpy(), "ab", None):
            with pytest.raises(TypeError, match=r"Expected labels in tensors \(`torch.tensor\(labels\)`\), got"):
                mix.target(labels)

    def test_a_layer_that_was_not_called_is_an_error(self):
        net = ConvNet()
        with pytest.raises(MixingError, match="Sequential was not called in training mode"), mixing(net.layer1, MIX):
            pass

    def test_teachers_are_not_mixed(self):
        net, x = ConvNet(), images(4)[0]
        plain = net(x)
        with mixing(net.layer1, MIX):
            net(x)
            with torch.no_grad():
                assert torch.equal(net(x), plain)
            net.eval()
            net(x).sum().backward()
            torch.testing.assert_close(net(x), net(x))
            evaluated = net(x)
        assert torch.equal(evaluated, net(x))

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("where", ["around", "inside"])
    def test_activation_checkpointing(self, reentrant, where):
        net, (x, y) = (
            nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 5)), nn.Linear(5, 3)),
            (
                torch.randn(4, 5),
                torch.tensor([0, 1, 2, 1]),
            ),
        )
        layer = net[1] if where == "around" else net[1][0]

        def run(through):
            net.zero_grad()
            with mixing(layer, MIX):
                loss = F.cross_entropy(net[2](through(net[0](x))), MIX.target(y))
                loss.backward()
            return [loss.item(), *(p.grad.clone() for p in net.parameters())]

        torch.testing.assert_close(run(lambda h: checkpoint(net[1], h, use_reentrant=reentrant)), run(net[1]))

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("layers", [1, 4])
    def test_lstm_states_have_their_batch_dimension(self, batch_first, layers):
        """Also where the number of LSTM layers or the length of the sequence is that of the samples."""
        lstm = nn.LSTM(3, 6, layers, batch_first=batch_first)
        x = torch.randn(4, 4, 3)
        output, (h, c) = lstm(x)
        with mixing(lstm, MIX):
            mixed_output, (mixed_h, mixed_c) = lstm(x)
        dim = 0 if batch_first else 1
        torch.testing.assert_close(mixed_output, formula(output.transpose(0, dim)).transpose(0, dim))
        torch.testing.assert_close(mixed_h, formula(h.transpose(0, 1)).transpose(0, 1))
        torch.testing.assert_close(mixed_c, formula(c.transpose(0, 1)).transpose(0, 1))


class TestUnmixed:
    def test_a_clean_pass_beside_the_mixed_one(self):
        """RegMixup by hand: the loss of the mixed batch plus that of the clean one, in one step."""
        net, (x, y) = ConvNet(), images(4)
        with mixing(net.layer1, MIX):
            with unmixed():
                clean = net(x)
            mixed = net(x)
        loss = F.mse_loss(mixed, MIX.target(F.one_hot(y, mixed.shape[1]).float())) + F.cross_entropy(clean, y)
        gradients = torch.autograd.grad(loss, list(net.parameters()))

        before, after = net.states(x)["model.layer1"]
        target = formula(F.one_hot(y, mixed.shape[1]).float())
        by_hand = F.mse_loss(after(formula(before(x))), target) + F.cross_entropy(net(x), y)
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(gradients, torch.autograd.grad(by_hand, list(net.parameters())))

    def test_is_over_also_after_an_exception(self):
        with pytest.raises(ZeroDivisionError), unmixed(), unmixed():
            raise ZeroDivisionError
        assert not is_unmixed()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_recomputed_layers_stay_unmixed_while_it_is_open(self, reentrant):
        layer, x = nn.Sequential(nn.Linear(5, 5), nn.Tanh()), torch.randn(4, 5, requires_grad=True)
        with mixing(layer[0], MIX):
            layer(x)
            with unmixed():
                checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
        torch.testing.assert_close(x.grad, expected)

    def test_compiled(self):
        """One graph with the mix and one without, however often the two change."""
        net, x, graphs = nn.Sequential(nn.Linear(5, 5), nn.Tanh()), torch.randn(4, 5), CompileCounter()
        hook = MixingHook(dims=[0])
        net[0].register_forward_hook(hook)
        compiled = torch.compile(net, backend=graphs, fullgraph=True)
        for _ in range(3):
            hook.arm((MIX,))
            torch.testing.assert_close(compiled(x), formula(F.linear(x, *net[0].parameters())).tanh())
            with unmixed():
                torch.testing.assert_close(compiled(x), F.linear(x, *net[0].parameters()).tanh())
        assert graphs.frame_count == 2

    def test_opened_within_a_compiled_function(self):
        net, x = nn.Linear(5, 5), torch.randn(4, 5)
        hook = MixingHook()
        net.register_forward_hook(hook)
        hook.arm((MIX,))

        def step(x):
            with unmixed():
                clean = net(x)
            return clean, net(x)

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        if torch_version() < (2, 8):  # its compiler knows no context managers of others, and says so
            with pytest.raises(torch._dynamo.exc.Unsupported, match="unmixed"):
                compiled(x)
            return
        clean, mixed = compiled(x)
        expected = F.linear(x, *net.parameters())
        torch.testing.assert_close((clean, mixed), (expected, formula(expected)))
        assert not is_unmixed()


def test_draw_names_the_layer():
    assert Draw("input", MIX).mix is MIX
    with pytest.raises(dataclasses.FrozenInstanceError):
        Draw("input", MIX).layer = "model.layer1"

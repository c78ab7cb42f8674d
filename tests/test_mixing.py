import collections
import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_manifold_mixup import Mix, MixedTarget, MixingError, draw_mix, mixing
from tests.helpers import ConvNet, images

MIX = Mix(torch.tensor(0.3), torch.tensor([2, 0, 3, 1]))


def formula(h, mix=MIX):
    return mix.lam * h + (1 - mix.lam) * h[mix.partners]


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

    def test_gradcheck_and_gradgradcheck(self):
        h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(MIX, (h,))
        assert torch.autograd.gradgradcheck(MIX, (h,))

    def test_gradient_equals_that_of_the_formula(self):
        h = torch.randn(4, 6, requires_grad=True)
        weight = torch.randn(4, 6)
        ours = torch.autograd.grad((MIX(h) * weight).sum(), h)[0]
        torch.testing.assert_close(ours, torch.autograd.grad((formula(h) * weight).sum(), h)[0])

    def test_saves_no_activation(self):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            MIX(torch.randn(4, 1000, requires_grad=True))
        assert sum(saved) <= 5  # lam and the permutation

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

    def test_channels_last_stays(self):
        h = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
        mixed = MIX(h)
        torch.testing.assert_close(mixed, formula(h))
        assert mixed.is_contiguous(memory_format=torch.channels_last)

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

    def test_floats_are_mixed(self):
        y = torch.rand(4, 3)
        target = MIX.target(y)
        assert type(target) is torch.Tensor
        torch.testing.assert_close(target, formula(y))

    def test_structure(self):
        target = MIX.target({"class": torch.arange(4), "value": torch.rand(4)})
        assert isinstance(target["class"], MixedTarget)
        assert type(target["value"]) is torch.Tensor

    def test_refusals(self):
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

    @pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
    def test_wrong_alpha(self, alpha):
        with pytest.raises(ValueError, match="Expected alpha to be a finite number >= 0"):
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

    def test_hook_is_gone_also_after_an_exception(self):
        net = ConvNet()
        with pytest.raises(ZeroDivisionError), mixing(net.layer1, MIX):
            raise ZeroDivisionError
        assert not net.layer1._forward_hooks

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

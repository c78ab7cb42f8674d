"""The arithmetic of the mix: against the formula in double precision, on every path that computes it."""

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_manifold_mixup import Mix
from lightning_manifold_mixup._step.mix import interpolation
from lightning_manifold_mixup._step.mix.interpolation import interpolate

LAMS = [0.0, 0.3, 0.5, 0.8, 1.0]
NO_TRITON = importlib.util.find_spec("triton") is None

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; the kernel runs in Triton's interpreter"
    ),
]


def formula(h: Tensor, lam: Tensor, partners: Tensor, dim: int, transposed: bool = False) -> Tensor:
    """The definition, by a matrix: row i has lam in column i and 1 - lam in the column of the partner of i."""
    n = len(partners)
    lam = lam.double().expand(n)
    matrix = torch.diag(lam)
    matrix[range(n), partners] += 1 - lam
    mixed = torch.tensordot(matrix.T if transposed else matrix, h.double().movedim(dim, 0), 1).movedim(0, dim)
    return mixed.to(h.dtype)


def draw(n: int, lam: float = 0.3) -> tuple[Tensor, Tensor]:
    return torch.tensor(lam), torch.randperm(n, generator=torch.Generator().manual_seed(n))


def draws(n: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """One lam and one for each sample, with a permutation (promised or not) and with partners that repeat."""
    generator = torch.Generator().manual_seed(n)
    repeated = torch.randint(n, (n,), generator=generator)
    per_sample = torch.rand(n, generator=generator)
    per_sample[: len(LAMS)] = torch.tensor(LAMS[:n])
    for lam in (*map(torch.tensor, LAMS), per_sample):
        permutation = torch.randperm(n, generator=generator)
        yield from ((lam, permutation, True), (lam, permutation, False), (lam, repeated, False))


@pytest.fixture(params=["rows", "gathered", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way to compute it on the CPU: row by row, as a whole, or by the operations that other devices take."""
    if request.param == "plain":
        monkeypatch.setattr(interpolation, "HOSTS", set())
    else:
        monkeypatch.setattr(interpolation, "ROW_BYTES", 4 if request.param == "rows" else 1 << 60)
    return request.param


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), [((6, 4, 3, 2), 0), ((5, 6, 7), 1), ((3, 4, 5), -1), ((9,), 0), ((1, 5), 0)])
def test_agrees_with_the_formula(
    path: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, transposed: bool
) -> None:
    h = torch.randn(shape).to(dtype)
    for lam, partners, permutation in draws(shape[dim]):
        mixed = interpolate(h, lam, partners, dim, transposed=transposed, permutation=permutation)
        torch.testing.assert_close(mixed, formula(h, lam, partners, dim, transposed))
        assert mixed.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(path: str, dtype: torch.dtype) -> None:
    """Double precision rounded once: bit for bit. Arithmetic in half precision is off in about every second element."""
    h = torch.randn(32, 100).to(dtype)
    lam, partners = draw(32, 0.3)
    for each in (lam, lam.expand(32)):
        expected = torch.lerp(h[partners].double(), h.double(), lam.double()).to(dtype)
        assert torch.equal(interpolate(h, each, partners), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """All samples have one partner. Summed in half precision, the sum stops growing."""
    gradient = torch.ones(3000, 2, dtype=dtype)
    sums = interpolate(gradient, torch.tensor(0.5), torch.zeros(3000, dtype=torch.long), transposed=True)
    assert torch.equal(sums[0], torch.full((2,), 1500.5).to(dtype))


@pytest.mark.parametrize("threads", [1, 4])
def test_sums_over_repeated_partners_come_out_the_same_each_time(threads: int) -> None:
    """Also without `use_deterministic_algorithms`, and bit for bit by any number of threads."""
    gradient = torch.randn(64, 1 << 14, generator=torch.Generator().manual_seed(0))
    lam, partners = torch.tensor(0.3), torch.arange(64) % 3
    before = torch.get_num_threads()
    expected = interpolate(gradient, lam, partners, transposed=True)
    torch.set_num_threads(threads)
    try:
        for _ in range(10):
            assert torch.equal(interpolate(gradient, lam, partners, transposed=True), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["permutation", "repeated"])
def test_deterministic_algorithms_have_no_complaint(path: str, kind: str) -> None:
    lam = torch.rand(6)
    partners = torch.tensor([2, 0, 1, 4, 3, 5] if kind == "permutation" else [2, 0, 2, 2, 3, 0])
    h = torch.randn(6, 5, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        Mix(lam, partners)(h).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    mixed = formula(h.detach(), lam, partners, 0)
    torch.testing.assert_close(h.grad, formula(2 * mixed, lam, partners, 0, transposed=True))


def test_lam_one_and_zero_are_exact(path: str) -> None:
    h = torch.randn(8, 5)
    _, partners = draw(8)
    assert torch.equal(interpolate(h, torch.tensor(1.0), partners), h)
    assert torch.equal(interpolate(h, torch.tensor(0.0), partners), h[partners])


@pytest.mark.parametrize(
    "h",
    [
        pytest.param(torch.randn(6, 4, 3, 2).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(torch.randn(6, 4, 3, 2, 2).to(memory_format=torch.channels_last_3d), id="channels_last_3d"),
        pytest.param(torch.randn(4, 6, 3).transpose(0, 1), id="transposed"),
        pytest.param(torch.randn(3, 4, 6).permute(2, 0, 1), id="samples innermost"),
    ],
)
def test_strides_are_kept(path: str, h: Tensor) -> None:
    lam, partners = draw(6)
    for each in (lam, torch.rand(6)):
        mixed = interpolate(h, each, partners)
        torch.testing.assert_close(mixed, formula(h, each, partners, 0))
        assert mixed.stride() == h.stride()


@pytest.mark.parametrize(
    "h",
    [
        pytest.param(torch.randn(6, 4, 8)[:, :, ::2], id="slice"),
        pytest.param(torch.randn(12, 4)[::2], id="every second"),
        pytest.param(torch.randn(6, 1).expand(6, 5), id="expanded"),
        pytest.param(torch.randn(1, 5).expand(6, 5), id="expanded samples"),
        pytest.param(torch.randn(6, 0), id="empty"),
    ],
)
def test_any_strides_are_read(path: str, h: Tensor) -> None:
    for lam, partners, permutation in draws(6):
        for transposed in (False, True):
            mixed = interpolate(h, lam, partners, 0, transposed=transposed, permutation=permutation)
            torch.testing.assert_close(mixed, formula(h, lam, partners, 0, transposed))


def test_the_input_is_left_alone(path: str) -> None:
    h = torch.randn(6, 4)
    before = h.clone()
    interpolate(h, *draw(6))
    assert torch.equal(h, before)


def test_every_row_comes_before_its_partner_in_a_cycle() -> None:
    assert interpolation.along_cycles([2, 0, 1, 4, 3, 5]) == [0, 2, 1, 3, 4, 5]
    assert interpolation.along_cycles([1, 1, 0, 2]) == [0, 1, 2, 3]


def test_a_large_state_needs_no_temporary() -> None:
    """All that is allocated, apart from the result, is less than a tenth of it."""
    h = torch.randn(16, 1 << 17)
    lam, partners = draw(16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        interpolate(h, lam, partners)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert h.nbytes <= allocated < 1.1 * h.nbytes


def test_compiled_without_graph_breaks() -> None:
    compiled = torch.compile(interpolate, fullgraph=True, backend="aot_eager")
    h = torch.randn(8, 5)
    for lam, partners, permutation in list(draws(8))[-3:]:
        for transposed in (False, True):
            mixed = compiled(h, lam, partners, 0, transposed=transposed, permutation=permutation)
            torch.testing.assert_close(mixed, formula(h, lam, partners, 0, transposed))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_under_torch_compile(backend: str, per_sample: bool) -> None:
    """Torch 2.11 gives a custom autograd.Function within a compiled graph a zero gradient."""
    torch._dynamo.reset()
    w, h = torch.randn(6, 3), torch.randn(6, 3, requires_grad=True)
    lam = torch.rand(6) if per_sample else torch.tensor(0.75)
    for partners in (torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([1, 1, 3, 3, 3, 0])):
        mix = Mix(lam, partners)
        compiled = torch.compile(lambda h, mix=mix: (mix(h * 2) * w).sum(), backend=backend, fullgraph=True)
        loss = compiled(h)
        torch.testing.assert_close(loss, (formula(2 * h, lam, partners, 0) * w).sum())
        (gradient,) = torch.autograd.grad(loss, h)
        torch.testing.assert_close(gradient, 2 * formula(w, lam, partners, 0, transposed=True))


# ------------------------------------------------------------------------------------------------------- the kernel

IN_INTERPRETER = """
import contextlib, torch
from lightning_manifold_mixup._step.mix import interpolation, kernels

torch.cuda.device = lambda device: contextlib.nullcontext()
for shape, dim in [((6, 4, 3), 0), ((3, 6, 7), 1), ((2, 3, 5), 2), ((4, 5000), 0), ((9,), 0), ((1, 5), 0), ((6, 0), 0)]:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for transposed in (False, True):
            n = shape[dim]
            for lam in (*map(torch.tensor, (0.0, 0.3, 1.0)), torch.rand(n), torch.rand(n).double()):
                h, permutation = torch.randn(shape).to(dtype), torch.rand(()) < 0.5 or transposed
                partners = torch.randperm(n) if permutation else torch.randint(n, (n,))
                mixed = kernels.interpolate(h, lam, partners, dim, transposed=transposed)
                how = {"transposed": transposed, "permutation": permutation}
                expected = interpolation.by_operations(h, lam, partners, dim, **how)
                # The interpreter truncates where a GPU rounds to nearest: one unit in the last place of the result, and
                # of what is added up to it, which is larger where it cancels.
                added = interpolation.by_operations(h.abs(), lam, partners, dim, **how)
                assert ((mixed - expected).abs() <= 2 * torch.finfo(dtype).eps * added).all()

mixed = kernels.interpolate(torch.ones(4, 3), torch.tensor(0.5), torch.tensor([1, 4, 0, -1]), 0, transposed=False)
assert mixed.isnan().all(1).tolist() == [False, True, False, True]
"""


@pytest.mark.skipif(NO_TRITON, reason="needs Triton")
def test_kernel_in_the_interpreter_agrees_with_the_plain_operations() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", IN_INTERPRETER], env=environment, check=True, timeout=300)


@pytest.mark.skipif(NO_TRITON, reason="needs Triton")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("dtype", "words"), [("fp32", "v4"), ("bf16", "v4"), ("fp64", "v2")])
def test_kernel_compiles_to_wide_loads_and_stores(dtype: str, words: str, per_sample: bool) -> None:
    """Triton compiles for a GPU that is not there; 16 bytes at a time is what reaches the bandwidth of the memory."""
    triton = importlib.import_module("triton")
    source = importlib.import_module("triton.compiler").ASTSource
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    from lightning_manifold_mixup._step.mix.kernels import mix_rows

    constants = {"transposed": True, "per_sample": per_sample, "double": dtype == "fp64", "block": 2048}
    signature = {
        **{
            "h_pointer": f"*{dtype}",
            "mixed_pointer": f"*{dtype}",
            "lam_pointer": "*fp32",
            "partners_pointer": "*i64",
        },
        **dict.fromkeys(("samples", "inner", "blocks"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)}  # the pointers, and `inner`
    kernel = source(mix_rows, signature, constants, aligned)
    options = {"enable_fp_fusion": True}
    assembly = triton.compile(kernel, target=target("cuda", 90, 32), options=options).asm["ptx"]
    assert f"ld.global.{words}" in assembly
    assert f"st.global.{words}" in assembly


@pytest.fixture
def no_kernel_known() -> Iterator[None]:
    interpolation.kernel_for.cache_clear()
    yield
    interpolation.kernel_for.cache_clear()


@pytest.mark.usefixtures("no_kernel_known")
def test_without_triton_the_plain_operations_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_manifold_mixup._step.mix.kernels", None)
    assert interpolation.kernel_for(torch.device("cpu")) is None


@pytest.mark.usefixtures("no_kernel_known")
def test_a_triton_that_does_not_work_is_said_once_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton raises in a container without a C compiler."""

    def broken(*args: object, **how: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setitem(
        sys.modules, "lightning_manifold_mixup._step.mix.kernels", types.SimpleNamespace(interpolate=broken)
    )
    with pytest.warns(UserWarning, match=r"Failed to find C compiler.*twice as long"):
        assert interpolation.kernel_for(torch.device("cpu")) is None
    assert interpolation.kernel_for(torch.device("cpu")) is None  # a second warning would be an error here


def test_a_draw_on_the_host_mixes_a_state_on_a_device() -> None:
    """As in a loop of one's own, where nobody has moved the draw. A meta tensor stands for one on a device."""
    assert interpolate(torch.empty(4, 3, device="meta"), *draw(4)).device.type == "meta"


class TestOnGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("shape", "dim"), [((128, 64, 8, 8), 0), ((50, 32, 768), 1), ((33, 5001), 0), ((7,), 0)])
    def test_kernel_agrees(self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, transposed: bool) -> None:
        h = torch.randn(shape).to(dtype)
        for lam, partners, permutation in draws(shape[dim]):
            for on in ("cuda", "cpu"):  # where the draw is
                mixed = interpolate(
                    h.cuda(), lam.to(on), partners.to(on), dim, transposed=transposed, permutation=permutation
                )
                torch.testing.assert_close(mixed.cpu(), formula(h, lam, partners, dim, transposed))

    @pytest.mark.parametrize("shape", [(257, 4099), (5000,)])
    def test_sums_over_repeated_partners_come_out_the_same_each_time(self, shape: tuple[int, ...]) -> None:
        gradient, lam, partners = torch.randn(shape).cuda(), torch.tensor(0.3).cuda(), torch.arange(shape[0]).cuda() % 3
        first, *others = [interpolate(gradient, lam, partners, transposed=True) for _ in range(10)]
        assert all(torch.equal(first, other) for other in others)

    def test_kernel_keeps_channels_last(self) -> None:
        h, (lam, partners) = torch.randn(8, 4, 3, 2).to(memory_format=torch.channels_last), draw(8)
        mixed = interpolate(h.cuda(), lam.cuda(), partners.cuda())
        assert mixed.stride() == h.stride()
        torch.testing.assert_close(mixed.cpu(), formula(h, lam, partners, 0))

    def test_one_state_more_is_the_peak(self) -> None:
        h, (lam, partners) = torch.randn(64, 1 << 16, device="cuda"), draw(64)
        lam, partners = lam.cuda(), partners.cuda()
        interpolate(h, lam, partners)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        interpolate(h, lam, partners)
        assert torch.cuda.max_memory_allocated() - before < 1.01 * h.nbytes

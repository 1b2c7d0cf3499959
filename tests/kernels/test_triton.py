"""The Triton kernels equal the float64 definition: interpreted on a CPU, compiled on a GPU.

Every test runs on both (`make test`, `make test-gpu`) and with uninitialised memory full of NaN.
"""

import functools
import itertools
import math

import cldf_kernels
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.functional import normalize

pytest.importorskip("triton", reason="triton exists on Linux only")

from cldf_kernels import SupConLoss, triton_passes
from cldf_kernels.triton_kernels.tile_shapes import (
    backward_shape,
    forward_shape,
    has_symmetric_forward,
)

# the temperature of a test that names none
supcon_loss = functools.partial(cldf_kernels.supcon_loss, temperature=0.1)
supcon_reference = functools.partial(cldf_kernels.supcon_reference, temperature=0.1)

KERNELS = (
    "lse_forward_symmetric_kernel",
    "lse_forward_kernel",
    "lse_backward_kernel",
    "softplus_forward_kernel",
    "softplus_backward_kernel",
)
# 1 / (1 + 2^x) is 0 where 2^x overflows; NumPy, which interprets the kernels, tells about it
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
FP32 = {"loss_tolerance": 5e-6, "grad_tolerance": 5e-6}
FP16 = {"loss_tolerance": 2e-4, "grad_tolerance": 3e-3}


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module", autouse=True
)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.set_default_device(request.param)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(before)
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What the kernels do not write, a test sees."""

    def poisoned(make, *size, **options):
        made = make(*size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    class PoisonedTorch:
        """Stands in for torch in that module alone: torch caches what its constructors are."""

        def __getattr__(self, name):
            made = getattr(torch, name)
            return functools.partial(poisoned, made) if name in ("empty", "empty_like") else made

    monkeypatch.setattr(triton_passes, "torch", PoisonedTorch())


class Launches:
    """A kernel that remembers what it was launched with."""

    def __init__(self, kernel, name, seen):
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid):
        launch = self.kernel[grid]

        def remembered(*arguments, **constants):
            self.seen.append((self.name, constants))
            return launch(*arguments, **constants)

        return remembered


@pytest.fixture
def launches(monkeypatch):
    """Names and constants of all kernels launched so far."""
    seen = []
    for name in KERNELS:
        kernel = getattr(triton_passes, name)
        monkeypatch.setattr(triton_passes, name, Launches(kernel, name, seen))
    return seen


def make_pixels(num_pixels, num_features, num_classes=3, *, spread=0.5, seed=0):
    """Unit embeddings in float32 around one random direction per class, and their labels."""
    generator = torch.Generator("cpu").manual_seed(seed)
    options = {"generator": generator, "device": "cpu"}
    labels = torch.randint(0, num_classes, (num_pixels,), **options)
    centres = torch.randn(num_classes, num_features, dtype=torch.float64, **options)
    noise = torch.randn(num_pixels, num_features, dtype=torch.float64, **options)
    z = normalize(centres[labels] * spread + noise, dim=1).float()
    default = torch.get_default_device()
    return z.to(default), labels.to(default)


def value_and_grad(function, z, labels, **options):
    """Loss and gradient in float64; per-pixel losses are weighed into a sum."""
    z = z.detach().clone().requires_grad_()
    loss = function(z, labels, **options)
    upstream = torch.linspace(-0.5, 1.5, len(z), dtype=loss.dtype) if loss.ndim else None
    loss.backward(upstream)
    return loss.detach().double(), z.grad.double()


def triton_loss(z, labels, **options):
    return supcon_loss(z, labels, backend="triton", **options)


def relative_error(actual, expected):
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)


def assert_equals_definition(z, labels, *, loss_tolerance, grad_tolerance, **options):
    about_kernels = ("precision", "deterministic")
    exact_options = {
        name: value.double() if name == "bank" else value
        for name, value in options.items()
        if name not in about_kernels
    }
    exact, exact_grad = value_and_grad(supcon_reference, z.double(), labels, **exact_options)
    ours, our_grad = value_and_grad(triton_loss, z, labels, **options)
    torch.testing.assert_close(ours, exact, rtol=loss_tolerance, atol=loss_tolerance)
    assert relative_error(our_grad, exact_grad) <= grad_tolerance or our_grad.norm() < 1e-6


def as_stored(z, temperature, precision):
    """Embeddings that the kernels store without rounding."""
    scale = math.sqrt(math.log2(math.e) / temperature)
    stored = (z.double() * scale).to(triton_passes.STORED[precision])
    if precision == "tf32":
        stored = ((stored.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return (stored.double() / scale).float()


@pytest.mark.parametrize("num_pixels", [1, 2, 127, 129, 1000])
@pytest.mark.parametrize("num_features", [1, 17, 64, 256])
def test_ragged_shapes_equal_the_definition(num_pixels, num_features):
    z, labels = make_pixels(num_pixels, num_features)
    z = as_stored(z, 0.07, "fp16")
    assert_equals_definition(z, labels, temperature=0.07, loss_tolerance=5e-6, grad_tolerance=3e-4)
    if num_pixels < 1000:
        assert_equals_definition(z, labels, temperature=0.07, precision="fp32", **FP32)


@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "grad_tolerance"),
    [("fp16", 2e-6, 3e-4), ("bf16", 2e-6, 1.5e-2), ("tf32", 2e-6, 3e-4), ("fp32", 2e-6, 3e-6)],
)
@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("temperature", [0.07, 0.005], ids=["plain", "online"])
def test_every_precision_of_every_kernel(
    launches, precision, loss_tolerance, grad_tolerance, negatives, temperature
):
    """Against the definition on the numbers as they are stored."""
    z, labels = make_pixels(270, 40)
    z = as_stored(z, temperature, precision)
    online = temperature < 0.01
    options = {"temperature": temperature, "negatives": negatives, "precision": precision}
    widen = 10 if online else 1  # scores of 200 are rounded relative to their size
    assert_equals_definition(
        z,
        labels,
        loss_tolerance=loss_tolerance * widen,
        grad_tolerance=grad_tolerance * (2 if precision != "fp32" else widen),
        **options,
    )
    expected = ["lse_forward_kernel", "softplus_forward_kernel", "lse_backward_kernel"]
    expected = [*expected, "softplus_backward_kernel"] if negatives == "other" else expected[::2]
    architecture = triton_passes.architecture(z.device)
    if negatives == "all" and not online and has_symmetric_forward(architecture):
        expected[0] = "lse_forward_symmetric_kernel"
    assert [name for name, _ in launches] == expected
    for name, constants in launches:
        assert constants["FEATURES"] == 64
        assert constants["PRECISION"] == triton_passes.INPUT_PRECISION[precision]
        assert constants.get("ONLINE", online) == online
        shape_of = backward_shape if "backward" in name else forward_shape
        shape = shape_of(architecture, precision, 64)
        tile = (constants["BLOCK_QUERIES"], constants["BLOCK_KEYS"])
        assert tile == (shape.block_queries, shape.block_keys)


OPTIONS = list(itertools.product(["all", "other"], [False, True], [False, True], [0.1, 0.004]))


@pytest.mark.parametrize(("negatives", "grouped", "banked", "temperature"), OPTIONS)
def test_every_combination_of_options_equals_the_definition(
    negatives, grouped, banked, temperature
):
    z, labels = make_pixels(170, 8)
    labels[::7] = -1
    generator = torch.Generator("cpu").manual_seed(1)
    draw = functools.partial(torch.randint, generator=generator, device="cpu")
    options = {"negatives": negatives, "temperature": temperature, "precision": "fp32"}
    if grouped:
        options["group"] = draw(5, 9, (170,), dtype=torch.int32).to(z.device)
    if banked:
        bank, bank_labels = make_pixels(70, 8, 5, seed=2)
        bank_labels[bank_labels == 3] = -1
        options |= {"bank": bank, "bank_labels": bank_labels}
    reduction = ["mean", "sum", "none"][
        OPTIONS.index((negatives, grouped, banked, temperature)) % 3
    ]
    weight = torch.rand(170, generator=generator, device="cpu").to(z.device)
    tolerances = FP32 if temperature > 0.01 else {"loss_tolerance": 2e-4, "grad_tolerance": 2e-4}
    assert_equals_definition(z, labels, reduction=reduction, weight=weight, **options, **tolerances)


@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.004])
def test_blocks_may_divide_their_keys(monkeypatch, launches, negatives, grouped, temperature):
    z, labels = make_pixels(300, 8)
    bank, bank_labels = make_pixels(150, 8, seed=3)
    options = {"negatives": negatives, "temperature": temperature, "precision": "fp16"}
    options |= {"bank": bank, "bank_labels": bank_labels}
    if grouped:
        options["group"] = torch.arange(300) % 2
    expected, expected_grad = value_and_grad(triton_loss, z, labels, **options)
    monkeypatch.setattr(triton_passes, "num_processors", lambda _: 9)
    blocks = triton_passes.TritonPasses._blocks
    parts = []

    def remembered(*arguments):
        parts.append(blocks(*arguments)[1])
        return blocks(*arguments)

    monkeypatch.setattr(triton_passes.TritonPasses, "_blocks", remembered)
    loss, grad = value_and_grad(triton_loss, z, labels, **options)
    assert min(parts) > 1
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert relative_error(grad, expected_grad) < 1e-4  # fp16 weights round the other way at times


@pytest.mark.parametrize("temperature", [0.07, 0.004])
@pytest.mark.parametrize("negatives", ["all", "other"])
def test_deterministic_owns_rows_and_repeats_to_the_last_bit(launches, temperature, negatives):
    z, labels = make_pixels(400, 16)
    options = {"temperature": temperature, "negatives": negatives, "deterministic": True}
    first, first_grad = value_and_grad(triton_loss, z, labels, **options)
    second, second_grad = value_and_grad(triton_loss, z, labels, **options)
    assert torch.equal(first, second)
    assert torch.equal(first_grad, second_grad)
    assert "lse_forward_symmetric_kernel" not in {name for name, _ in launches}


def test_deterministic_algorithms_of_torch_imply_it(launches):
    z, labels = make_pixels(50, 4)
    torch.use_deterministic_algorithms(True)
    try:
        triton_loss(z, labels)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, _ in launches] == ["lse_forward_kernel"]


@pytest.mark.parametrize("temperature", [1e-4, 0.02, 0.03, 1.0, 1e4])
@pytest.mark.parametrize("negatives", ["all", "other"])
def test_extreme_temperatures_equal_the_definition(temperature, negatives):
    z, labels = make_pixels(140, 16)
    rounding = 2e-6 + 1e-7 / temperature if temperature < 0.017 else 1e-4
    assert_equals_definition(
        z,
        labels,
        temperature=temperature,
        negatives=negatives,
        loss_tolerance=4 * rounding,
        grad_tolerance=40 * rounding,
    )


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 3.0, 300.0])
def test_embeddings_need_not_be_normalised(scale):
    z, labels = make_pixels(140, 6)
    tolerances = FP16
    if scale == 300:  # scores of a million, in float32
        tolerances = {"loss_tolerance": 2e-3, "grad_tolerance": 3e-2}
    assert_equals_definition(z * scale, labels, **tolerances)


@pytest.mark.parametrize("negatives", ["all", "other"])
def test_well_separated_classes_keep_their_small_gradient(negatives):
    """Attraction and repulsion cancel there; the error is measured against what cancels."""
    z, labels = make_pixels(300, 32, spread=8.0)
    options = {"temperature": 0.1, "negatives": negatives}
    exact, exact_grad = value_and_grad(supcon_reference, z.double(), labels, **options)
    cancelling = 2 / (0.1 * math.sqrt(len(z)))  # norm of attraction alone
    assert exact_grad.norm() < 0.5 * cancelling
    for precision, share in (("fp32", 1e-6), ("fp16", 2e-3)):
        loss, grad = value_and_grad(triton_loss, z, labels, precision=precision, **options)
        torch.testing.assert_close(loss, exact, rtol=1e3 * share, atol=1e3 * share)
        assert (grad - exact_grad).norm() <= share * cancelling


@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labels", [[], [4], [0, 1, 2, 3], [-1, -1, -5], [2, 2, 2], [0, 1]])
def test_no_anchor_that_counts_gives_zero_attached_to_the_embeddings(labels, negatives, reduction):
    if negatives == "all" and labels == [2, 2, 2]:
        pytest.skip("these count")
    z = torch.randn(len(labels), 5).requires_grad_()
    loss = triton_loss(z, torch.tensor(labels).long(), negatives=negatives, reduction=reduction)
    assert loss.shape == ((len(labels),) if reduction == "none" else ())
    assert not loss.any()
    loss.sum().backward()
    assert not z.grad.any()


@pytest.mark.parametrize("negatives", ["all", "other"])
def test_unknown_pixels_change_nothing_and_get_exactly_zero_gradient(negatives):
    z, labels = make_pixels(90, 8)
    unknown = torch.arange(90) % 3 == 0
    labels[unknown] = -1
    z[unknown] = torch.nan
    options = {"negatives": negatives, "reduction": "none", "deterministic": True}
    losses, grad = value_and_grad(triton_loss, z, labels, **options)
    kept = triton_loss(z[~unknown], labels[~unknown], **options)
    assert not losses[unknown].any()
    assert not grad[unknown].any()
    assert torch.equal(losses[~unknown], kept.double())


def test_a_nan_in_a_labelled_pixel_reaches_the_loss():
    z, labels = make_pixels(20, 4)
    z[3] = torch.nan
    assert triton_loss(z, labels).isnan()


def test_non_contiguous_inputs_equal_contiguous_ones():
    z, labels = make_pixels(120, 8)
    strided = torch.stack([z.T, z.T], dim=2)[..., 0].T
    assert not strided.is_contiguous()
    options = {"deterministic": True}
    assert torch.equal(
        triton_loss(strided, torch.stack([labels, labels], dim=1)[:, 1], **options),
        triton_loss(z, labels, **options),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_get_half_precision_gradients(dtype):
    z, labels = make_pixels(100, 8)
    z = z.to(dtype)
    exact, exact_grad = value_and_grad(supcon_reference, z.double(), labels)
    leaf = z.clone().requires_grad_()
    loss = triton_loss(leaf, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-4, atol=0)
    assert relative_error(leaf.grad.double(), exact_grad) < torch.finfo(dtype).eps


def test_the_result_names_what_computed_it():
    z, labels = make_pixels(10, 4)

    def computed_by(loss):  # the node's name is gone with the loss
        return loss.grad_fn.name()

    assert "TritonSupCon" in computed_by(triton_loss(z.requires_grad_(), labels))
    auto = computed_by(supcon_loss(z, labels))
    assert ("TritonSupCon" if z.is_cuda else "TiledSupCon") in auto
    assert "TiledSupCon" in computed_by(supcon_loss(z, labels, backend="torch"))
    module = SupConLoss(backend="triton", temperature=0.2)
    assert "TritonSupCon" in computed_by(module(z, labels))


@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("banked", [False, True])
def test_a_temperature_is_learnt(negatives, banked):
    z, labels = make_pixels(90, 8)
    options = {"negatives": negatives}
    if banked:
        bank, bank_labels = make_pixels(30, 8, seed=4)
        options |= {"bank": bank, "bank_labels": bank_labels}
    exact = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    doubled = {name: value.double() if name == "bank" else value for name, value in options.items()}
    supcon_reference(z.double(), labels, temperature=exact, **doubled).backward()
    ours = torch.tensor([0.2], requires_grad=True)
    triton_loss(z, labels, temperature=ours, precision="fp32", **options).backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad.reshape(1), rtol=1e-4, atol=1e-6)


def test_tf32_rounds_to_nearest_before_tensor_cores_truncate():
    """What truncation would add to every score is a bias, not noise."""
    z, labels = make_pixels(200, 40)
    exact, exact_grad = value_and_grad(supcon_reference, z.double(), labels, temperature=0.07)
    loss, grad = value_and_grad(triton_loss, z, labels, temperature=0.07, precision="tf32")
    assert abs(loss - exact) < 2e-4
    assert 1e-5 < relative_error(grad, exact_grad) < 1.5e-3  # rounded, not more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("negatives", ["all", "other"])
def test_the_default_type_of_torch_changes_nothing(dtype, negatives):
    z, labels = make_pixels(60, 4)
    options = {"negatives": negatives, "deterministic": True}
    expected, expected_grad = value_and_grad(triton_loss, z, labels, **options)
    torch.set_default_dtype(dtype)
    try:
        loss, grad = value_and_grad(triton_loss, z, labels, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("options", [{}, {"negatives": "other"}, {"group": True}])
def test_the_default_device_of_torch_changes_nothing(options, device):
    z, labels = make_pixels(60, 4)
    if options.get("group"):
        options = {"group": labels}
    expected = triton_loss(z, labels, deterministic=True, **options)
    torch.set_default_device("meta")
    try:
        loss = triton_loss(z, labels, deterministic=True, **options)
    finally:
        torch.set_default_device(device)
    assert torch.equal(loss, expected)


def test_softmax_weights_stay_bounded_where_scores_exceed_float32():
    z, labels = make_pixels(60, 8)
    bank, bank_labels = make_pixels(20, 8, seed=1)
    options = {"bank": 2e4 * bank, "bank_labels": bank_labels}
    _, grad = value_and_grad(triton_loss, 2e4 * z, labels, **options)
    assert grad.isfinite().all()
    assert grad.norm() < 1e7  # each row is a few keys of 2e4, over the temperature of 0.1


def test_float64_is_refused():
    z, labels = make_pixels(4, 2)
    with pytest.raises(ValueError, match="does not take float64; use float32"):
        triton_loss(z.double(), labels)


@pytest.mark.parametrize("scale", [1e5, 1e-5])
def test_fp16_is_refused_where_it_would_overflow_or_vanish(scale):
    z, labels = make_pixels(4, 2)
    with pytest.raises(ValueError, match='precision="fp16" takes'):
        triton_loss(z * scale, labels, precision="fp16")


labelled_pixels = st.tuples(
    st.integers(2, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31)
)
PROPERTY = settings(
    max_examples=8,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@PROPERTY
@given(labelled_pixels, st.sampled_from(["all", "other"]))
def test_the_order_of_the_pixels_does_not_matter(shape, negatives):
    num_pixels, num_features, num_classes, seed = shape
    z, labels = make_pixels(num_pixels, num_features, num_classes, seed=seed)
    order = torch.randperm(num_pixels)
    options = {"negatives": negatives, "precision": "fp32"}
    loss, grad = value_and_grad(triton_loss, z, labels, **options)
    moved, moved_grad = value_and_grad(triton_loss, z[order], labels[order], **options)
    torch.testing.assert_close(moved, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-3, atol=1e-5)


@PROPERTY
@given(labelled_pixels, st.permutations([0, 7, 10**12, 3]), st.sampled_from(["all", "other"]))
def test_the_names_of_the_classes_do_not_matter(shape, names, negatives):
    num_pixels, num_features, num_classes, seed = shape
    z, labels = make_pixels(num_pixels, num_features, num_classes, seed=seed)
    options = {"negatives": negatives, "precision": "fp32"}
    loss, grad = value_and_grad(triton_loss, z, labels, **options)
    renamed, renamed_grad = value_and_grad(triton_loss, z, torch.tensor(names)[labels], **options)
    torch.testing.assert_close(renamed, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(renamed_grad, grad, rtol=1e-3, atol=1e-5)


@PROPERTY
@given(labelled_pixels)
def test_both_copies_of_a_duplicated_pixel_get_the_same_gradient(shape):
    num_pixels, num_features, num_classes, seed = shape
    z, labels = make_pixels(num_pixels, num_features, num_classes, seed=seed)
    _, grad = value_and_grad(
        triton_loss, torch.cat([z, z]), torch.cat([labels, labels]), precision="fp32"
    )
    torch.testing.assert_close(grad[:num_pixels], grad[num_pixels:], rtol=1e-4, atol=1e-6)

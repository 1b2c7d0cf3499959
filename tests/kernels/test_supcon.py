"""The tiled loss equals the float64 definition in value and gradient, and keeps its promises."""

import functools
import importlib.util
import itertools
import math

import cldf_kernels
import hypothesis.strategies as st
import pytest
import torch
from cldf_kernels import SupConLoss, torch_passes
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import normalize

# the temperature of a test that names none
supcon_loss = functools.partial(cldf_kernels.supcon_loss, temperature=0.1)
supcon_reference = functools.partial(cldf_kernels.supcon_reference, temperature=0.1)


def make_pixels(
    num_pixels, num_features, num_classes=3, *, spread=0.5, dtype=torch.float64, seed=0
):
    """Unit embeddings around one random direction per class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_pixels,), generator=generator)
    centres = torch.randn(num_classes, num_features, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_pixels, num_features, generator=generator, dtype=torch.float64)
    return normalize(centres[labels] * spread + noise, dim=1).to(dtype), labels


def value_and_grad(function, z, labels, upstream=None, **options):
    """The loss and d(upstream . loss)/dz, in float64."""
    z = z.detach().clone().requires_grad_()
    loss = function(z, labels, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    assert isinstance(z.grad, Tensor)
    return loss.detach().double(), z.grad.double()


def relative_error(actual, expected):
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)


def assert_equals_definition(z, labels, *, loss_tolerance, grad_tolerance, **options):
    """Compare the tiled path with the float64 definition on the same stored inputs."""
    exact_options = {
        name: value.double() if name == "bank" else value for name, value in options.items()
    }
    upstream = torch.linspace(0.5, 1.5, len(z)) if options.get("reduction") == "none" else None
    exact, exact_grad = value_and_grad(
        supcon_reference, z.double(), labels, upstream, **exact_options
    )
    ours, our_grad = value_and_grad(supcon_loss, z, labels, upstream, **options)
    # a loss whose exact value is 0 (one pair) cancels to rounding errors of 1 / temperature
    torch.testing.assert_close(ours, exact, rtol=loss_tolerance, atol=loss_tolerance)
    assert relative_error(our_grad, exact_grad) <= grad_tolerance or our_grad.norm() < 1e-12


FLOAT32 = {"loss_tolerance": 5e-6, "grad_tolerance": 5e-6}
FLOAT64 = {"loss_tolerance": 1e-12, "grad_tolerance": 1e-11}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_pixels", [1, 2, 127, 129, 1000])
@pytest.mark.parametrize("num_features", [1, 3, 17, 64, 256])
def test_ragged_shapes_equal_the_definition(num_pixels, num_features):
    z, labels = make_pixels(num_pixels, num_features)
    assert_equals_definition(z, labels, temperature=0.07, **FLOAT64)
    assert_equals_definition(z.float(), labels, temperature=0.07, **FLOAT32)


@pytest.mark.parametrize("num_pixels", [0, 1, 2, 130, 700])
@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_combination_of_options_equals_the_definition(num_pixels, negatives, reduction):
    generator = torch.Generator().manual_seed(1)
    z, labels = make_pixels(num_pixels, 8)
    labels = torch.where(torch.rand(num_pixels, generator=generator) < 0.2, -1, labels)
    bank, bank_labels = make_pixels(37, 8, 4, seed=2)
    weight = torch.rand(num_pixels, generator=generator)
    group = torch.randint(5, 9, (num_pixels,), generator=generator, dtype=torch.int32)
    choices = [
        {},
        {"weight": weight},
        {"group": group},
        {"bank": bank, "bank_labels": torch.where(bank_labels == 3, -1, bank_labels)},
    ]
    for chosen in itertools.product([0, 1], repeat=3):
        options = {"temperature": 0.1, "negatives": negatives, "reduction": reduction}
        for use, choice in zip(chosen, choices[1:], strict=True):
            options |= choice if use else {}
        assert_equals_definition(z, labels, **options, **FLOAT64)


@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (7, 3), (64, 16)])
def test_the_result_does_not_depend_on_the_tile_shape(monkeypatch, negatives, tile):
    z, labels = make_pixels(45, 4)
    bank, bank_labels = make_pixels(10, 4, seed=5)
    monkeypatch.setattr(torch_passes, "CPU_TILE", tile)
    for temperature in (0.1, 1e-3):
        options = {"temperature": temperature, "negatives": negatives}
        assert_equals_definition(
            z, labels, bank=bank, bank_labels=bank_labels, **options, **FLOAT64
        )


@pytest.mark.parametrize("temperature", [1e-4, 0.003, 0.02, 0.03, 1.0, 1e4])
@pytest.mark.parametrize("negatives", ["all", "other"])
def test_extreme_temperatures_equal_the_definition(temperature, negatives):
    z, labels = make_pixels(300, 16)
    options = {"temperature": temperature, "negatives": negatives}
    assert_equals_definition(z, labels, **options, loss_tolerance=1e-11, grad_tolerance=1e-8)
    # scores are rounded relative to 1 / temperature before they are subtracted
    rounding = 2e-6 + 1e-7 / temperature
    assert_equals_definition(
        z.float(), labels, **options, loss_tolerance=4 * rounding, grad_tolerance=20 * rounding
    )


@pytest.mark.parametrize("scale", [1e-3, 3.0, 30.0, 300.0])
def test_embeddings_need_not_be_normalised(scale):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 6, generator=generator, dtype=torch.float64) * scale
    assert_equals_definition(
        z, torch.arange(200) % 3, temperature=0.1, loss_tolerance=1e-12, grad_tolerance=1e-9
    )


@pytest.mark.parametrize("negatives", ["all", "other"])
def test_well_separated_classes_keep_their_small_gradient(negatives):
    """Attraction and repulsion cancel there; the error is measured against what cancels."""
    z, labels = make_pixels(600, 32, spread=8.0, dtype=torch.float32)
    options = {"temperature": 0.1, "negatives": negatives}
    exact_loss, exact = value_and_grad(supcon_reference, z.double(), labels, **options)
    loss, grad = value_and_grad(supcon_loss, z, labels, **options)
    cancelling = 2 / (0.1 * math.sqrt(len(z)))  # norm of attraction alone
    assert exact.norm() < 0.5 * cancelling
    assert (grad - exact).norm() < 1e-6 * cancelling
    torch.testing.assert_close(loss, exact_loss, rtol=0, atol=5e-6)


def test_two_pairs_by_hand():
    """Orthogonal pairs at temperature 1: L_i = log(e + 2) - 1."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    expected = torch.tensor(math.log(math.e + 2) - 1)
    torch.testing.assert_close(supcon_loss(z, labels, temperature=1.0), expected)
    other = torch.tensor(math.log1p(2 / math.e))
    torch.testing.assert_close(supcon_loss(z, labels, temperature=1.0, negatives="other"), other)


def test_one_class_only_equals_the_definition():
    z, _ = make_pixels(150, 8)
    assert_equals_definition(z, torch.full((150,), 7), temperature=0.1, **FLOAT64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("labels", "negatives"),
    [
        ([], "all"),
        ([4], "all"),
        ([0, 1, 2, 3], "all"),
        ([-1, -1, -5], "all"),
        ([], "other"),
        ([2, 2, 2], "other"),
        ([0, 1], "other"),
    ],
)
def test_no_anchor_that_counts_gives_zero_attached_to_the_embeddings(labels, negatives, reduction):
    z = torch.randn(len(labels), 5).requires_grad_()
    loss = supcon_loss(z, torch.tensor(labels).long(), negatives=negatives, reduction=reduction)
    assert loss.shape == ((len(labels),) if reduction == "none" else ())
    assert not loss.any()
    loss.sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("negatives", ["all", "other"])
def test_unknown_pixels_change_nothing_and_get_exactly_zero_gradient(negatives):
    z, labels = make_pixels(90, 8, dtype=torch.float32)
    unknown = torch.arange(90) % 3 == 0
    labels[unknown] = -1
    z[unknown] = torch.nan
    options = {"negatives": negatives, "reduction": "none"}
    losses, grad = value_and_grad(supcon_loss, z, labels, **options)
    kept_losses, kept_grad = value_and_grad(supcon_loss, z[~unknown], labels[~unknown], **options)
    assert not losses[unknown].any()
    assert not grad[unknown].any()
    assert torch.equal(losses[~unknown], kept_losses)
    assert torch.equal(grad[~unknown], kept_grad)


def test_a_nan_in_a_labelled_pixel_reaches_the_loss():
    z, labels = make_pixels(20, 4)
    z[3] = torch.nan
    assert supcon_loss(z, labels).isnan()


def test_non_contiguous_inputs_equal_contiguous_ones():
    z, labels = make_pixels(120, 8)
    strided = torch.stack([z.T, z.T], dim=2)[..., 0].T
    strided_labels = torch.stack([labels, labels], dim=1)[:, 1]
    assert not strided.is_contiguous()
    expected, expected_grad = value_and_grad(supcon_loss, z, labels)
    leaf = strided.detach().requires_grad_()
    loss = supcon_loss(leaf, strided_labels)
    loss.backward()
    assert loss == expected
    torch.testing.assert_close(leaf.grad, expected_grad, rtol=1e-12, atol=1e-15)


def test_reductions_agree_with_each_other():
    z, labels = make_pixels(50, 8)
    labels[0] = 9  # alone: does not count
    weight = torch.rand(50, dtype=torch.float64)
    values = supcon_loss(z, labels, weight=weight, reduction="none")
    unweighted = supcon_loss(z, labels, reduction="none")
    torch.testing.assert_close(values, weight * unweighted)
    torch.testing.assert_close(supcon_loss(z, labels, weight=weight, reduction="sum"), values.sum())
    torch.testing.assert_close(
        supcon_loss(z, labels, weight=weight), values.sum() / weight[1:].sum()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_its_gradient_comes_back_in_half(dtype):
    z, labels = make_pixels(100, 8, dtype=dtype)
    loss, grad = value_and_grad(supcon_loss, z, labels)
    exact, exact_grad = value_and_grad(supcon_reference, z.double(), labels)
    assert supcon_loss(z, labels).dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)
    assert relative_error(grad, exact_grad) < torch.finfo(dtype).eps


def test_autocast_does_not_lower_the_precision():
    z, labels = make_pixels(100, 8, dtype=torch.float32)
    plain = [value_and_grad(f, z, labels) for f in (supcon_loss, supcon_reference)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = [value_and_grad(f, z, labels) for f in (supcon_loss, supcon_reference)]
    assert mixed[0][0] == plain[0][0]
    assert mixed[1][0] == plain[1][0]
    assert torch.equal(mixed[0][1], plain[0][1])


@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("temperature", [0.5, 2e-3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_passes_gradcheck(monkeypatch, negatives, temperature, reduction):
    monkeypatch.setattr(torch_passes, "CPU_TILE", (4, 8))
    generator = torch.Generator().manual_seed(3)
    z = 0.9 * torch.randn(14, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1, 0, 0, 1, 1, 5, 2, -1])
    weight = torch.rand(14, generator=generator)
    bank = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return supcon_loss(
            z,
            labels,
            temperature=temperature,
            negatives=negatives,
            weight=weight,
            bank=bank,
            bank_labels=torch.tensor([0, 2, -1]),
            group=torch.arange(14) // 8,
            reduction=reduction,
        )

    eps = min(1e-6, temperature * 1e-4)
    assert torch.autograd.gradcheck(loss, z.requires_grad_(), eps=eps, atol=1e-4, rtol=1e-4)


def test_second_derivatives_are_refused_by_the_tiled_path_only():
    z, labels = make_pixels(20, 4)
    z.requires_grad_()
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.autograd.grad(supcon_loss(z, labels), z, create_graph=True)
    (grad,) = torch.autograd.grad(supcon_reference(z, labels), z, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), z)[0].norm() > 0


labelled_pixels = st.tuples(
    st.integers(2, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31)
)
PROPERTY = settings(max_examples=25, deadline=None, database=None, derandomize=True)


@PROPERTY
@given(labelled_pixels, st.sampled_from(["all", "other"]))
def test_the_order_of_the_pixels_does_not_matter(shape, negatives):
    num_pixels, num_features, num_classes, seed = shape
    z, labels = make_pixels(num_pixels, num_features, num_classes, seed=seed)
    order = torch.randperm(num_pixels, generator=torch.Generator().manual_seed(seed))
    loss, grad = value_and_grad(supcon_loss, z, labels, negatives=negatives)
    moved, moved_grad = value_and_grad(supcon_loss, z[order], labels[order], negatives=negatives)
    torch.testing.assert_close(moved, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-9, atol=1e-12)


@PROPERTY
@given(labelled_pixels, st.permutations([0, 7, 10**12, 3]), st.sampled_from(["all", "other"]))
def test_the_names_of_the_classes_do_not_matter(shape, names, negatives):
    num_pixels, num_features, num_classes, seed = shape
    z, labels = make_pixels(num_pixels, num_features, num_classes, seed=seed)
    loss, grad = value_and_grad(supcon_loss, z, labels, negatives=negatives)
    renamed = torch.tensor(names)[labels]
    other, other_grad = value_and_grad(supcon_loss, z, renamed, negatives=negatives)
    torch.testing.assert_close(other, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other_grad, grad, rtol=1e-9, atol=1e-12)


@PROPERTY
@given(labelled_pixels)
def test_one_group_each_is_the_sum_of_separate_losses(shape):
    num_pixels, num_features, num_classes, seed = shape
    z, labels = make_pixels(num_pixels, num_features, num_classes, seed=seed)
    group = torch.arange(num_pixels) % 3
    together = supcon_loss(z, labels, group=group, reduction="sum")
    parts = [supcon_loss(z[group == g], labels[group == g], reduction="sum") for g in range(3)]
    torch.testing.assert_close(together, torch.stack(parts).sum(), rtol=1e-10, atol=1e-12)


def test_agrees_with_pytorch_metric_learning():
    """It normalises inside: its gradient is ours projected on the tangent of the sphere."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, labels = make_pixels(200, 16)
    ours, our_grad = value_and_grad(supcon_loss, z, labels, temperature=0.07)
    theirs, their_grad = value_and_grad(losses.SupConLoss(temperature=0.07), z, labels)
    tangent = our_grad - (our_grad * z).sum(1, keepdim=True) * z
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert relative_error(tangent, their_grad) < 1e-6


@pytest.mark.parametrize("grouped", [False, True])
def test_agrees_with_the_published_formula_of_contrastive_segmentation(grouped):
    """Wang et al., ICCV 2021, eq. 3 as their code has it: each positive against all negatives.

    log_prob = logit - log(exp(logit) + sum of exp over negatives), mean over positives and anchors.
    """
    z, labels = make_pixels(150, 12)
    temperature = 0.07
    leaf = z.clone().requires_grad_()
    logits = leaf @ leaf.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    same = (labels[:, None] == labels).double()
    negatives = (logits.exp() * (1 - same)).sum(1, keepdim=True)
    positive = same - torch.eye(len(z), dtype=same.dtype)
    log_probability = logits - torch.log(logits.exp() + negatives)
    expected = -((positive * log_probability).sum(1) / positive.sum(1)).mean()
    expected.backward()
    options = {"group": torch.ones_like(labels)} if grouped else {}
    ours, our_grad = value_and_grad(
        supcon_loss, z, labels, temperature=temperature, negatives="other", **options
    )
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-12, atol=0)
    assert relative_error(our_grad, leaf.grad) < 1e-11


@pytest.mark.parametrize("negatives", ["all", "other"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_temperature_is_learnt(negatives, reduction, banked, shape):
    z, labels = make_pixels(60, 5)
    labels[::6] = -1
    options = {"negatives": negatives, "reduction": reduction, "group": torch.arange(60) % 2}
    if banked:
        bank, bank_labels = make_pixels(20, 5, seed=1)
        options |= {"bank": bank, "bank_labels": bank_labels}
    grads = []
    for function in (supcon_reference, supcon_loss):
        temperature = torch.full(shape, 0.2, dtype=torch.float64, requires_grad=True)
        leaf = z.clone().requires_grad_()
        loss = function(leaf, labels, temperature=temperature, **options)
        loss.backward(torch.linspace(0.5, 1, 60).double() if loss.ndim else None)
        assert temperature.grad.shape == shape
        grads.append((temperature.grad, leaf.grad))
    for actual, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_temperature_alone_can_be_learnt():
    z, labels = make_pixels(30, 4)
    temperature = torch.tensor(0.3, requires_grad=True)
    supcon_loss(z, labels, temperature=temperature).backward()
    assert temperature.grad.dtype == torch.float32
    assert temperature.grad.abs() > 0


def test_triton_says_where_it_cannot_run(monkeypatch):
    knobs = pytest.importorskip("triton.knobs", reason="triton exists on Linux only")
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=r'needs a GPU, or TRITON_INTERPRET=1.*backend="auto"'):
        supcon_loss(Z, LABELS, backend="triton")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else real(name)
    )
    with pytest.raises(RuntimeError, match="triton, which is not installed"):
        supcon_loss(Z, LABELS, backend="triton")
    assert not supcon_loss(Z, LABELS).isnan()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_auto_and_torch_run_the_tiled_path(backend):
    z, labels = make_pixels(10, 4)
    loss = supcon_loss(z.requires_grad_(), labels, backend=backend)
    assert "TiledSupCon" in loss.grad_fn.name()
    assert "TiledSupCon" not in supcon_reference(z, labels).grad_fn.name()


def test_deterministic_and_explicit_float32_are_accepted_and_repeat_to_the_last_bit():
    z, labels = make_pixels(400, 8, dtype=torch.float32)
    options = {"deterministic": True, "precision": "fp32"}
    first, first_grad = value_and_grad(supcon_loss, z, labels, **options)
    second, second_grad = value_and_grad(supcon_loss, z, labels, **options)
    assert torch.equal(first, second)
    assert torch.equal(first_grad, second_grad)


def test_module_trains_its_temperature_and_saves_its_bank():
    z, labels = make_pixels(30, 4)
    bank, bank_labels = make_pixels(8, 4, seed=1)
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    module = SupConLoss(temperature=temperature, bank=bank, bank_labels=bank_labels)
    assert list(module.parameters()) == [temperature]
    assert set(module.state_dict()) == {"temperature", "bank", "bank_labels"}
    expected = supcon_loss(z, labels, temperature=0.3, bank=bank, bank_labels=bank_labels)
    loss = module(z, labels)
    assert loss == expected
    loss.backward()
    assert temperature.grad.abs() > 0
    other = SupConLoss(temperature=temperature * 0, bank=bank * 0, bank_labels=bank_labels)
    other.load_state_dict(module.state_dict())
    assert other(z, labels) == expected


def test_float32_on_request_is_not_computed_in_half():
    z, labels = make_pixels(40, 4, dtype=torch.float16)
    exact = supcon_reference(z.double(), labels)
    loss = supcon_loss(z, labels, backend="reference", precision="fp32")
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 1e-5


def test_module_holds_the_keyword_arguments():
    z, labels = make_pixels(30, 4)
    module = SupConLoss(temperature=0.3, negatives="other")
    weight = torch.rand(30)
    expected = supcon_loss(z, labels, temperature=0.3, negatives="other", weight=weight)
    assert module(z, labels, weight=weight) == expected
    assert "temperature=0.3" in repr(module)
    with pytest.raises(TypeError, match="temprature"):
        SupConLoss(temperature=0.3, temprature=0.3)


Z, LABELS = torch.ones(4, 2), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embeddings": torch.ones(4, 2, 1)}, ValueError, r"\(4, 2, 1\)"),
        ({"embeddings": torch.ones(4, 257)}, ValueError, "1 to 256"),
        ({"embeddings": torch.ones(4, 0)}, ValueError, "1 to 256"),
        ({"embeddings": torch.ones(4, 2, dtype=torch.int64)}, TypeError, r"embeddings\.float\(\)"),
        ({"labels": LABELS[:3]}, ValueError, r"\(3,\)"),
        ({"labels": LABELS[:, None]}, ValueError, r"\(4, 1\)"),
        ({"labels": LABELS.float()}, TypeError, r"labels\.long\(\)"),
        ({"labels": LABELS > 0}, TypeError, "bool"),
        ({"labels": LABELS.to("meta")}, ValueError, "meta"),
        ({"temperature": 0.0}, ValueError, "> 0, got 0.0"),
        ({"temperature": -0.1}, ValueError, "-0.1"),
        ({"temperature": math.nan}, ValueError, "nan"),
        ({"temperature": math.inf}, ValueError, "inf"),
        ({"temperature": torch.tensor([0.1, 0.2])}, TypeError, r"one floating point.*\(2,\)"),
        ({"temperature": torch.tensor(1)}, TypeError, "int64"),
        ({"temperature": torch.tensor(-0.1)}, ValueError, "learn its logarithm"),
        ({"temperature": "0.1"}, TypeError, "str"),
        ({"deterministic": "no"}, TypeError, "True or False, got 'no'"),
        ({"process_group": "gloo"}, TypeError, "ProcessGroup that holds this rank"),
        ({"process_group": -100}, TypeError, "-100"),  # what new_group gives to other ranks
        ({"labels": [0, 0, 1, 1]}, TypeError, r"torch\.as_tensor\(labels\)"),
        ({"weight": [1.0] * 4}, TypeError, "weight must be a tensor, got list"),
        ({"embeddings": Z.numpy()}, TypeError, "embeddings must be a tensor, got ndarray"),
        ({"negatives": "some"}, ValueError, "'all', 'other'"),
        ({"reduction": "median"}, ValueError, "median"),
        ({"precision": "int8"}, ValueError, "int8"),
        ({"precision": "bf16"}, ValueError, 'precision="auto"'),
        ({"precision": "fp32", "embeddings": Z.double()}, ValueError, 'precision="auto"'),
        ({"backend": "cuda"}, ValueError, "cuda"),
        ({"weight": torch.ones(3)}, ValueError, "weight"),
        ({"weight": torch.ones(4).long()}, TypeError, "weight"),
        ({"weight": torch.tensor([1.0, -1.0, 1.0, 1.0])}, ValueError, "-1 to 1"),
        ({"weight": torch.tensor([1.0, torch.inf, 1.0, 1.0])}, ValueError, "finite"),
        ({"weight": torch.ones(4, requires_grad=True)}, ValueError, "detach"),
        ({"group": torch.ones(5).long()}, ValueError, "group"),
        ({"group": torch.ones(4)}, TypeError, "group"),
        ({"bank": Z}, ValueError, "bank_labels is missing"),
        ({"bank_labels": LABELS}, ValueError, "bank is missing"),
        ({"bank": Z.double(), "bank_labels": LABELS}, TypeError, "bank"),
        ({"bank": torch.ones(4, 3), "bank_labels": LABELS}, ValueError, "bank"),
        ({"bank": Z, "bank_labels": LABELS[:2]}, ValueError, "bank_labels"),
        ({"bank": Z.clone().requires_grad_(), "bank_labels": LABELS}, ValueError, "detach"),
    ],
)
def test_a_wrong_argument_is_named_with_rule_and_remedy(changes, error, message):
    arguments = {"embeddings": Z, "labels": LABELS} | changes
    with pytest.raises(error, match=message) as raised:
        supcon_loss(**arguments)
    assert str(raised.value).startswith("supcon_loss: ")

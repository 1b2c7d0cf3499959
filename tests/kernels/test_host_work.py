"""A loss asks the host for little: one wait for the device forward, none backward, few operations.

Counted on a CPU, whose class sums take about as many operations as those of a GPU.
"""

import functools
from contextlib import contextmanager
from dataclasses import dataclass, field

import cldf_kernels
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton exists on Linux only")

from cldf_kernels import block_schedule, segment_sum, triton_passes

# the temperature of a test that names none
supcon_loss = functools.partial(cldf_kernels.supcon_loss, temperature=0.1)

# on a GPU the host waits for the numbers that these return, or for the size of their result
WAITING = {"_local_scalar_dense", "_unique2", "bincount", "masked_select", "nonzero", "unique_dim"}
VIEWS = {"alias", "detach", "expand", "select", "slice", "squeeze", "unsqueeze", "view"}
ALLOCATIONS = {"empty", "empty_like", "new_empty"}


@dataclass
class Counts:
    """What a pass did, launches of kernels aside."""

    operations: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    tables: int = 0  # of blocks, sent to the device
    launches: list[str] = field(default_factory=list)


class Counting(TorchDispatchMode):
    """Counts until a kernel is interpreted, and again after it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts, self.paused = Counts(), False
        for name in ("cpu", "numpy", "tolist"):
            self._replace(monkeypatch, torch.Tensor, name, self.count_wait(name))
        self._replace(monkeypatch, block_schedule, "_copy_to_device", self.count_table)
        for name in [name for name in dir(triton_passes) if name.endswith("_kernel")]:
            kernel = getattr(triton_passes, name)
            monkeypatch.setattr(triton_passes, name, Launched(kernel, name, self))

    @staticmethod
    def _replace(monkeypatch, owner, name, before):
        original = getattr(owner, name)

        def replaced(*arguments, **options):
            before()
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, replaced)

    def count_wait(self, name):
        return lambda: None if self.paused else self.counts.waits.append(name)

    def count_table(self):
        self.counts.tables += 1

    @contextmanager
    def pause(self):
        self.paused = True
        yield
        self.paused = False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if not self.paused and name not in VIEWS | ALLOCATIONS:
            self.counts.operations.append(name)
            indices = arguments[1] if name in ("index", "index_put_") else []
            by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
            if name in WAITING or by_mask:
                self.counts.waits.append(name)
        return function(*arguments, **(options or {}))

    def taken(self, function):
        """The counts of one call, and what it returned."""
        self.counts = Counts()
        with self:
            result = function()
        return self.counts, result


class Launched:
    """A kernel whose launches are counted, and not what the interpreter does."""

    def __init__(self, kernel, name, counting):
        self.kernel, self.name, self.counting = kernel, name, counting

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.counting.counts.launches.append(self.name)
            with self.counting.pause():
                return self.kernel[grid](*arguments, **constants)

        return launch


def count_step(monkeypatch, *, unknown=False, weighted=False, **options):
    """Forward and backward of a step like the one before it."""
    counting = Counting(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    z = normalize(torch.randn(150, 64, generator=generator), dim=1).requires_grad_()
    labels = torch.arange(150) % 2
    if unknown:
        labels[::7] = -1
    if weighted:
        options["weight"] = torch.rand(150, generator=generator)
    for _ in range(2):
        forward, loss = counting.taken(
            lambda: supcon_loss(z, labels, temperature=0.07, backend="triton", **options)
        )
        upstream = torch.ones_like(loss)
        backward, _ = counting.taken(lambda loss=loss, grad=upstream: loss.backward(grad))
    return forward, backward


def test_the_plain_loss_stays_within_its_budget(monkeypatch):
    forward, backward = count_step(monkeypatch)
    assert forward.launches == ["lse_forward_symmetric_kernel"]
    assert backward.launches == ["lse_backward_kernel"]
    assert forward.waits == ["tolist"]
    assert backward.waits == []
    assert forward.tables == backward.tables == 0  # those of the step before
    assert len(forward.operations) <= 44, forward.operations
    assert len(backward.operations) <= 22, backward.operations


@pytest.mark.parametrize(
    ("options", "num_forward", "num_backward"),
    [
        ({"unknown": True}, 48, 24),
        ({"weighted": True}, 51, 30),
        ({"reduction": "none"}, 39, 30),
        ({"reduction": "sum", "deterministic": True}, 40, 22),
        ({"unknown": True, "weighted": True, "reduction": "none"}, 52, 33),
    ],
    ids=str,
)
def test_without_groups_or_a_bank_the_host_waits_once(
    monkeypatch, options, num_forward, num_backward
):
    forward, backward = count_step(monkeypatch, **options)
    assert forward.waits == ["tolist"]
    assert backward.waits == []
    assert len(forward.launches) == len(backward.launches) == 1
    assert len(forward.operations) <= num_forward, forward.operations
    assert len(backward.operations) <= num_backward, backward.operations


@pytest.mark.parametrize("options", [{"negatives": "other"}, {"group": torch.arange(150) % 3}])
def test_backward_never_waits(monkeypatch, options):
    _, backward = count_step(monkeypatch, **options)
    # the host counts its own blocks; the device is asked for nothing
    assert set(backward.waits) <= {"_local_scalar_dense"}
    assert len(backward.waits) == backward.tables


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_ids", [1, 3, 70])
@pytest.mark.parametrize("sums_of", [segment_sum._matrix_sums, segment_sum._spread_sums])
def test_the_class_sums_of_a_gpu_equal_plain_ones(monkeypatch, weighted, num_ids, sums_of):
    monkeypatch.setattr(segment_sum, "CPU_CHUNK", 400)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 5, generator=generator)
    ids = torch.randint(0, num_ids, (1000,), generator=generator)
    weights = torch.rand(1000, generator=generator).double() if weighted else None
    values = rows.double() if weights is None else rows.double() * weights[:, None]
    expected = torch.zeros(num_ids, 5, dtype=torch.float64).index_add_(0, ids, values)
    torch.testing.assert_close(sums_of(rows, ids, num_ids, weights), expected)
    assert sums_of(rows[:0], ids[:0], 0, None).shape == (0, 5)


def test_a_wrong_weight_is_found_by_the_one_read():
    z, labels = torch.ones(4, 2), torch.tensor([0, 0, 1, -1])
    for wrong in (-1.0, torch.inf, torch.nan):
        weight = torch.tensor([1.0, 1.0, 1.0, wrong])
        for backend in ("triton", "torch", "reference"):
            with pytest.raises(ValueError, match="weight must be finite and >= 0"):
                supcon_loss(z, labels, weight=weight, backend=backend)


def test_labels_may_change_between_forward_and_backward():
    z = normalize(torch.randn(40, 8), dim=1)
    grads = []
    for new in (None, -1):
        leaf, labels = z.clone().requires_grad_(), torch.arange(40) % 2
        loss = supcon_loss(leaf, labels, backend="triton", deterministic=True)
        if new is not None:
            labels.fill_(new)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)

"""Ranks with different numbers of pixels, none included, equal one process that holds them all."""

import itertools
import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cldf_kernels import supcon_loss
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

NUM_RANKS = 3
INPUTS, FEATURES = 8, 6
# the ranks that share the loss, and how many pixels each holds
LAYOUTS = {
    "three ranks, unequal": ((0, 1, 2), (50, 31, 18)),
    "three ranks, one empty": ((0, 1, 2), (40, 0, 27)),
    "three ranks, all empty": ((0, 1, 2), (0, 0, 0)),
    "two ranks, unequal": ((1, 2), (33, 21)),
    "two ranks, one empty": ((1, 2), (0, 29)),
}
OPTIONS = {
    "plain": {},
    "small temperature": {"temperature": 0.004},
    "weight": {"weight": True, "reduction": "sum"},
    "group and bank": {"group": True, "bank": True},
    "none": {"reduction": "none", "weight": True},
    "other": {"negatives": "other", "group": True, "bank": True, "weight": True},
    "other, none": {"negatives": "other", "reduction": "none"},
    "learnt temperature": {"temperature": "learnt", "bank": True},
}
TRITON_OPTIONS = {
    "triton": {"temperature": 0.07},
    "triton, small temperature, deterministic": {"temperature": 0.004, "deterministic": True},
    "triton, other": {"negatives": "other", "group": True, "bank": True, "weight": True},
}
ALL_OPTIONS = OPTIONS | TRITON_OPTIONS
CASES = list(itertools.product(LAYOUTS, OPTIONS))
TRITON_CASES = list(
    itertools.product(["three ranks, one empty", "two ranks, unequal"], TRITON_OPTIONS)
)


@dataclass
class Result:
    loss: Tensor
    grads: list[Tensor]  # of the layer


def make_pixels(layout: str) -> dict[str, Tensor]:
    """The pixels of all ranks; every seventh is unknown."""
    num_pixels = sum(LAYOUTS[layout][1])
    generator = torch.Generator().manual_seed(num_pixels)
    labels = torch.randint(0, 3, (num_pixels,), generator=generator)
    labels[::7] = -1
    return {
        "inputs": torch.randn(num_pixels, INPUTS, generator=generator, dtype=torch.float64),
        "labels": labels,
        "weight": torch.rand(num_pixels, generator=generator),
        "group": torch.randint(0, 4, (num_pixels,), generator=generator),
    }


class Layer(torch.nn.Module):
    """A linear layer, and a temperature that is trained only where the case asks for it."""

    def __init__(self, case):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(FEATURES, INPUTS, generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight)
        learnt = ALL_OPTIONS[case].get("temperature") == "learnt"
        self.temperature = torch.nn.Parameter(torch.tensor(0.2), requires_grad=learnt)

    def forward(self, inputs):
        return inputs @ self.weight.T, self.temperature + 0

    def grads(self):
        return [parameter.grad for parameter in self.parameters() if parameter.requires_grad]


def loss_of(layer, pixels, case, rows=slice(None), process_group=None, **more):
    """The loss of some rows; per-pixel losses are returned and weighed into their own sum."""
    options = {"temperature": 0.1} | ALL_OPTIONS[case] | more
    for name in ("weight", "group"):
        if options.get(name):
            options[name] = pixels[name][rows]
    if options.pop("bank", False):
        generator = torch.Generator().manual_seed(9)
        bank = torch.randn(5, FEATURES, generator=generator, dtype=torch.float64)
        options |= {"bank": normalize(bank, dim=1), "bank_labels": torch.tensor([0, 1, 2, -1, 5])}
    embeddings, temperature = layer(pixels["inputs"][rows])
    if options.get("temperature") == "learnt":
        options["temperature"] = temperature
    z = normalize(embeddings, dim=1)
    if options.get("backend") == "triton":
        z, options["precision"] = z.float(), "fp32"
        options |= {"bank": options["bank"].float()} if "bank" in options else {}
    return supcon_loss(z, pixels["labels"][rows], process_group=process_group, **options)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=NUM_RANKS
    )
    groups = {ranks: dist.new_group(list(ranks)) for ranks, _ in LAYOUTS.values()}
    results = {}
    for layout, case in CASES + TRITON_CASES:
        ranks, counts = LAYOUTS[layout]
        if rank not in ranks:
            continue
        first = sum(counts[: ranks.index(rank)])
        rows = slice(first, first + counts[ranks.index(rank)])
        layer = DistributedDataParallel(Layer(case), process_group=groups[ranks])
        backend = {"backend": "triton"} if case in TRITON_OPTIONS else {}
        loss = loss_of(layer, make_pixels(layout), case, rows, groups[ranks], **backend)
        loss.sum().backward()
        results[layout, case] = Result(loss.detach(), layer.module.grads())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another one still talks to it
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's own end aborts where a thread of torch wants it then


@pytest.fixture(scope="module")
def results_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_ranks_under_ddp_equal_one_process(results_of_ranks, layout, case):
    ranks, _ = LAYOUTS[layout]
    layer = Layer(case)
    expected = loss_of(layer, make_pixels(layout), case)
    expected.sum().backward()
    results = [results_of_ranks[rank][layout, case] for rank in ranks]
    if expected.ndim:
        torch.testing.assert_close(
            torch.cat([result.loss for result in results]), expected.detach()
        )
    for result in results:
        if not expected.ndim:
            torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-12, atol=1e-14)
            assert torch.equal(result.loss, results[0].loss)
        for actual, wanted in zip(result.grads, layer.grads(), strict=True):
            tolerance = 1e-10 if wanted.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=1e-3 * tolerance)


@pytest.mark.parametrize(("layout", "case"), TRITON_CASES)
def test_triton_on_ranks_equals_torch_in_float64_on_one_process(results_of_ranks, layout, case):
    pytest.importorskip("triton", reason="triton exists on Linux only")
    layer = Layer(case)
    expected = loss_of(layer, make_pixels(layout), case)
    expected.backward()
    for rank in LAYOUTS[layout][0]:
        result = results_of_ranks[rank][layout, case]
        torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=5e-5, atol=0)
        error = (result.grads[0] - layer.weight.grad).norm() / layer.weight.grad.norm()
        assert error < (5e-5 if case == "triton" else 5e-4)


def test_the_cases_have_a_gradient_to_compare():
    for layout, case in CASES:
        layer = Layer(case)
        loss_of(layer, make_pixels(layout), case).sum().backward()
        assert bool(layer.weight.grad.any()) == ("all empty" not in layout)

"""Ranks with different numbers of pixels, none included, equal one process that holds them all."""

import itertools
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
}
CASES = list(itertools.product(LAYOUTS, OPTIONS))


@dataclass
class Result:
    loss: Tensor
    grad: Tensor  # of the linear layer


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


def make_layer() -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(INPUTS, FEATURES, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(FEATURES, INPUTS, generator=generator))
    return layer


def loss_of(layer, pixels, case, rows=slice(None), process_group=None):
    """The loss of some rows; per-pixel losses are returned and weighed into their own sum."""
    options = dict(OPTIONS[case])
    for name in ("weight", "group"):
        if options.get(name):
            options[name] = pixels[name][rows]
    if options.pop("bank", False):
        generator = torch.Generator().manual_seed(9)
        bank = torch.randn(5, FEATURES, generator=generator, dtype=torch.float64)
        options |= {"bank": normalize(bank, dim=1), "bank_labels": torch.tensor([0, 1, 2, -1, 5])}
    z = normalize(layer(pixels["inputs"][rows]), dim=1)
    return supcon_loss(z, pixels["labels"][rows], process_group=process_group, **options)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=NUM_RANKS
    )
    groups = {ranks: dist.new_group(list(ranks)) for ranks, _ in LAYOUTS.values()}
    results = {}
    for layout, case in CASES:
        ranks, counts = LAYOUTS[layout]
        if rank not in ranks:
            continue
        first = sum(counts[: ranks.index(rank)])
        rows = slice(first, first + counts[ranks.index(rank)])
        layer = DistributedDataParallel(make_layer(), process_group=groups[ranks])
        loss = loss_of(layer, make_pixels(layout), case, rows, groups[ranks])
        loss.sum().backward()
        results[layout, case] = Result(loss.detach(), layer.module.weight.grad)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_ranks_under_ddp_equal_one_process(results_of_ranks, layout, case):
    ranks, _ = LAYOUTS[layout]
    layer = make_layer()
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
        torch.testing.assert_close(result.grad, layer.weight.grad, rtol=1e-10, atol=1e-13)


def test_the_cases_have_a_gradient_to_compare():
    for layout, case in CASES:
        layer = make_layer()
        loss_of(layer, make_pixels(layout), case).sum().backward()
        assert bool(layer.weight.grad.any()) == ("all empty" not in layout)

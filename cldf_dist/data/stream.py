"""The exactly resumable sample stream; its whole state is one integer, the samples consumed.

Sample number n, counted over all ranks since the start of training, is the same slice with the
same augmentation for any number of ranks and workers, and after every resume.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cldf_dist.config import Augment
from cldf_dist.data.augment import augment
from cldf_dist.data.loader_workers import LoadedBatches, prepare_worker, stop_signals_wait
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.system.seeding import sample_seed

Order = npt.NDArray[np.int64]


class Items(Protocol):
    """The interface of the items of a stream."""

    def __len__(self) -> int: ...

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        """The item at `position`; its randomness is a function of `sample_number` alone."""
        ...


@dataclass
class Stream:
    """Endless epochs over `items`: shards permuted, items shuffled within a window of shards.

    `groups` is the shard number of each position. Every epoch holds every item once, in an order
    that is a pure function of (seed, epoch). Raises ValueError without items, or where `groups` or
    `window` do not fit.
    """

    items: Items
    groups: npt.NDArray[np.integer[Any]]
    seed: int
    window: int = 4  # shards
    _orders: dict[int, Order] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.items) == 0:
            raise ValueError("the stream has no samples; check the labels and splits of the data")
        if len(self.groups) != len(self.items):
            raise ValueError(
                f"groups must have one entry per item, got {len(self.groups)} for {len(self.items)}"
            )
        if self.window < 1:
            raise ValueError(f"window must be >= 1 shard, got {self.window}")

    def fingerprint(self) -> str:
        """A digest of the items, shards, seed and window, which differs where the order does."""
        keys = getattr(self.items, "keys", range(len(self.items)))
        content = repr((list(keys), np.asarray(self.groups).tolist(), self.seed, self.window))
        return hashlib.sha256(content.encode()).hexdigest()

    def position(self, sample_number: int) -> int:
        """The position in `items` of a sample number."""
        epoch, place = divmod(sample_number, len(self.items))
        if epoch not in self._orders:
            while len(self._orders) > 1:  # workers near an epoch's end need two
                self._orders.pop(min(self._orders))
            self._orders[epoch] = self._order(epoch)
        return int(self._orders[epoch][place])

    def batches(
        self,
        consumed: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> LoadedBatches:
        """Endless batches for one rank, from sample number `consumed` on.

        `batch_size` is global: each rank gets every `world_size`-th sample, `batch_size /
        world_size` of them in a batch. Worker processes are spawned, and end with `close`. Raises
        ValueError where the batch does not divide over the ranks.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size must be a positive multiple of the number of processes, "
                f"got {batch_size} for {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        numbers = _Numbers(count(consumed + rank, world_size))
        return self._load(numbers, batch_size // world_size, num_workers)

    def fixed(
        self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> LoadedBatches:
        """This rank's part of samples 0 to num_samples - 1, the same in each call.

        Batches hold `batch_size` samples of this rank; the last one may be smaller.
        """
        numbers = _Numbers(range(rank, num_samples, world_size))
        return self._load(numbers, batch_size, num_workers=0)

    def _load(self, numbers: "_Numbers", batch_size: int, num_workers: int) -> LoadedBatches:
        loader = DataLoader(
            _Samples(self),
            batch_size=batch_size,
            sampler=numbers,
            num_workers=num_workers,
            multiprocessing_context="spawn" if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # leaves the global state untouched
            worker_init_fn=prepare_worker if num_workers else None,
        )
        if not num_workers:
            return LoadedBatches(iter(loader))
        with stop_signals_wait():  # while the workers start
            return LoadedBatches(iter(loader))

    def _order(self, epoch: int) -> Order:
        shards = np.unique(self.groups)
        shards = shards[_shuffled(len(shards), sample_seed(self.seed, epoch, "order of shards"))]
        rank_of = {int(shard): rank for rank, shard in enumerate(shards)}
        window_of = np.array([rank_of[int(shard)] // self.window for shard in self.groups])
        mixed = _shuffled(len(self.items), sample_seed(self.seed, epoch, "order of samples"))
        return mixed[np.argsort(window_of[mixed], kind="stable")]


class LabelledSlices:
    """The items of the diffusion model and the classifiers: image and label, never a mask.

    Slices without a label, or excluded for too little object, are left out.
    """

    def __init__(self, table: SliceTable, augment: Augment | None, seed: int) -> None:
        self.table = table
        self.augment = augment
        self.seed = seed
        self.slice_indices = np.flatnonzero(table.labels >= 0)

    @property
    def keys(self) -> list[str]:
        """The key of each item's slice."""
        return [self.table.keys[slice_index] for slice_index in self.slice_indices]

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """The shard number of each item."""
        return self.table.shard_of[self.slice_indices]

    def __len__(self) -> int:
        return len(self.slice_indices)

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        """The "image" (channels, height, width) in [-1, 1], "label" and "sample_number"."""
        slice_index = int(self.slice_indices[position])
        image = torch.from_numpy(self.table.read_image(slice_index))
        if self.augment is not None:
            image = augment(image, self.augment, self.seed, sample_number)
        label = int(self.table.labels[slice_index])
        return {"image": image, "label": label, "sample_number": sample_number}


class _Samples(Dataset[dict[str, Tensor | int]]):
    """The stream as a map-style dataset by sample number, for the loader."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, sample_number: int) -> dict[str, Tensor | int]:
        return self.stream.items.get(self.stream.position(sample_number), sample_number)


class _Numbers(Sampler[int]):
    """A sampler of given sample numbers, for the loader."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def _shuffled(length: int, seed: int) -> Order:
    """A permutation of [0, length), the same with every version of every library.

    Sorts by the splitmix64 hash (Steele et al. 2014) of seed + number.
    """
    step, first, second = (
        np.uint64(constant)
        for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    )
    with np.errstate(over="ignore"):
        value = np.uint64(seed) + step * np.arange(1, length + 1, dtype=np.uint64)
        value = (value ^ (value >> np.uint64(30))) * first
        value = (value ^ (value >> np.uint64(27))) * second
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable")

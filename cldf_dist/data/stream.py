"""The exactly resumable sample stream; its whole state is one integer, the samples consumed.

Sample number n, counted over all ranks since the start of training, is the same slice with the
same random changes for any number of ranks and workers, and after every resume.
"""

import atexit
import hashlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cldf_dist.config import Augment
from cldf_dist.data.augment import augment
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.system.seeding import sample_seed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Order = npt.NDArray[np.int64]
Batch = dict[str, Tensor]


class Items(Protocol):
    """What a stream draws from."""

    def __len__(self) -> int: ...

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        """The item at `position`; its randomness is a function of `sample_number` alone."""
        ...


@dataclass
class Stream:
    """Endless epochs over `items`: shards permuted, items shuffled within a window of shards.

    `groups` is the shard number of each position. Every epoch holds every item once; its order is
    a pure function of (seed, epoch).
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
        """Names what is drawn from: with other items, or other shards, the order is another one."""
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
    ) -> "LoadedBatches":
        """Endless batches for one rank, from sample number `consumed` on.

        `batch_size` is global: each rank gets every `world_size`-th sample, `batch_size /
        world_size` of them at a time. Worker processes are spawned, and end with `close`.
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
    ) -> "LoadedBatches":
        """This rank's share of samples 0 to num_samples - 1, always the same samples.

        Batches hold `batch_size` samples of one rank; the last one may be smaller.
        """
        numbers = _Numbers(range(rank, num_samples, world_size))
        return self._load(numbers, batch_size, num_workers=0)

    def _load(self, numbers: "_Numbers", batch_size: int, num_workers: int) -> "LoadedBatches":
        loader = DataLoader(
            _Samples(self),
            batch_size=batch_size,
            sampler=numbers,
            num_workers=num_workers,
            multiprocessing_context="spawn" if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # leaves the global state untouched
            worker_init_fn=_prepare_worker if num_workers else None,
        )
        if not num_workers:
            return LoadedBatches(iter(loader))
        with _stop_signals_wait():  # while the workers start
            return LoadedBatches(iter(loader))

    def _order(self, epoch: int) -> Order:
        shards = np.unique(self.groups)
        shards = shards[_shuffled(len(shards), sample_seed(self.seed, epoch, "order of shards"))]
        rank_of = {int(shard): rank for rank, shard in enumerate(shards)}
        window_of = np.array([rank_of[int(shard)] // self.window for shard in self.groups])
        mixed = _shuffled(len(self.items), sample_seed(self.seed, epoch, "order of samples"))
        return mixed[np.argsort(window_of[mixed], kind="stable")]


class LoadedBatches:
    """Batches from a loader, whose worker processes end with `close`.

    Dropping the iterator or leaving the program closes it too. A worker that dies while batches
    are wanted is a RuntimeError, one that dies while it is stopped is not.
    """

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._workers = tuple(getattr(loaded, "_workers", ()))  # torch has no public name
        self.close = weakref.finalize(self, _stop_workers, loaded, self._workers)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        try:
            batch: Batch = next(self._loaded)
        except (RuntimeError, OSError, EOFError) as error:
            dead = _dead(self._workers)
            if not dead:
                raise  # the items' own error
            raise RuntimeError(
                f"loader worker {', '.join(dead)} died while it loaded samples: {error}; is memory "
                "short? fit.num_workers=0 loads without workers"
            ) from error
        return batch


class LabelledSlices:
    """Items of the diffusion model and the classifiers: image and image-level label, never a mask.

    Slices without a label, or with too little object to call, are left out.
    """

    def __init__(self, table: SliceTable, augment: Augment | None, seed: int) -> None:
        self.table = table
        self.augment = augment
        self.seed = seed
        self.rows = np.flatnonzero(table.labels >= 0)

    @property
    def keys(self) -> list[str]:
        """The name of each item."""
        return [self.table.keys[row] for row in self.rows]

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """The shard number of each item."""
        return self.table.shard_of[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        """image (channels, height, width) in [-1, 1], label, sample_number."""
        row = int(self.rows[position])
        image = torch.from_numpy(self.table.read_image(row))
        if self.augment is not None:
            image = augment(image, self.augment, self.seed, sample_number)
        label = int(self.table.labels[row])
        return {"image": image, "label": label, "sample_number": sample_number}


class _Samples(Dataset[dict[str, Tensor | int]]):
    """Sample number to sample, for the loader."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, sample_number: int) -> dict[str, Tensor | int]:
        return self.stream.items.get(self.stream.position(sample_number), sample_number)


class _Numbers(Sampler[int]):
    """Sample numbers, for the loader."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def _prepare_worker(_worker: int) -> None:
    """Stopping is the parent's business: a scheduler or a Ctrl-C signals the whole group, and a
    worker that died of it would take the last checkpoint with it. Workers end with their parent.

    They leave before the interpreter is taken down: that aborts where the thread that sends
    batches is inside C++ at the time.
    """
    # torch's own watch compares parents: where ours died before, that never changes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit.register(os._exit, 0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(0)


def _dead(workers: Sequence[Any]) -> list[str]:
    """Process numbers of dead workers; a broken pipe may be a moment ahead of its worker's end."""
    if workers:
        with suppress(RuntimeError):  # torch's handler of SIGCHLD raises
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()  # its pipes close before it can be asked how it ended
    return [str(worker.pid) for worker in workers if not worker.is_alive()]


def _stop_workers(loaded: Any, workers: Iterable[Any]) -> None:
    """End the worker processes, in peace where they answer. No worker is left afterwards."""
    if not workers:
        return
    # torch's handler of SIGCHLD raises where a worker did not end in peace; it was to end anyway
    with suppress(RuntimeError):
        if all(worker.exitcode is None for worker in workers):
            loaded._shutdown_workers()  # torch has no public name
    if not loaded._shutdown:  # a dead one may hold for ever what torch would wait for
        loaded._shutdown = True
        if loaded._pin_memory:
            loaded._pin_memory_thread_done_event.set()
        for queue in loaded._index_queues:
            queue.cancel_join_thread()
            queue.close()
    for worker in workers:
        with suppress(RuntimeError):
            worker.kill()  # SIGTERM is ignored there
            worker.join()
        worker.join()


@contextmanager
def _stop_signals_wait() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # may not touch signals
        yield
        return
    resource_tracker.ensure_running()  # its start would let two of them through (Python 3.11)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)  # what came meanwhile arrives now


def _shuffled(length: int, seed: int) -> Order:
    """A permutation of 0 to length - 1, the same with every version of every library.

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

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cldf_dist.config import Augment
from cldf_dist.data.loader_workers import stop_signals_wait
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import Slice
from cldf_dist.data.stream import LabelledSlices, Stream

NUM_ITEMS, NUM_SHARDS = 29, 8
PINNED = [
    7,
    1,
    4,
    2,
    6,
    3,
    0,
    5,
    24,
    23,
    9,
    25,
    8,
    22,
    10,
    15,
    28,
    17,
    16,
    27,
    18,
    26,
    19,
    21,
    20,
    11,
    14,
    12,
    13,
]


ABANDONING = """
import sys
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.stream import LabelledSlices, Stream
if __name__ == "__main__":
    items = LabelledSlices(ShardSet(sys.argv[1]).split("train"), None, 0)
    batches = Stream(items, items.groups, 0).batches(0, batch_size=4, num_workers=1)
    next(batches)
    print("batch")
"""


class Numbers:
    """Items that are their own position."""

    def __len__(self) -> int:
        return NUM_ITEMS

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        return {"position": position, "sample_number": sample_number}


class Deadly(Numbers):
    """The process that loads the tenth sample dies."""

    def get(self, position: int, sample_number: int) -> dict[str, Tensor | int]:
        if sample_number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().get(position, sample_number)


def make_stream(seed: int = 0, window: int = 2) -> Stream:
    return Stream(Numbers(), np.arange(NUM_ITEMS) * NUM_SHARDS // NUM_ITEMS, seed, window)


def global_order(stream: Stream, consumed: int, num_steps: int, world_size: int) -> list[int]:
    """Positions in the order of the sample numbers, put together from every rank's batches."""
    pairs = []
    for rank in range(world_size):
        batches = stream.batches(consumed, batch_size=6, rank=rank, world_size=world_size)
        for step, batch in enumerate(islice(batches, num_steps)):
            assert len(batch["position"]) == 6 // world_size
            assert batch["sample_number"].min() >= consumed + 6 * step
            assert batch["sample_number"].max() < consumed + 6 * (step + 1)
            pairs += zip(batch["sample_number"].tolist(), batch["position"].tolist())
    pairs.sort()
    assert [number for number, _ in pairs] == list(range(consumed, consumed + 6 * num_steps))
    return [position for _, position in pairs]


@pytest.mark.parametrize("world_size", [2, 3])
def test_order_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    expected = global_order(make_stream(), 0, 12, 1)
    assert global_order(make_stream(), 0, 12, world_size) == expected


@pytest.mark.parametrize("consumed", [1, 6, NUM_ITEMS - 1, NUM_ITEMS, 2 * NUM_ITEMS + 5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_stream_continues_the_same_order(consumed: int, world_size: int) -> None:
    uninterrupted = global_order(make_stream(), 0, 20, 1)
    resumed = global_order(make_stream(), consumed, 6, world_size)
    assert resumed == uninterrupted[consumed : consumed + 36]


def test_every_epoch_covers_every_item_once_in_another_order() -> None:
    stream = make_stream()
    epochs = [
        tuple(stream.position(epoch * NUM_ITEMS + place) for place in range(NUM_ITEMS))
        for epoch in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_ITEMS))
    assert len(set(epochs)) == 4


def test_epochs_differ_even_within_one_shard() -> None:
    stream = Stream(Numbers(), np.zeros(NUM_ITEMS, int), seed=0)
    epochs = [[stream.position(start + n) for n in range(NUM_ITEMS)] for start in (0, NUM_ITEMS)]
    assert epochs[0] != epochs[1]


def test_position_may_be_asked_in_any_order() -> None:
    stream = make_stream()
    expected = [stream.position(number) for number in range(4 * NUM_ITEMS)]
    backwards = [make_stream().position(number) for number in reversed(range(4 * NUM_ITEMS))]
    assert backwards[::-1] == expected
    jumping = make_stream()
    for number in (100, 3, 60, 29, 28, 115, 0):
        assert jumping.position(number) == expected[number]


def test_order_is_a_function_of_the_seed() -> None:
    orders = {
        tuple(make_stream(seed).position(n) for n in range(NUM_ITEMS)) for seed in (0, 0, 1, 2)
    }
    assert len(orders) == 3


def test_order_is_pinned() -> None:
    """A run that is resumed with a newer version of any library must see the same order."""
    found = [make_stream().position(number) for number in range(NUM_ITEMS)]
    assert found == PINNED


def test_items_are_shuffled_within_a_window_of_shards() -> None:
    stream = make_stream(window=2)
    shards = [int(stream.groups[stream.position(number)]) for number in range(NUM_ITEMS)]
    windows = list(dict.fromkeys(shards))
    sizes = Counter(shards)
    start = 0
    for first in range(0, NUM_SHARDS, 2):
        pair = set(windows[first : first + 2])
        stop = start + sum(sizes[shard] for shard in pair)
        assert set(shards[start:stop]) == pair
        start = stop
    assert windows != sorted(windows)


def test_one_window_over_all_shards_mixes_everything() -> None:
    stream = make_stream(window=NUM_SHARDS)
    shards = [int(stream.groups[stream.position(number)]) for number in range(NUM_ITEMS)]
    assert len(set(shards[: NUM_ITEMS // 2])) > NUM_SHARDS // 2


def test_fixed_samples_are_the_first_ones_every_time() -> None:
    stream = make_stream()
    batches = list(stream.fixed(10, 4))
    assert [len(batch["position"]) for batch in batches] == [4, 4, 2]
    positions = [int(position) for batch in batches for position in batch["position"]]
    assert positions == [stream.position(number) for number in range(10)]
    assert torch.equal(next(stream.fixed(10, 4))["position"], batches[0]["position"])


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(islice(make_stream().batches(0, batch_size=4), 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_impossible_requests_are_refused() -> None:
    stream = make_stream()
    with pytest.raises(ValueError, match="multiple of the number of processes, got 5 for 2"):
        stream.batches(0, batch_size=5, rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        stream.batches(0, batch_size=4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="one entry per item, got 3 for 29"):
        Stream(Numbers(), np.zeros(3, int), 0)
    with pytest.raises(ValueError, match="window must be >= 1"):
        make_stream(window=0)


def prepare(folder: Path, with_mask: bool = True) -> None:
    """24 slices in shards of 5; labels 0, 1, -1, -2, 0, 1, ..."""
    source = np.random.default_rng(0)
    slices = []
    for index in range(24):
        image = source.uniform(-0.9, 1, (2, 16, 16)).astype(np.float32)
        image[:, :3] = -1
        mask = source.random((16, 16)) > 0.5 if with_mask else None
        if not with_mask:
            source.random((16, 16))
        label = (0, 1, -1, -2)[index % 4]
        slices.append(Slice(f"case_{index:04d}", "case", index, label, image, mask))
    records = write_shards(folder, "train", slices, 5)
    write_manifest(
        folder,
        settings={},
        channels=("a", "b"),
        splits={"train": ["case"]},
        geometry={},
        shards=records,
    )


def labelled(folder: Path, augment: Augment | None = None, seed: int = 7) -> Stream:
    items = LabelledSlices(ShardSet(folder).split("train"), augment, seed)
    return Stream(items, items.groups, seed)


def test_labelled_slices_hold_image_and_label_of_usable_slices(tmp_path: Path) -> None:
    prepare(tmp_path)
    table = ShardSet(tmp_path).split("train")
    items = LabelledSlices(table, None, 0)
    assert len(items) == 12
    assert items.slice_indices.tolist() == [row for row in range(24) if row % 4 < 2]
    item = items.get(3, 99)
    assert set(item) == {"image", "label", "sample_number"}
    assert torch.equal(torch.as_tensor(item["image"]), torch.from_numpy(table.read_image(5)))
    batch = next(Stream(items, items.groups, 0).batches(0, batch_size=4))
    assert batch["image"].shape == (4, 2, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["sample_number"].dtype == torch.int64
    assert set(batch["label"].tolist()) <= {0, 1}


def test_training_never_reads_a_mask(tmp_path: Path) -> None:
    """Shards without masks, and shards whose every mask is destroyed, train alike."""
    prepare(tmp_path / "masked")
    prepare(tmp_path / "plain", with_mask=False)
    prepare(tmp_path / "destroyed")
    for shard in json.loads((tmp_path / "destroyed/manifest.json").read_text())["shards"]:
        with open(tmp_path / "destroyed" / shard["name"], "r+b") as file:
            for sample in shard["samples"]:
                file.seek(sample["mask"][0])
                file.write(b"\xff" * sample["mask"][1])
    with pytest.raises(ValueError, match="mask"):
        ShardSet(tmp_path / "destroyed").split("train").read_mask(0)
    streams = [labelled(tmp_path / name, Augment()) for name in ("masked", "plain", "destroyed")]
    for first, second, third in islice(
        zip(*(stream.batches(0, batch_size=4) for stream in streams)), 4
    ):
        assert set(first) == {"image", "label", "sample_number"}
        for name in first:
            assert torch.equal(first[name], second[name])
            assert torch.equal(first[name], third[name])


def test_without_usable_slices_there_is_no_stream(tmp_path: Path) -> None:
    records = write_shards(
        tmp_path, "train", [Slice("a_0000", "a", 0, -2, np.zeros((1, 4, 4), np.float32), None)], 1
    )
    write_manifest(
        tmp_path, settings={}, channels=["a"], splits={"train": ["a"]}, geometry={}, shards=records
    )
    with pytest.raises(ValueError, match="no samples"):
        labelled(tmp_path)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(tmp_path: Path) -> None:
    """Two spawned workers, across the end of an epoch, with augmentation."""
    prepare(tmp_path)
    alone = labelled(tmp_path, Augment()).batches(5, batch_size=4, rank=1, world_size=2)
    spawned = labelled(tmp_path, Augment()).batches(
        5, batch_size=4, rank=1, world_size=2, num_workers=2
    )
    for expected, found in islice(zip(alone, spawned), 8):
        assert set(found) == set(expected)
        for name in expected:
            assert torch.equal(found[name], expected[name])
    alone.close()
    spawned.close()


@pytest.mark.slow
def test_abandoned_workers_end_without_a_word(tmp_path: Path) -> None:
    """While they fetch ahead: closed, dropped, and killed before they are closed."""
    prepare(tmp_path)
    stream = labelled(tmp_path, Augment())
    for number, num_workers in enumerate((2, 1, 1, 1)):
        batches = stream.batches(0, batch_size=4, num_workers=num_workers)
        next(batches)
        workers = batches._workers
        if number == 0:
            with suppress(RuntimeError):  # torch's handler of SIGCHLD
                workers[0].kill()
                workers[0].join()
        if number % 2 == 0:
            batches.close()
            batches.close()
            assert next(batches, None) is None
        del batches
        assert not any(worker.is_alive() for worker in workers)
        # where one was killed, perhaps with a lock in its hands, the others cannot end in peace
        expected = [-signal.SIGKILL] * 2 if number == 0 else [0]
        assert [worker.exitcode for worker in workers] == expected
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_dies_while_samples_are_wanted_is_named() -> None:
    batches = Stream(Deadly(), np.zeros(NUM_ITEMS, int), 0).batches(0, batch_size=4, num_workers=1)
    (worker,) = batches._workers
    # where nobody waits for a batch at that moment, torch's handler of SIGCHLD tells it
    words = rf"loader worker {worker.pid} died .*num_workers=0|{worker.pid}\) is killed"
    with pytest.raises(RuntimeError, match=words):
        list(islice(batches, 20))
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_program_that_ends_with_workers_at_work_ends_in_peace(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    """Nothing but the end of the program closes the iterator."""
    prepare(tmp_path)
    process = start("-c", ABANDONING, str(tmp_path))
    said, complained = process.communicate(timeout=120)
    assert (process.returncode, said, complained) == (0, "batch\n", "")


ORPHANS = """
import os, signal, sys, threading, time
sys.path.insert(0, {folder!r})
import multiprocessing
from test_stream import make_stream

def die():
    while not multiprocessing.active_children():
        time.sleep(0.001)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    threading.Thread(target=die, daemon=True).start()
    for batch in make_stream().batches(0, batch_size=4, num_workers=2):
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_workers_do_not_outlive_a_program_that_is_killed(
    tmp_path: Path, environment: dict[str, str], seconds: float
) -> None:
    """Killed while they start, and later."""
    script = tmp_path / "killed.py"
    script.write_text(ORPHANS.format(folder=str(Path(__file__).parent)))
    mark = f"killed-{tmp_path}-{seconds}"
    done = subprocess.run(
        [sys.executable, str(script), str(seconds)], env={**environment, "CLDF_TEST_MARK": mark}
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while left := processes_with(mark):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def processes_with(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def test_a_signal_that_comes_while_workers_start_is_not_lost() -> None:
    """It waits, or arrives at once where another thread of the program takes it."""
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        with stop_signals_wait():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert came == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_fingerprint_differs_with_what_is_drawn_from() -> None:
    assert make_stream().fingerprint() == make_stream().fingerprint()
    others = {make_stream(seed=1).fingerprint(), make_stream(window=3).fingerprint()}
    shifted = Stream(Numbers(), np.arange(NUM_ITEMS) // 5, 0, 2)
    assert len({make_stream().fingerprint(), shifted.fingerprint(), *others}) == 4


def test_fewer_shards_than_ranks_give_the_same_order() -> None:
    """Ranks share samples, not shards: one shard serves three ranks for several epochs."""

    def stream() -> Stream:
        return Stream(Numbers(), np.zeros(NUM_ITEMS, int), seed=0)

    steps = 4 * NUM_ITEMS // 6
    expected = global_order(stream(), 0, steps, 1)
    assert global_order(stream(), 0, steps, 3) == expected
    assert sorted(expected[:NUM_ITEMS]) == list(range(NUM_ITEMS))

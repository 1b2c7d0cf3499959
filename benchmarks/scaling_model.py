"""What a training takes on P processes: a model small enough to be checked by hand.

    step = compute(B / P) + exposed communication + waiting for slices

* `fit.batch_size` B is global. More processes take fewer slices each, not more slices together:
  strong scaling, which ends where a process has one slice a step. `compute(b)` is the measured
  step of one process with b slices, optimizer and moving average with it: it stops falling where
  the GPU is no longer busy, and between two measured b it is interpolated.
* Gradients, float32, are averaged by a ring: every process sends and receives 2 (P - 1) / P of
  their bytes at the `bytes_per_second` of the slowest link, and waits 2 log2 P times `latency` for
  each bucket of 25 MiB (DDP's). ZeRO 1 and 2 send as much, in two halves.
* A bucket travels while the backward pass goes on, two thirds of `compute`, of the last
  micro-batch. Hidden behind it is the share `overlap` of what could be: 1 assumes that the network
  costs the GPU nothing, 0 that it takes the processor which computes, as gloo's does. At least the
  last bucket is not hidden.
* The vote about stopping is one number over gloo during the step: hidden.
* Slices are waited for where the loaders of a process make fewer a second than it takes.
* All processes are equally fast. Stragglers, congestion and other jobs are not in the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

FLOAT32 = 4  # bytes
BUCKET_BYTES = 25 * 2**20  # DDP's bucket_cap_mb
BACKWARD_SHARE = 2 / 3  # of a step: the backward pass costs two forward passes
CHECKPOINT_BYTES = 16  # a parameter: weights, moving average, two moments of AdamW


@dataclass(frozen=True)
class Network:
    """What connects processes, as an all-reduce sees it."""

    bytes_per_second: float
    latency: float  # seconds, of a message
    overlap: float  # share of the backward pass behind which a transfer can hide


@dataclass(frozen=True)
class Training:
    """One training on one kind of device."""

    parameters: int
    batch_size: int  # global
    seconds: Mapping[int, float]  # of a whole step of one process, by its slices
    gradient_accumulation_steps: int = 1
    loader_rate: float = math.inf  # slices a second that the loaders of one process make


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    compute: float
    communication: float  # whether hidden or not
    exposed: float
    data_wait: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.data_wait


def step(training: Training, processes: int, network: Network) -> Step:
    """ValueError where the batch does not divide, as `fit` says."""
    if training.batch_size % (processes * training.gradient_accumulation_steps):
        raise ValueError(
            f"fit.batch_size={training.batch_size} must be a multiple of {processes} processes x "
            f"fit.gradient_accumulation_steps={training.gradient_accumulation_steps}"
        )
    local = training.batch_size // processes
    compute = interpolated(training.seconds, local)
    moved = communication_seconds(training.parameters, processes, network)
    exposed = exposed_seconds(training, compute, moved, network)
    busy = compute + exposed
    return Step(compute, moved, exposed, max(local / training.loader_rate - busy, 0.0))


def efficiency(training: Training, processes: int, network: Network) -> float:
    """Slices a second and process, over those of one process with the same global batch."""
    alone = step(training, 1, network).seconds
    return alone / (processes * step(training, processes, network).seconds)


def gradient_bytes(parameters: int) -> int:
    return FLOAT32 * parameters


def sent_bytes(parameters: int, processes: int) -> float:
    """What each process sends, and receives, in a step."""
    return 2 * (processes - 1) / processes * gradient_bytes(parameters)


def num_buckets(parameters: int) -> int:
    return max(1, math.ceil(gradient_bytes(parameters) / BUCKET_BYTES))


def communication_seconds(parameters: int, processes: int, network: Network) -> float:
    """Of all buckets, one after the other."""
    if processes == 1:
        return 0.0
    messages = 2 * math.ceil(math.log2(processes)) * num_buckets(parameters)
    return sent_bytes(parameters, processes) / network.bytes_per_second + messages * network.latency


def exposed_seconds(
    training: Training, compute: float, communication: float, network: Network
) -> float:
    """What the backward pass does not hide."""
    last_bucket = communication / num_buckets(training.parameters)
    hideable = network.overlap * BACKWARD_SHARE * compute / training.gradient_accumulation_steps
    return max(communication - hideable, last_bucket if network.overlap else communication)


def interpolated(seconds: Mapping[int, float], local: int) -> float:
    """Straight lines between measured numbers of slices; beyond the largest, in proportion."""
    if local in seconds:
        return seconds[local]
    known = sorted(seconds)
    if local > known[-1]:
        return seconds[known[-1]] * local / known[-1]
    if local < known[0]:
        return seconds[known[0]]  # it will not be slower
    above = next(number for number in known if number > local)
    below = max(number for number in known if number < local)
    share = (local - below) / (above - below)
    return (1 - share) * seconds[below] + share * seconds[above]


def checkpoint_bytes(parameters: int) -> int:
    return CHECKPOINT_BYTES * parameters


def checkpoint_fraction(parameters: int, every: int, step_seconds: float, disk: float) -> float:
    """Share of a training's time in which all wait for the main process to save, at `disk` bytes a
    second (written, synced, and read again for the checksum)."""
    saving = checkpoint_bytes(parameters) / disk
    return saving / (saving + every * step_seconds)


@dataclass(frozen=True)
class Store:
    """The feature cache as files: one a shard and array, in folders of its own."""

    ranks: Mapping[str, int]  # dimensions of each array, the slices' with them
    slices_per_shard: int

    def num_shards(self, num_slices: int) -> int:
        return -(-num_slices // self.slices_per_shard)

    def num_files(self, num_slices: int) -> int:
        """Of shards; `key` and `done` are arrays too."""
        return len(self.ranks) * self.num_shards(num_slices)

    def num_folders(self, num_slices: int) -> int:
        """An array of r dimensions lies at c/SHARD/0/.../0, which has r - 1 folders."""
        return sum(rank - 1 for rank in self.ranks.values()) * self.num_shards(num_slices)

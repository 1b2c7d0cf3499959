"""Private interfaces of other libraries: each test names the promise that one of them keeps for us.

Where a new version breaks one, its test fails by name; it says which module is to be mended.
"""

import atexit
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cldf_dist.config import UNet
from cldf_dist.data.features.memory_map import map_file
from cldf_dist.data.loader_workers import LoadedBatches
from cldf_dist.nets.gradient_checkpointing import RECOMPUTED, use_gradient_checkpointing
from cldf_dist.nets.unet import build_unet


class Numbers(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return 64


@pytest.mark.slow
def test_dataloader_iterators_have_the_workers_queues_and_flags_that_loader_workers_uses() -> None:
    """`cldf_dist/data/loader_workers.py`: `_workers`, `_shutdown_workers`, `_shutdown`,
    `_worker_pids_set`, `_remove_worker_pids`,
    `_pin_memory`, `_index_queues`; closing leaves no process and marks the iterator shut down."""
    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="spawn")
    loaded: Any = iter(loader)
    assert len(loaded._workers) == 2
    assert len(loaded._index_queues) == 2
    assert loaded._pin_memory is False
    assert loaded._shutdown is False
    assert loaded._worker_pids_set is True
    batches = LoadedBatches(loaded)
    assert next(batches).tolist() == [0, 1, 2, 3]  # type: ignore[attr-defined]
    workers = loaded._workers
    batches.close()
    assert loaded._shutdown is True
    assert loaded._worker_pids_set is False
    assert not any(worker.is_alive() for worker in workers)


def test_atexit_runs_its_functions_when_process_end_asks() -> None:
    """`cldf_dist/system/process_end.py`: `atexit._run_exitfuncs` runs them, last first, before the
    process is ended without the interpreter's own end."""
    assert callable(atexit._run_exitfuncs)
    program = (
        "import atexit\n"
        "from cldf_dist.system.process_end import end_process\n"
        "atexit.register(print, 'first')\n"
        "atexit.register(print, 'last')\n"
        "end_process(7)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (7, ["last", "first"]), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's mmap, as Linux has it")
def test_the_c_librarys_mmap_maps_a_file_without_a_descriptor_and_lets_it_go(
    tmp_path: Path,
) -> None:
    """`cldf_dist/data/features/memory_map.py`: `mmap` and `munmap` through ctypes."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 64)
    descriptors = set(os.listdir("/proc/self/fd"))
    mapped = map_file(path)
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    np.testing.assert_array_equal(mapped, np.arange(256 * 64) % 256)
    assert not mapped.flags.writeable

    def is_mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    assert is_mapped()
    part = mapped[5:9]
    del mapped
    assert is_mapped(), "a part of it is still in use"
    assert part.tolist() == [5, 6, 7, 8]
    del part
    assert not is_mapped()


def test_a_modules_class_may_be_swapped_for_a_subclass_that_keeps_weights_and_hooks() -> None:
    """`cldf_dist/nets/gradient_checkpointing.py`: `module.__class__ = subclass`, also in a copy."""
    net = build_unet(UNet(channels=(8, 16), attention_levels=(False, True), num_res_blocks=1,
                          num_head_channels=8, norm_num_groups=4), 1)  # fmt: skip
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calls = []
    blocks = [module for module in net.modules() if type(module) in RECOMPUTED]
    blocks[0].register_forward_hook(lambda *_: calls.append(1))
    use_gradient_checkpointing(net)
    assert blocks
    assert all(type(block) in RECOMPUTED.values() for block in blocks)
    assert list(net.state_dict()) == list(before)
    inputs = (torch.randn(2, 1, 16, 16), torch.tensor([1, 2]))
    net(*inputs, class_labels=torch.tensor([0, 1]))
    assert calls
    twin = copy.deepcopy(net)
    assert all(
        mine is not other and type(mine) is type(other)
        for mine, other in zip(net.modules(), twin.modules())
    )

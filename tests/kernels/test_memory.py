"""No implementation detail may bring the N x N matrix back."""

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys
import torch
from cldf_kernels import supcon_loss

backend, num_pixels, negatives = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)

def peak_kilobytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def step(num_pixels):
    z = torch.nn.functional.normalize(torch.randn(num_pixels, 16), dim=1).requires_grad_()
    labels = torch.arange(num_pixels) % 2
    loss = supcon_loss(z, labels, temperature=0.1, negatives=negatives, backend=backend)
    loss.backward()

step(600)
before = peak_kilobytes()
step(num_pixels)
print((peak_kilobytes() - before) / 1024)
"""


def peak_extra_megabytes(backend, num_pixels, negatives):
    command = [sys.executable, "-c", MEASURE, backend, str(num_pixels), negatives]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_tiled_path_stays_far_below_the_matrix_and_the_definition_does_not():
    matrix_megabytes = 12_000**2 * 4 / 2**20
    assert peak_extra_megabytes("torch", 12_000, "all") < 0.05 * matrix_megabytes
    assert peak_extra_megabytes("torch", 5_000, "other") < 0.3 * 5_000**2 * 4 / 2**20
    assert peak_extra_megabytes("reference", 3_000, "all") > 3_000**2 * 4 / 2**20

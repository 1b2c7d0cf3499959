"""The least that the contrastive loss must do, at rates that the same device reaches elsewhere."""

from dataclasses import dataclass

import torch
from harness import ask_nvidia_smi
from measure import fastest_seconds, matrix_product_flop

PASSES = ("forward", "backward", "both")
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
EX2_A_CLOCK = 16  # of one multiprocessor, sm_70 to sm_90; CUDA C++ Programming Guide, throughput
# forward and backward, each in multiples of N^2 D floating point operations and N^2 exponentials
SYMMETRIC = ((1, 0.5), (3, 0.5))  # every pair of pixels visited once
HYBRID = ((1, 0.5), (4, 1))  # backward, every row by its owner


@dataclass(frozen=True)
class Ceilings:
    """The rates that bound the loss, each per second."""

    is_cuda: bool
    flop: dict[str, float]  # of a large matrix product, by precision
    exponentials: float

    @property
    def form(self) -> str:
        """The work that the floor counts, in words."""
        if self.is_cuda:
            return "5 N^2 D FLOP, 1.5 N^2 exp, symmetric forward, row-owner backward, side by side"
        return "4 N^2 D FLOP, N^2 exp, symmetric, one after the other"

    def floors(self, num_pixels: int, num_features: int, precision: str) -> list[float]:
        """Least seconds of each of PASSES; a GPU takes exp while it multiplies, a CPU after."""
        combine = max if self.is_cuda else sum
        forward, backward = (
            combine(
                (
                    products * num_pixels**2 * num_features / self.flop[precision],
                    exponentials * num_pixels**2 / self.exponentials,
                )
            )
            for products, exponentials in (HYBRID if self.is_cuda else SYMMETRIC)
        )
        return [forward, backward, forward + backward]


def measure_ceilings(device: torch.device, *, tiny: bool) -> Ceilings:
    """Measure large matrix products, and exp on CPU; exp on CUDA is stated, not measured."""
    on_gpu = device.type == "cuda"
    precisions = PRECISIONS if on_gpu else ("fp32",)
    flop = {name: matrix_product_flop(device, name, tiny=tiny) for name in precisions}
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        answer = ask_nvidia_smi("clocks.max.sm", f"--id=GPU-{properties.uuid}")
        clock = float(answer) if answer.isdecimal() else properties.clock_rate / 1000  # MHz
        rate = properties.multi_processor_count * EX2_A_CLOCK * clock * 1e6
    else:
        block, result = torch.rand(256, 1024), torch.empty(256, 1024)
        rate = block.numel() / fastest_seconds(device, lambda: torch.exp(block, out=result))
    products = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in flop.items())
    stated = "from the highest clock" if on_gpu else "measured"
    print(f"matrix product TFLOP/s: {products}; exp {rate / 1e9:.3g} G/s, {stated}")
    return Ceilings(on_gpu, flop, rate)

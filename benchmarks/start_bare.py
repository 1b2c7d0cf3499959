"""The least that a training by accelerate can be: one optimizer step. bench_start.py starts it."""

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator


def main() -> None:
    """Take one step on every process; write the time of its end to the file that is named."""
    accelerator = Accelerator()
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.Flatten(), torch.nn.Linear(7200, 2)
    )
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    images = torch.rand(4, 1, 32, 32, device=accelerator.device)
    accelerator.backward(net(images).square().mean())
    optimizer.step()
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(str(time.time()))


if __name__ == "__main__":
    main()

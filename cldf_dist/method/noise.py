"""The diffusion process, and noise that depends on the sample alone.

Nothing here reads global random state. Noise in training is a function of (seed, sample number),
noise for features and maps of the slice's key, so that results depend neither on batches nor on
ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from cldf_dist.config import Prediction
from cldf_dist.system.seeding import sample_seed

SCHEDULES = {"cosine": "cosine", "linear": "linear_beta"}  # our names -> MONAI's
PREDICTIONS = get_args(Prediction)

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2**64 / golden ratio, as a signed 64-bit integer


class Schedule:
    """The noise schedule: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t = `alphas_cumprod[t]`.

    Timesteps t count from 0. `prediction` is the target of the network: the noise ("epsilon") or
    the velocity v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans and Ho 2022, "v_prediction").
    Raises ValueError for an unknown kind or prediction.
    """

    def __init__(self, num_timesteps: int, kind: str, prediction: str) -> None:
        if kind not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}"
            )
        # MONAI takes seconds to import; the noise below does without it, and so do its users
        from monai.networks.schedulers import DDPMScheduler

        scheduler = DDPMScheduler(num_train_timesteps=num_timesteps, schedule=SCHEDULES[kind])
        betas: Tensor = scheduler.betas
        self.num_timesteps = num_timesteps
        self.prediction = prediction
        self.alphas_cumprod = (1 - betas.double()).cumprod(0).float()
        self._per_device: dict[torch.device, Tensor] = {}

    def signal(self, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """a_t of each timestep, on the device of `timesteps`."""
        device = timesteps.device
        if device not in self._per_device:
            self._per_device[device] = self.alphas_cumprod.to(device)
        return self._per_device[device][timesteps]

    def add_noise(
        self,
        clean: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """x_t of clean images x_0."""
        signal, rest = self._roots(timesteps)
        return signal * clean + rest * noise

    def target(
        self,
        clean: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The training target of the network: the noise or the velocity."""
        if self.prediction == "epsilon":
            return noise
        signal, rest = self._roots(timesteps)
        return signal * noise - rest * clean

    def predicted_start(
        self,
        noised: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        output: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The clean image x_0 that the network's output predicts."""
        signal, rest = self._roots(timesteps)
        if self.prediction == "epsilon":
            return (noised - rest * output) / signal
        return signal * noised - rest * output

    def predicted_noise(
        self,
        noised: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        output: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The noise that the network's output predicts."""
        if self.prediction == "epsilon":
            return output
        signal, rest = self._roots(timesteps)
        return signal * output + rest * noised

    def snr(self, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Signal-to-noise ratio a_t / (1 - a_t)."""
        signal = self.signal(timesteps)
        return signal / (1 - signal)

    def loss_weight(
        self, timesteps: Int[Tensor, " batch"], gamma: float
    ) -> Float[Tensor, " batch"]:
        """Min-SNR weight of the output's squared error (Hang et al. 2023); 1 for gamma 0.

        min(SNR, gamma) on the clean image is min(SNR, gamma) / SNR on the noise and
        min(SNR, gamma) / (SNR + 1) on the velocity.
        """
        snr = self.snr(timesteps)
        if gamma == 0:
            return torch.ones_like(snr)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def ddim_step(
        self,
        noised: Float[Tensor, "batch channels height width"],
        timestep: int,
        next_timestep: int,
        output: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """x_next after one deterministic DDIM step from x_t, up or down (Song et al. 2021).

        `next_timestep` -1 is the clean image. The predicted clean image is clipped to [-1, 1].
        """
        times = torch.full((len(noised),), timestep, device=noised.device)
        start = self.predicted_start(noised, times, output).clamp(-1, 1)
        if next_timestep < 0:
            return start
        signal, rest = self._roots(times)
        noise = (noised - signal * start) / rest
        return self.add_noise(start, torch.full_like(times, next_timestep), noise)

    def _roots(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.signal(timesteps)[:, None, None, None]
        return signal.sqrt(), (1 - signal).sqrt()


def training_timesteps(
    sample_numbers: Int[Tensor, " batch"], seed: int, low: int, high: int
) -> Int[Tensor, " batch"]:
    """One timestep in [low, high) per sample; neighbours in the stream are spread evenly.

    A golden-ratio (Kronecker) sequence: consecutive samples cover the range more evenly than
    independent ones would, whatever the batch size.
    """
    return low + (spread_uniform(sample_numbers, seed, "timestep") * (high - low)).long()


def spread_uniform(
    sample_numbers: Int[Tensor, " batch"], seed: int, purpose: str
) -> Float64[Tensor, " batch"]:
    """Low-discrepancy number in [0, 1) per sample: frac(offset + sample number / golden ratio)."""
    offset = sample_seed(seed, 0, purpose)
    bits = sample_numbers.long() * _GOLDEN + offset  # integers wrap: exact for any sample number
    return ((bits >> 11) & (2**53 - 1)).double() / 2**53


def sample_noise(
    shape: Sequence[int],
    sample_numbers: Int[Tensor, " batch"],
    seed: int,
    purpose: str,
    device: torch.device | str,
) -> Float[Tensor, "batch ..."]:
    """Standard normal noise of `shape` per sample, a function of (seed, sample number, purpose).

    Generated on `device`; `sample_numbers` on the host save a synchronisation per call.
    """
    return torch.stack(
        [
            torch.randn(tuple(shape), generator=generator, device=device)
            for generator in _generators(sample_numbers, seed, purpose, device)
        ]
    )


def sample_dropout(
    shape: Sequence[int],
    sample_numbers: Int[Tensor, " batch"],
    seed: int,
    rate: float,
    device: torch.device | str,
) -> Float[Tensor, "batch ..."]:
    """Dropout factors of `shape` per sample: 0 with probability `rate`, else 1 / (1 - rate)."""
    kept = [
        torch.rand(tuple(shape), generator=generator, device=device) >= rate
        for generator in _generators(sample_numbers, seed, "dropout", device)
    ]
    return torch.stack(kept).float() / (1 - rate)


def key_noise(
    keys: Sequence[str],
    timestep: int,
    draw: int,
    shape: Sequence[int],
    device: torch.device | str,
) -> Float[Tensor, "batch ..."]:
    """Standard normal noise of `shape` per slice, a function of (slice key, timestep, draw).

    `draw` is the number of the noise sample. Generated on the host, so that a slice's noise is the
    same on every device.
    """
    draws = []
    for key in keys:
        text = f"{key}/{timestep}/{draw}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        draws.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(draws).to(device)


def _generators(
    sample_numbers: Tensor, seed: int, purpose: str, device: torch.device | str
) -> list[torch.Generator]:
    return [
        torch.Generator(device).manual_seed(sample_seed(seed, number, purpose))
        for number in sample_numbers.tolist()
    ]

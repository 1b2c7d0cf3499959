import numpy as np
import pytest
import torch
from torch import Tensor

from cldf_dist.data.features.encoding import as_stored, to_stored


@pytest.fixture
def features() -> Tensor:
    """(batch, levels, channels, h, w); channels differ a thousandfold, one is zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 3, 4, 5, 6, generator=generator)
    drawn[:, :, 1] *= 1000
    drawn[0, 0, 2] = 0
    return drawn


def test_float16_is_pixel_major(features: Tensor) -> None:
    (stored,) = to_stored("up0.1", features, "float16").values()
    assert stored.dtype == torch.float16
    assert stored.is_contiguous()
    assert torch.equal(stored, features.permute(0, 1, 3, 4, 2).half())
    expected = features.half().float().flatten(1, 2)
    assert torch.equal(as_stored(features, "float16"), expected)


def test_int8_keeps_each_channel_to_half_a_step(features: Tensor) -> None:
    stored = to_stored("up0.1", features, "int8")
    assert {name: value.dtype for name, value in stored.items()} == {
        "up0.1": torch.int8,
        "up0.1.scale": torch.float32,
    }
    assert stored["up0.1"].shape == (2, 3, 5, 6, 4)
    assert stored["up0.1.scale"].shape == (2, 3, 4)
    assert stored["up0.1"].abs().max() == 127
    back = as_stored(features, "int8").reshape(features.shape)
    step = features.abs().amax((3, 4), keepdim=True) / 127
    assert ((back - features).abs() <= step / 2 + 1e-6).all()
    assert back[0, 0, 2].abs().max() == 0


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(features: Tensor, storage: str, value: float) -> None:
    features[1, 2, 3, 4, 5] = value
    with pytest.raises(ValueError, match=r"features of up0\.1 must be finite and within float16"):
        to_stored("up0.1", features, storage)


def test_what_float16_cannot_hold_is_refused(features: Tensor) -> None:
    features[0, 0, 0, 0, 0] = 70_000
    with pytest.raises(ValueError, match=r"got up to 7e\+04; the diffusion model diverged"):
        to_stored("up0.1", features, "float16")
    assert np.isfinite(as_stored(features, "int8").numpy()).all()

import torch
from torch import Tensor, nn

from cldf_dist.method.counterfactual import cdm_saliency
from cldf_dist.method.noise import Schedule

PATTERN = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
SETTINGS = {"noise_levels": (100, 400), "draws": 2, "smooth_pixels": 0.0}


class Flip(nn.Module):
    """Its prediction differs between the classes by a known pattern, at every timestep."""

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return x.tanh() + class_labels[:, None, None, None] * PATTERN


def test_saliency_is_the_difference_of_the_predicted_noise():
    images, keys = torch.randn(3, 2, 6, 5), ["a", "b", "c"]
    expected = PATTERN.abs().sum(0).expand(3, 6, 5)
    epsilon = Schedule(1000, "cosine", "epsilon")
    saliency = cdm_saliency(Flip(), epsilon, images, keys, **SETTINGS)
    torch.testing.assert_close(saliency, expected, atol=1e-5, rtol=1e-5)
    velocity = Schedule(1000, "cosine", "v_prediction")
    factor = velocity.alphas_cumprod[[100, 400]].sqrt().mean()  # noise = sqrt(a) v + ...
    saliency = cdm_saliency(Flip(), velocity, images, keys, **SETTINGS)
    torch.testing.assert_close(saliency, factor * expected, atol=1e-5, rtol=1e-5)


def test_a_slice_has_the_same_saliency_in_any_batch():
    class Nonlinear(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
            return (x * (1 + class_labels[:, None, None, None])).tanh()

    schedule = Schedule(1000, "cosine", "v_prediction")
    images, settings = torch.randn(3, 1, 12, 12), {**SETTINGS, "smooth_pixels": 1.0}
    together = cdm_saliency(Nonlinear(), schedule, images, ["a", "b", "c"], **settings)
    alone = cdm_saliency(Nonlinear(), schedule, images[1:2], ["b"], **settings)
    torch.testing.assert_close(together[1:2], alone)
    assert together.min() > 0

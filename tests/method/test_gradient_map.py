import pytest
import torch
from scipy.ndimage import gaussian_filter

from cldf_dist.method.gradient_map import gradient_map, smooth, unit_length
from cldf_dist.method.noise import Schedule, key_noise

SCHEDULE = Schedule(1000, "cosine", "v_prediction")
SETTINGS = {"timesteps": (100, 50), "num_noise_samples": 2, "smooth_pixels": 0.0}


def linear(weight: torch.Tensor):
    """log p(object) / p(none) = <weight, x>, whatever the timestep."""
    return lambda x, _t: torch.stack([torch.zeros(len(x)), (x * weight).sum((1, 2, 3))], 1)


def test_linear_classifier_gives_its_normalised_weights():
    torch.manual_seed(0)
    weight, images = torch.randn(3, 8, 8), torch.randn(2, 3, 8, 8)
    maps, _ = gradient_map(linear(weight), SCHEDULE, images, ["a", "b"], **SETTINGS)
    expected = (weight / weight.norm()).abs().sum(0)
    torch.testing.assert_close(maps, expected.expand(2, 8, 8))


def test_map_survives_a_classifier_that_is_certain():
    torch.manual_seed(0)
    weight, images = torch.rand(1, 8, 8), torch.ones(1, 1, 8, 8)
    sure, probability = gradient_map(linear(1e3 * weight), SCHEDULE, images, ["a"], **SETTINGS)
    assert probability.item() == 1
    torch.testing.assert_close(sure[0], (weight / weight.norm())[0])


def test_map_is_the_direction_of_the_log_probability_gradient():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 8), torch.nn.Tanh())
    head = torch.nn.Linear(8, 2)
    images = torch.randn(2, 2, 4, 4)
    settings = {"timesteps": (200,), "num_noise_samples": 1, "smooth_pixels": 0.0}
    maps, _ = gradient_map(lambda x, _t: head(net(x)), SCHEDULE, images, ["a", "b"], **settings)
    noise = key_noise(["a", "b"], 200, 0, (2, 4, 4), "cpu")
    noised = SCHEDULE.add_noise(images, torch.full((2,), 200), noise).requires_grad_()
    log_probability = head(net(noised)).log_softmax(1)[:, 1]
    (gradient,) = torch.autograd.grad(log_probability.sum(), noised)
    torch.testing.assert_close(maps, unit_length(gradient).abs().sum(1))


def test_probability_is_the_mean_of_the_clean_slice_and_the_lowest_level():
    torch.manual_seed(0)
    weight, images, keys = torch.randn(1, 8, 8), torch.randn(2, 1, 8, 8), ["a", "b"]
    _, probability = gradient_map(linear(weight), SCHEDULE, images, keys, **SETTINGS)
    noised = [
        SCHEDULE.add_noise(
            images, torch.full((2,), 50), key_noise(keys, 50, draw, (1, 8, 8), "cpu")
        )
        for draw in range(2)
    ]
    expected = [(x * weight).sum((1, 2, 3)).sigmoid() for x in [images, *noised]]
    torch.testing.assert_close(probability, torch.stack(expected).mean(0))


def test_a_slice_has_the_same_map_in_any_batch():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(1, 2, 3).requires_grad_(False)

    def classifier(x: torch.Tensor, _times: torch.Tensor) -> torch.Tensor:
        return conv(x).tanh().mean((2, 3))

    images = torch.randn(3, 1, 12, 12)
    settings = {**SETTINGS, "smooth_pixels": 1.0}
    with torch.no_grad():
        together, _ = gradient_map(classifier, SCHEDULE, images, ["a", "b", "c"], **settings)
        alone, _ = gradient_map(classifier, SCHEDULE, images[1:2], ["b"], **settings)
    torch.testing.assert_close(together[1:2], alone)


def test_no_gradient_gives_a_zero_map():
    images = torch.randn(1, 1, 8, 8)
    maps, _ = gradient_map(linear(torch.zeros(1, 8, 8)), SCHEDULE, images, ["a"], **SETTINGS)
    assert maps.abs().max() == 0


def test_smoothing_equals_scipys():
    torch.manual_seed(0)
    maps = torch.rand(2, 20, 17, dtype=torch.float64)
    for pixels in (0.7, 1.0, 2.5):
        expected = [gaussian_filter(m, pixels, truncate=3, mode="mirror") for m in maps.numpy()]
        torch.testing.assert_close(smooth(maps, pixels)[0], torch.from_numpy(expected[0]))
        torch.testing.assert_close(smooth(maps, pixels)[1], torch.from_numpy(expected[1]))
    assert torch.equal(smooth(maps, 0.0), maps)


def test_a_kernel_wider_than_the_map_is_refused():
    with pytest.raises(ValueError, match=r"got 3.0 for maps of \(8, 8\)"):
        smooth(torch.zeros(1, 8, 8), 3.0)

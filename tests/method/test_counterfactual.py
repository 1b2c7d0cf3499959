import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_dist.config import Classifier, Diffusion, UNet
from cldf_dist.method.counterfactual import cdm_saliency, cg_cdm, cg_diff
from cldf_dist.method.noise import Schedule, key_noise
from cldf_dist.nets.classifiers import NoisyClassifier
from cldf_dist.nets.unet import build_unet

PATTERN = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
SETTINGS = {"timesteps": (100, 400), "num_noise_samples": 2, "smooth_pixels": 0.0}


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


SCHEDULE = Schedule(1000, "cosine", "epsilon")
IMAGES = 0.3 * torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(1)).tanh()
KEYS = ["a", "b", "c"]
DIFF = {"timestep": 50, "steps": 4, "scale": 0.0, "inversion": True, "smooth_pixels": 0.0}
CDM = {"timestep": 50, "steps": 3, "scale": 0.0, "tau": 0.95, "smooth_pixels": 0.0}
NO_OBJECT, OBJECT = 0, 1


class ByLabel(nn.Module):
    """Predicts the noise embedding ** power * PATTERN, whatever the slice and the timestep."""

    def __init__(self, embeddings: list[float], power: int = 1) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding.from_pretrained(torch.tensor(embeddings)[:, None])
        self.power = power

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return self.class_embedding(class_labels)[:, :, None, None] ** self.power * PATTERN / 10


def indifferent(x: Tensor, timesteps: Tensor) -> Tensor:
    return x.sum((1, 2, 3))[:, None] * torch.zeros(2)


def change(start: int, end: int) -> float:
    """What x_end changes by per unit of a constant predicted noise, from a given x_start."""
    a, b = SCHEDULE.alphas_cumprod[[start, end]].tolist()
    return math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.95])
def test_cg_cdm_adds_up_the_branches_differences_over_adjacent_steps(tau: float):
    net = ByLabel([0.5, 2.0, 7.0])
    saliency = cg_cdm(net, indifferent, SCHEDULE, IMAGES, KEYS, **{**CDM, "tau": tau})
    total = abs(sum(change(50, end) for end in (49, 48, 47)))
    expected = total * 1.5 * (PATTERN / 10).abs().sum(0).expand(3, 6, 5)
    torch.testing.assert_close(saliency, expected, atol=1e-5, rtol=1e-4)


def test_tau_near_one_gives_the_derivative_and_zero_the_whole_flip():
    """By the label's embedding e: d e^2 = 2 e de near object, and the difference of the squares."""
    net, unit = ByLabel([0.5, 2.0, 7.0], power=2), ByLabel([0.0, 1.0, 7.0])
    one = cg_cdm(unit, indifferent, SCHEDULE, IMAGES, KEYS, **{**CDM, "tau": 0.0})
    flip = cg_cdm(net, indifferent, SCHEDULE, IMAGES, KEYS, **{**CDM, "tau": 0.0})
    torch.testing.assert_close(flip, (2.0**2 - 0.5**2) * one, atol=1e-5, rtol=1e-3)
    derivative = cg_cdm(net, indifferent, SCHEDULE, IMAGES, KEYS, **{**CDM, "tau": 0.99})
    torch.testing.assert_close(derivative, (2 * 2.0 * 1.5) * one, atol=1e-4, rtol=1e-2)


def test_guidance_draws_each_branch_towards_its_class_by_the_published_weight():
    """For logits (0, w x) the gradients of both log-probabilities differ by w, whatever p is."""
    weight = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2))

    def linear(x: Tensor, timesteps: Tensor) -> Tensor:
        logit = (weight * x).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(logit), logit], 1)

    settings = {**CDM, "steps": 1, "scale": 10.0, "tau": 0.0}
    saliency = cg_cdm(ByLabel([1.0, 1.0, 1.0]), linear, SCHEDULE, IMAGES, KEYS, **settings)
    by_noise = change(50, 49) * math.sqrt(1 - SCHEDULE.alphas_cumprod[50].item())
    expected = abs(by_noise) * 10 * weight.abs().sum(0).expand(3, 6, 5)
    torch.testing.assert_close(saliency, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("inversion", [True, False])
def test_cg_diff_is_what_the_label_no_object_changes(inversion: bool):
    """Encoded without noise, or noised alike: both leave only the noise seen for "no object"."""
    settings = {**DIFF, "inversion": inversion}
    net = ByLabel([1.0, 0.0, 0.0])
    saliency = cg_diff(net, indifferent, SCHEDULE, IMAGES, KEYS, **settings)
    expected = abs(change(50, 0)) * (PATTERN / 10).abs().sum(0).expand(3, 6, 5)
    torch.testing.assert_close(saliency, expected, atol=1e-4, rtol=1e-3)


def test_classifier_free_guidance_is_a_multiple_of_what_the_label_changes():
    """Encoded without a label and decoded with "no object": the net sees noise 1, 0, 0.25 for
    "object", "no object" and none; so decoding sees 0.25 + 3 (0 - 0.25) = -0.5."""
    net = ByLabel([0.0, 1.0, 0.25])
    plain = cg_diff(net, indifferent, SCHEDULE, IMAGES, KEYS, **DIFF)
    three = cg_diff(net, indifferent, SCHEDULE, IMAGES, KEYS, **DIFF, label_scale=3.0)
    torch.testing.assert_close(three, 3 * plain, atol=1e-4, rtol=1e-3)
    none = cg_diff(net, indifferent, SCHEDULE, IMAGES, KEYS, **DIFF, label_scale=0.0)
    assert none.max() < 0.02 * plain.max()


def test_without_label_and_classifier_nothing_changes():
    class Unlabelled(ByLabel):
        def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
            return (3 * x).tanh() * (1 + timesteps[:, None, None, None] / 100)

    net = Unlabelled([0.5, 2.0, 7.0])
    guided = {"scale": 100.0}
    two = cg_diff(net, indifferent, SCHEDULE, IMAGES, KEYS, **DIFF | guided | {"inversion": False})
    assert two.count_nonzero() == 0
    derivative = cg_cdm(net, indifferent, SCHEDULE, IMAGES, KEYS, **CDM | guided)
    assert derivative.count_nonzero() == 0
    errors = [
        cg_diff(net, indifferent, SCHEDULE, IMAGES, KEYS, **DIFF | {"steps": steps}).mean().item()
        for steps in (1, 5, 50)
    ]
    assert errors[2] < errors[1] / 3 < errors[0] / 6, "finer steps bring the slice itself back"
    assert errors[2] < 0.02 * IMAGES.abs().sum(1).mean()


@pytest.mark.parametrize(
    ("inversion", "expected"),
    [(True, [0, 12, 25, 37, 50, 37, 25, 12]), (False, [50, 37, 25, 12])],
)
def test_cg_diff_climbs_to_the_noise_level_and_comes_down_the_same_way(
    inversion: bool, expected: list[int]
):
    visited: list[int] = []

    class Recorder(ByLabel):
        def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
            visited.append(int(timesteps.unique()))
            return super().forward(x, timesteps, class_labels)

    net = Recorder([1.0, 0.0, 0.0])
    cg_diff(net, indifferent, SCHEDULE, IMAGES, KEYS, **DIFF | {"inversion": inversion})
    assert visited == expected


def test_cg_diff_lowers_what_the_classifier_takes_for_the_object():
    beliefs: list[float] = []

    def sees_a_corner(x: Tensor, timesteps: Tensor) -> Tensor:
        logit = x[:, :, :2, :2].sum((1, 2, 3))
        logits = torch.stack([torch.zeros_like(logit), logit], 1)
        beliefs.extend(logits.detach().softmax(1)[:, OBJECT].tolist())
        return logits

    grey, net = torch.zeros(1, 2, 6, 5), ByLabel([0.0, 0.0, 0.0])
    weak = cg_diff(net, sees_a_corner, SCHEDULE, grey, ["a"], **DIFF | {"scale": 1.0})
    assert beliefs[0] == 0.5
    assert beliefs == sorted(beliefs, reverse=True)
    assert len(set(beliefs)) == DIFF["steps"]
    strong = cg_diff(net, sees_a_corner, SCHEDULE, grey, ["a"], **DIFF | {"scale": 10.0})
    assert (strong[0, :2, :2] > 5 * weak[0, :2, :2]).all()
    assert (weak[0, :2, :2] > 0).all()
    for saliency in (weak, strong):
        saliency[0, :2, :2] = 0
        assert saliency.count_nonzero() == 0


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    unet = build_unet(
        UNet(channels=(8, 16), num_res_blocks=1, attention_levels=(False, True),
             num_head_channels=16, norm_num_groups=8),
        2,
    )  # fmt: skip
    classifier = NoisyClassifier(
        Classifier(channels=(8, 16), attention_levels=(False, False), norm_num_groups=8), 2
    )
    for net in (unet, classifier):
        for parameter in net.parameters():  # MONAI starts its last convolution at zero
            nn.init.normal_(parameter, std=0.3)
        net.eval()
    nn.init.normal_(unet.class_embedding.weight, std=3.0)
    return unet, classifier


def test_the_u_net_takes_the_label_in_between(nets: tuple[nn.Module, nn.Module]):
    net, classifier = nets
    images = torch.rand(2, 2, 16, 16) - 0.5
    before = net.class_embedding.weight.clone()
    settings = {**CDM, "timestep": 300, "steps": 1, "tau": 0.25}
    saliency = cg_cdm(net, classifier, SCHEDULE, images, ["a", "b"], **settings)
    assert torch.equal(net.class_embedding.weight, before), "the net itself stays as it is"
    timesteps = torch.full((2,), 300)
    noise = key_noise(["a", "b"], 300, 0, (2, 16, 16), "cpu")
    noised = SCHEDULE.add_noise(images, timesteps, noise)
    branches = []
    with torch.no_grad():
        for share in (1.0, 0.25):
            label = share * before[OBJECT] + (1 - share) * before[NO_OBJECT]
            net.class_embedding.weight[2] = label
            output = net(noised, timesteps, class_labels=torch.full((2,), 2))
            branches.append(SCHEDULE.ddim_step(noised, 300, 299, output))
        net.class_embedding.weight.copy_(before)
    expected = ((branches[0] - branches[1]) / 0.75).abs().sum(1)
    assert expected.max() > 2e-4
    torch.testing.assert_close(saliency, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [(cg_diff, DIFF), (cg_diff, {**DIFF, "inversion": False}), (cg_cdm, CDM)],
    ids=["cg_diff", "cg_diff from noise", "cg_cdm"],
)
def test_a_slice_has_the_same_counterfactual_in_any_batch(
    nets: tuple[nn.Module, nn.Module], method: Callable[..., Tensor], settings: dict[str, Any]
):
    net, classifier = nets
    images = torch.rand(3, 2, 16, 16) - 0.5
    schedule = Schedule(1000, "cosine", "v_prediction")
    settings = {**settings, "scale": 20.0, "smooth_pixels": 1.0}
    together = method(net, classifier, schedule, images, KEYS, **settings)
    alone = method(net, classifier, schedule, images[1:2], KEYS[1:2], **settings)
    torch.testing.assert_close(together[1:2], alone, atol=2e-5, rtol=1e-3)
    assert together.shape == (3, 16, 16)
    assert 0 < together.min() < together.max() < torch.inf
    assert not together.requires_grad


@pytest.mark.parametrize(("published", "section"), [(300, "cg_diff"), (400, "cg_cdm")])
def test_the_study_has_a_variant_with_the_published_signal_to_noise_ratios(
    published: int, section: str
):
    """guided-diffusion's linear schedule of 4000 steps: beta from 1e-4 / 4 to 0.02 / 4."""
    text = (Path(__file__).parents[2] / "configs" / "study.yaml").read_text()
    found = re.search(rf"counterfactuals_at_published_scales: .*{section}\.timestep=(\d+)", text)
    assert found
    level = int(found[1])
    betas = torch.linspace(1e-4 / 4, 0.02 / 4, 4000, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)[published]
    default = Diffusion()
    cosine = Schedule(default.num_timesteps, default.schedule, default.prediction)
    assert cosine.alphas_cumprod[level + 1] < signal
    assert cosine.alphas_cumprod[level - 1] > signal

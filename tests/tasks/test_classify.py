import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cldf_dist.config import Cam, Classifier
from cldf_dist.method.noise import Schedule
from cldf_dist.nets.classifiers import CamClassifier, NoisyClassifier
from cldf_dist.tasks.classify import Classify, NoiseRange, noising_timesteps

SCHEDULE = Schedule(1000, "cosine", "v_prediction")
NOISE = NoiseRange(SCHEDULE, max_timestep=600, clean_fraction=0.3)


class Recorder(nn.Module):
    """Its logits are the image's mean; it remembers what it was asked."""

    dropout = 0.5
    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, *timesteps: Tensor, feature_scale: Tensor | None) -> Tensor:
        self.calls.append((x, *timesteps, *([] if feature_scale is None else [feature_scale])))
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def batch(numbers: Tensor) -> dict[str, Tensor]:
    """Bright images are objects."""
    generator = torch.Generator().manual_seed(0)
    label = numbers % 2
    images = 0.1 * torch.randn(64, 1, 16, 16, generator=generator)[numbers % 64]
    return {
        "image": images + (2 * label - 1)[:, None, None, None],
        "label": label,
        "sample_number": numbers,
    }


def test_clean_loss_and_accuracy_by_hand():
    data = batch(torch.arange(4))
    data["label"][3] = 0
    task = Classify(Recorder(), label_smoothing=0.1, noise=None, seed=0).eval()
    result = task(data)
    mean = data["image"].mean((1, 2, 3))
    expected = functional.cross_entropy(
        torch.stack([-mean, mean], 1), data["label"], label_smoothing=0.1
    )
    torch.testing.assert_close(result["loss"], expected)
    assert result["accuracy"] == 0.75


def test_clean_share_gets_no_noise_and_timestep_zero():
    net, data = Recorder(), batch(torch.arange(64))
    Classify(net, label_smoothing=0.0, noise=NOISE, seed=1).eval()(data)
    noised, times = net.calls[0]
    _, clean = noising_timesteps(torch.arange(64), 1, NOISE)
    assert 0.25 < clean.float().mean() < 0.35
    assert (times[clean] == 0).all()
    assert torch.equal(noised[clean], data["image"][clean])
    assert (noised[~clean] != data["image"][~clean]).flatten(1).any(1).all()


def test_noise_levels_cover_their_range_evenly():
    times, clean = noising_timesteps(torch.arange(6000), 0, NOISE)
    counts = torch.bincount(times[~clean] // 100)
    assert counts.tolist() == [pytest.approx(700, abs=10)] * 6


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_nothing_clean(share):
    times, clean = noising_timesteps(torch.arange(500), 0, NoiseRange(SCHEDULE, 600, share))
    assert clean.all() if share else not clean.any()
    assert times.min() >= 0
    assert times.max() < 600


def test_a_sample_is_treated_alike_in_any_batch():
    net = Recorder()
    task = Classify(net, label_smoothing=0.0, noise=NOISE, seed=1)
    task(batch(torch.arange(8)))
    torch.manual_seed(7)
    task(batch(torch.tensor([5, 3])))
    assert len(net.calls[0]) == 3  # images, timesteps, dropout
    for whole, part in zip(*net.calls):
        assert torch.equal(part, whole[[5, 3]])


def test_dropout_ends_with_training():
    net = Recorder()
    task = Classify(net, label_smoothing=0.0, noise=None, seed=1)
    task(batch(torch.arange(4)))
    task.eval()(batch(torch.arange(4)))
    assert [len(call) for call in net.calls] == [2, 1]


@pytest.mark.parametrize("noise", [None, NOISE])
def test_real_nets_learn_brightness(noise):
    torch.manual_seed(0)
    if noise is None:
        net: nn.Module = CamClassifier(Cam(channels=(16, 16, 16, 16)), 1)
    else:
        settings = Classifier(channels=(8, 8), attention_levels=(False, False), norm_num_groups=4)
        net = NoisyClassifier(settings, 1)
    task = Classify(net, label_smoothing=0.02, noise=noise, seed=0)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    for step in range(15):
        optimizer.zero_grad()
        task(batch(torch.arange(16) + 16 * step))["loss"].backward()
        optimizer.step()
    assert task.eval()(batch(torch.arange(1000, 1032)))["accuracy"] > 0.9


def test_impossible_noise_ranges_are_refused():
    with pytest.raises(ValueError, match=r"max_timestep must be in \[1, 1000\], got 1001"):
        NoiseRange(SCHEDULE, 1001, 0.3)
    with pytest.raises(ValueError, match=r"clean_fraction must be in \[0, 1\], got 1.5"):
        NoiseRange(SCHEDULE, 600, 1.5)

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cldf_dist.config import UNet
from cldf_dist.method.noise import Schedule, sample_noise, training_timesteps
from cldf_dist.nets.unet import build_unet
from cldf_dist.tasks.denoise import PREVIEW_GAP, Denoise

SCHEDULE = Schedule(1000, "cosine", "v_prediction")
OPTIONS = {"min_snr_gamma": 5.0, "label_dropout": 0.5, "seed": 3}


class Recorder(nn.Module):
    """Puts out zeros and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        self.calls.append((x, timesteps, class_labels))
        return torch.zeros_like(x)


def batch(numbers: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 2, 8, 8, generator=generator)[numbers % 64]
    return {"image": images, "label": numbers % 2, "sample_number": numbers}


def small_unet() -> nn.Module:
    settings = UNet(
        channels=(8, 16),
        num_res_blocks=1,
        attention_levels=(False, True),
        num_head_channels=8,
        norm_num_groups=4,
    )
    return build_unet(settings, 2)


def test_loss_by_hand():
    numbers = torch.arange(4)
    data = batch(numbers)
    times = training_timesteps(numbers, 3, 0, 1000)
    noise = sample_noise((2, 8, 8), numbers, 3, "noise", "cpu")
    squares = SCHEDULE.target(data["image"], times, noise).square().mean((1, 2, 3))
    expected = (SCHEDULE.loss_weight(times, 5.0) * squares).mean()
    torch.testing.assert_close(Denoise(Recorder(), SCHEDULE, **OPTIONS)(data)["loss"], expected)


def test_a_sample_is_noised_alike_in_any_batch():
    net = Recorder()
    task = Denoise(net, SCHEDULE, **OPTIONS)
    task(batch(torch.arange(8)))
    torch.manual_seed(5)
    task(batch(torch.tensor([6, 2])))
    for whole, part in zip(*net.calls):
        assert torch.equal(part, whole[[6, 2]])


def test_label_dropout_has_its_rate_and_unknown_classes_count_as_unlabelled():
    net = Recorder()
    data = batch(torch.arange(400))
    data["label"][:10] = -1
    Denoise(net, SCHEDULE, **{**OPTIONS, "label_dropout": 0.25})(data)
    labels = net.calls[0][2]
    assert (labels[:10] == 2).all()
    dropped = labels[10:] == 2
    assert 0.18 < dropped.float().mean() < 0.32
    assert torch.equal(labels[10:][~dropped], data["label"][10:][~dropped])


def test_an_unconditional_model_never_sees_a_label() -> None:
    net = Recorder()
    Denoise(net, SCHEDULE, **{**OPTIONS, "label_dropout": 1.0})(batch(torch.arange(50)))
    assert (net.calls[0][2] == 2).all()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    task = Denoise(small_unet(), SCHEDULE, **OPTIONS)
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task(batch(torch.arange(8)))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_preview_shows_every_class_and_guidance_the_same_each_time():
    torch.manual_seed(0)
    net = small_unet().eval()
    task = Denoise(net, SCHEDULE, **OPTIONS, image_size=16)
    first = task.preview(net)["samples"]
    torch.manual_seed(1)
    assert np.array_equal(task.preview(net)["samples"], first)
    side = 4 * 16 + 3 * PREVIEW_GAP
    assert first.shape == (side, side)
    assert first.dtype == np.uint8
    pitch = 16 + PREVIEW_GAP
    assert all((first[at : at + PREVIEW_GAP] == 255).all() for at in range(16, side, pitch))
    tiles = [first[row : row + 16, :16] for row in range(0, side, pitch)]
    assert len({tile.tobytes() for tile in tiles}) == 4, "each row has a noise of its own"
    other = Denoise(net, SCHEDULE, **{**OPTIONS, "seed": 4}, image_size=16)
    assert not np.array_equal(other.preview(net)["samples"], first)


def test_preview_of_a_perfect_predictor_is_the_image():
    class Perfect(nn.Module):
        in_channels = 1

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
            """The velocity that leads to a constant image of the class's own value."""
            start = torch.tensor([-0.5, 0.5, 0.0])[class_labels][:, None, None, None]
            signal = SCHEDULE.signal(timesteps)[:, None, None, None]
            noise = (x - signal.sqrt() * start) / (1 - signal).sqrt()
            return signal.sqrt() * noise - (1 - signal).sqrt() * start

    net = Perfect()
    samples = Denoise(net, SCHEDULE, **OPTIONS, image_size=4).preview(net)["samples"]
    pitch = 4 + PREVIEW_GAP
    tiles = [
        [samples[row, column] for column in range(0, 22, pitch)] for row in range(0, 22, pitch)
    ]
    # guidance 3 triples the distance from the unconditional image, clipped at -1 and 1
    assert np.array(tiles) == pytest.approx(np.array([[64, 0, 191, 255]] * 4), abs=1)


def test_without_an_image_size_there_is_no_preview():
    net = Recorder()
    assert Denoise(net, SCHEDULE, **OPTIONS).preview(net) == {}

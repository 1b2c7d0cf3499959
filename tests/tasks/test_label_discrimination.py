import copy

import pytest
import torch
from torch import Tensor, nn

from cldf_dist.config import UNet
from cldf_dist.method.counterfactual import EMBEDDING
from cldf_dist.method.noise import Schedule, sample_noise, training_timesteps
from cldf_dist.nets.unet import build_unet
from cldf_dist.tasks.label_discrimination import FIRST_SCALE, LabelDiscrimination

SCHEDULE = Schedule(1000, "cosine", "epsilon")
RANGE = (100, 300)


class BrightIsObject(nn.Module):
    """Predicts no noise, and where a pixel is bright whatever its label says."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding(3, 2)
        nn.init.zeros_(self.class_embedding.weight)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        told = self.class_embedding(class_labels)[:, :, None, None]
        return torch.where(x > 1.5, told, torch.zeros_like(x))


def batch(numbers: Tensor) -> dict[str, Tensor]:
    """Dark slices; those of odd numbers have four very bright pixels, which are the object."""
    images = torch.zeros(len(numbers), 2, 8, 8)
    labels = numbers % 2
    images[:, :, 2:4, 2:4] = 8.0 * labels[:, None, None, None]
    return {"image": images, "label": labels, "sample_number": numbers}


def small_unet() -> nn.Module:
    torch.manual_seed(0)
    settings = UNet(
        channels=(8, 16),
        num_res_blocks=1,
        attention_levels=(False, True),
        num_head_channels=8,
        norm_num_groups=4,
    )
    net = build_unet(settings, 2)
    for weight in net.parameters():
        if not weight.any():  # MONAI begins with zeros behind the label
            nn.init.normal_(weight, std=0.1)
    return net


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_by_hand(prediction: str) -> None:
    schedule = Schedule(1000, "cosine", prediction)
    net, numbers = small_unet(), torch.arange(6)
    data = batch(numbers)
    times = training_timesteps(numbers, 3, *RANGE)
    noise = sample_noise((2, 8, 8), numbers, 3, "noise", "cpu")
    noised = schedule.add_noise(data["image"], times, noise)
    errors = []
    for label in (0, 1):
        output = net(noised, times, class_labels=torch.full_like(numbers, label))
        found = schedule.predicted_noise(noised, times, output)
        errors.append((found - noise).square().mean((1, 2, 3)))
    right = torch.where(numbers % 2 == 1, errors[1], errors[0])
    logits = FIRST_SCALE * (errors[0] - errors[1]) / right
    probability = torch.where(numbers % 2 == 1, logits, -logits).sigmoid()
    found = LabelDiscrimination(net, schedule, timestep_range=RANGE, seed=3)(data)
    torch.testing.assert_close(found["loss"], -probability.log().mean())
    torch.testing.assert_close(found["error"], right.mean())
    torch.testing.assert_close(found["accuracy"], (probability > 0.5).float().mean())


def test_the_embedding_alone_is_trained_saved_and_copied() -> None:
    net = small_unet()
    before = copy.deepcopy(net.state_dict())
    task = LabelDiscrimination(net, SCHEDULE, timestep_range=RANGE, seed=3)
    assert set(task.state_dict()) == {"net.weight", "log_scale", "offset"}
    torch.testing.assert_close(task.net.weight, before[EMBEDDING])
    average = copy.deepcopy(task)
    optimizer = torch.optim.SGD(task.parameters(), lr=10.0)
    task(batch(torch.arange(4)))["loss"].backward()
    optimizer.step()
    changed = (task.net.weight != before[EMBEDDING]).any(1)
    assert changed.tolist() == [True, True, False], "the row without a label is in no loss"
    torch.testing.assert_close(average.net.weight, before[EMBEDDING])
    torch.testing.assert_close(net.state_dict()[EMBEDDING], before[EMBEDDING])
    assert average(batch(torch.arange(4)))["loss"] != task(batch(torch.arange(4)))["loss"]


def test_labels_learn_to_speak_where_the_object_is() -> None:
    """From an embedding that changes nothing, by the labels of slices alone."""
    task = LabelDiscrimination(BrightIsObject(), SCHEDULE, timestep_range=RANGE, seed=0)
    task.net.weight.data[1] = 0.01  # equal rows give no direction
    optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
    first = task(batch(torch.arange(32)))["loss"].item()
    for step in range(150):
        loss = task(batch(torch.arange(16) + 16 * step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = task(batch(torch.arange(5000, 5032)))
    assert first > 0.6
    assert last["loss"].item() < 0.5
    apart = (task.net.weight[1] - task.net.weight[0]).abs().sum()
    assert apart.item() > 0.1

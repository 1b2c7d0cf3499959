import dataclasses

import pytest
import torch

from cldf_dist.config import UNet
from cldf_dist.nets.unet import build_unet

SETTINGS = UNet(
    channels=(8, 16, 24),
    num_res_blocks=1,
    attention_levels=(False, False, True),
    num_head_channels=8,
    norm_num_groups=4,
)


def test_every_parameter_gets_a_gradient():
    net = build_unet(SETTINGS, 3)
    output = net(
        torch.randn(3, 3, 16, 16), torch.tensor([0, 10, 999]), class_labels=torch.arange(3)
    )
    assert output.shape == (3, 3, 16, 16)
    output.sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_the_class_reaches_the_output():
    net = build_unet(SETTINGS, 1)
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image, times = torch.randn(1, 1, 16, 16).expand(3, -1, -1, -1), torch.full((3,), 10)
    outputs = net(image, times, class_labels=torch.arange(3))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[1] - outputs[2]).abs().max() > 1e-3


def test_heads_wider_than_a_level_shrink_to_it():
    net = build_unet(dataclasses.replace(SETTINGS, num_head_channels=32), 1)
    assert net.middle_block.attention.attn.num_heads == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_levels": (True,)}, "one entry per level, got 3 and 1"),
        ({"norm_num_groups": 16}, r"multiples of norm_num_groups=16: \[8, 24\]"),
        ({"num_head_channels": 16}, r"multiples of num_head_channels=16: \[24\]"),
    ],
)
def test_levels_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_unet(dataclasses.replace(SETTINGS, **changes), 1)

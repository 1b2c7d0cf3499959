import dataclasses

import pytest
import torch
from torch import nn

from cldf_dist.config import Cam, Classifier
from cldf_dist.nets.classifiers import CamClassifier, NoisyClassifier

NOISY = Classifier(
    channels=(8, 16), attention_levels=(False, True), num_head_channels=8, norm_num_groups=4
)
CAM = Cam(channels=(16, 16, 24, 32))


@pytest.mark.parametrize("size", [16, 32])
def test_noisy_classifier_takes_any_size_and_uses_every_parameter(size):
    net = NoisyClassifier(NOISY, 3)
    logits = net(torch.randn(2, 3, size, size), torch.tensor([0, 500]))
    assert logits.shape == (2, 2)
    logits.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_noisy_classifier_sees_the_timestep():
    torch.manual_seed(0)
    net = NoisyClassifier(NOISY, 1)
    for parameter in net.parameters():  # MONAI starts its residual branches at zero
        nn.init.normal_(parameter, std=0.2)
    logits = net(torch.randn(1, 1, 16, 16).expand(2, -1, -1, -1), torch.tensor([0, 600]))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_cam_classifier_has_the_resolutions_it_promises():
    net = CamClassifier(CAM, 4)
    sizes = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        net.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: sizes.update({name: output.shape[1:]})
        )
    assert net(torch.randn(2, 4, 32, 32)).shape == (2, 2)
    assert sizes == {
        "layer1": (16, 32, 32),
        "layer2": (16, 16, 16),
        "layer3": (24, 8, 8),
        "layer4": (32, 4, 4),
    }


def test_cam_classifier_has_no_batch_statistics():
    torch.manual_seed(0)
    net = CamClassifier(CAM, 2)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    images = torch.randn(3, 2, 16, 16)
    torch.testing.assert_close(net(images)[:1], net(images[:1]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_narrowest_cam_classifier_trains_in_either_layout(layout):
    net = CamClassifier(CAM, 4).to(memory_format=layout)
    net(torch.randn(4, 4, 32, 32).to(memory_format=layout)).square().sum().backward()
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


def test_feature_scale_multiplies_the_pooled_features():
    torch.manual_seed(0)
    nets = [
        (NoisyClassifier(NOISY, 1), (torch.randn(2, 1, 16, 16), torch.tensor([1, 2]))),
        (CamClassifier(CAM, 1), (torch.randn(2, 1, 16, 16),)),
    ]
    for net, inputs in nets:
        nothing = torch.zeros(2, net.num_features)
        torch.testing.assert_close(
            net(*inputs, feature_scale=nothing), net.linear.bias.expand(2, 2)
        )
        torch.testing.assert_close(net(*inputs, feature_scale=nothing + 1), net(*inputs))


@pytest.mark.parametrize(
    "changes", [{"channels": (8, 16, 24, 32)}, {"channels": (16, 20, 24, 32)}, {"blocks": (1, 1)}]
)
def test_unusable_cam_settings_are_refused(changes):
    with pytest.raises(ValueError, match=r"multiples of 8 from 16 on; got"):
        CamClassifier(dataclasses.replace(CAM, **changes), 1)

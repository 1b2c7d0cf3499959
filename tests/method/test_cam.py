import pytest
import torch
from monai.visualize import GradCAM, GradCAMpp
from torch import Tensor, nn

from cldf_dist.config import Cam
from cldf_dist.method.cam import METHODS, cam_pass, class_activation_maps
from cldf_dist.nets.classifiers import CamClassifier


class Detector(nn.Module):
    """Its only evidence for the object is the brightness of pooled 2 x 2 blocks, hand-set."""

    def __init__(self, num_channels: int = 1) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, num_channels, 1), nn.ReLU())
        self.head = nn.Linear(num_channels, 1, bias=False)
        nn.init.ones_(self.stage[1].weight)
        nn.init.zeros_(self.stage[1].bias)
        nn.init.ones_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        score = self.head(self.stage(x).sum((2, 3)))
        return torch.cat([torch.zeros_like(score), score], 1)


def bright_square() -> Tensor:
    images = torch.full((2, 1, 16, 16), -1.0)
    images[0, :, 4:8, 8:12] = 1.0
    return images


@pytest.mark.parametrize("method", METHODS)
def test_map_lies_on_the_bright_square_and_nowhere_else(method):
    found = cam_pass(Detector(), bright_square(), "stage")
    cam = found.map(method)
    assert cam.shape == (2, 16, 16)
    assert cam[0, 4:8, 8:12].min() > 0.25 * cam[0].max() > 0
    away = cam[0].clone()
    away[3:9, 7:13] = 0  # bilinear upsampling reaches one pixel beyond the square
    assert away.max() == 0
    assert cam[1].max() == 0
    assert found.probability[0] == torch.tensor(4.0).sigmoid()  # four bright blocks
    assert found.probability[1] == 0.5


def test_gradcam_and_gradcam_pp_equal_monais_on_single_images():
    torch.manual_seed(0)
    net = Detector(num_channels=4)
    nn.init.normal_(net.stage[1].weight)
    nn.init.uniform_(net.stage[1].bias)
    nn.init.normal_(net.head.weight)
    images = torch.rand(3, 1, 16, 16)
    ours = class_activation_maps(net, images, "stage", ["gradcam", "gradcam_pp"])
    for index in range(3):
        image = images[index : index + 1].requires_grad_()
        monai = GradCAM(net, "stage", postprocessing=lambda x: x)(image, class_idx=1)[0, 0]
        torch.testing.assert_close(ours["gradcam"][index], monai.detach())
        monai = GradCAMpp(net, "stage", postprocessing=lambda x: x)(image, class_idx=1)[0, 0]
        score = net(image)[0, 1]  # MONAI multiplies by exp(score); its epsilon costs some digits
        expected = (monai / score.exp()).detach()
        torch.testing.assert_close(ours["gradcam_pp"][index], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer4"])
def test_a_slice_has_the_same_maps_in_any_batch(layer):
    torch.manual_seed(0)
    net = CamClassifier(Cam(channels=(16, 16, 16, 16)), 2).eval()
    images = torch.randn(3, 2, 16, 16)
    together = class_activation_maps(net, images, layer)
    alone = class_activation_maps(net, images[1:2], layer)
    assert set(together) == {*METHODS}
    for name in together:
        torch.testing.assert_close(together[name][1:2], alone[name])
        assert together[name].min() >= 0


def test_frozen_nets_work_without_grad_mode_and_nothing_stays_behind():
    net = CamClassifier(Cam(channels=(16, 16, 16, 16)), 1).requires_grad_(False).eval()
    with torch.no_grad():
        maps = class_activation_maps(net, torch.randn(1, 1, 16, 16), "layer2")
    assert not maps["gradcam"].requires_grad
    assert not net.layer2._forward_hooks


def test_score_is_the_difference_of_the_logits():
    """Adding one number to both logits leaves the evidence for the object as it is."""
    net, images = Detector(), bright_square()

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = net.stage

        def forward(self, x: Tensor) -> Tensor:
            activation = self.stage(x)
            score = net.head(activation.sum((2, 3)))
            return torch.cat([-score, torch.zeros_like(score)], 1)

    plain = class_activation_maps(net, images, "stage")
    shifted = class_activation_maps(Shifted(), images, "stage")
    for name in METHODS:
        torch.testing.assert_close(plain[name], shifted[name])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="one of stage, head, got 'layer9'"):
        class_activation_maps(Detector(), bright_square(), "layer9")
    with pytest.raises(ValueError, match="got scorecam"):
        class_activation_maps(Detector(), bright_square(), "stage", ["scorecam"])

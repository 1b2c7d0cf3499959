"""The two slice classifiers: of noised slices, and of clean slices for activation maps."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from monai.networks.nets.diffusion_model_unet import DiffusionModelEncoder
from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn

from cldf_dist.config import CAM_MIN_CHANNELS, CAM_NORM_GROUPS, Cam, Classifier
from cldf_dist.labels import CLASSES
from cldf_dist.nets.attention import use_attention
from cldf_dist.nets.unet import check_levels, head_channels


class NoisyClassifier(nn.Module):
    """The external classifier of noised slices: MONAI's diffusion encoder, pooling, linear layer.

    `dropout` is a rate that the caller applies through `feature_scale`, so that the dropout mask
    is a function of the training sample and not of global random state.
    """

    def __init__(
        self, settings: Classifier, num_channels: int, num_classes: int = len(CLASSES)
    ) -> None:
        super().__init__()
        check_levels(settings.channels, settings.attention_levels, settings.norm_num_groups)
        self.dropout = settings.dropout
        self.num_features = settings.channels[-1]
        self.encoder = DiffusionModelEncoder(
            spatial_dims=2,
            in_channels=num_channels,
            out_channels=num_classes,
            input_shape=(1, 1),  # sizes only the head that is replaced below
            num_res_blocks=settings.num_res_blocks,
            channels=tuple(settings.channels),
            attention_levels=tuple(settings.attention_levels),
            norm_num_groups=settings.norm_num_groups,
            num_head_channels=head_channels(
                settings.channels, settings.attention_levels, settings.num_head_channels
            ),
            use_flash_attention=True,
        )
        use_attention(self.encoder, "sdpa")
        self.encoder.out = _NormalisedPooling(self.num_features, settings.norm_num_groups)
        self.linear = nn.Linear(self.num_features, num_classes)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
        feature_scale: Float[Tensor, "batch features"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; the pooled features are multiplied by `feature_scale`."""
        features: Tensor = self.encoder(x, timesteps)
        if feature_scale is not None:
            features = features * feature_scale
        logits: Tensor = self.linear(features)
        return logits


class CamClassifier(nn.Module):
    """The classifier of clean slices: MONAI's ResNet with a stem of stride 1 and group norm.

    `layer1` has the image's resolution, `layer2` to `layer4` each halve it. `dropout` is as in
    `NoisyClassifier`.
    """

    def __init__(self, settings: Cam, num_channels: int, num_classes: int = len(CLASSES)) -> None:
        super().__init__()
        odd = [
            width
            for width in settings.channels
            if width % CAM_NORM_GROUPS or width < CAM_MIN_CHANNELS
        ]
        if odd or len(settings.channels) != 4 or len(settings.blocks) != 4:
            raise ValueError(
                f"cam.channels and cam.blocks must have four entries, the channels multiples of "
                f"{CAM_NORM_GROUPS} from {CAM_MIN_CHANNELS} on; "
                f"got {tuple(settings.channels)} and {tuple(settings.blocks)}"
            )
        resnet = ResNet(
            block="basic",
            layers=list(settings.blocks),
            block_inplanes=list(settings.channels),
            spatial_dims=2,
            n_input_channels=num_channels,
            conv1_t_size=3,
            conv1_t_stride=1,
            no_max_pool=True,
            num_classes=num_classes,
            bias_downsample=False,
        )
        # MONAI 1.6.1 passes its `norm` argument on to the stem only
        _use_group_norm(resnet)
        self.dropout = settings.dropout
        self.num_features = settings.channels[-1]
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.act)
        self.layer1 = resnet.layer1
        self.layer2 = resnet.layer2
        self.layer3 = resnet.layer3
        self.layer4 = resnet.layer4
        self.linear = resnet.fc

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        feature_scale: Float[Tensor, "batch features"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; the pooled features are multiplied by `feature_scale`."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        features = x.mean((2, 3))
        if feature_scale is not None:
            features = features * feature_scale
        logits: Tensor = self.linear(features)
        return logits


class _NormalisedPooling(nn.Module):
    """Group norm, SiLU and mean over positions.

    The input is (batch, channels * positions), as MONAI's encoder flattens it; the result is
    (batch, channels).
    """

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm = nn.GroupNorm(num_groups, channels)

    def forward(self, flat: Tensor) -> Tensor:
        x = self.norm(flat.view(len(flat), self.channels, -1))
        return torch.nn.functional.silu(x).mean(-1)


def _use_group_norm(net: nn.Module) -> None:
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(CAM_NORM_GROUPS, child.num_features))

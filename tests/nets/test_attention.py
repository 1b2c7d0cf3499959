import pytest
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

from cldf_dist.config import UNet
from cldf_dist.nets.attention import SelfAttention, check_attention, use_attention
from cldf_dist.nets.unet import build_unet

SETTINGS = UNet(
    channels=(8, 16),
    num_res_blocks=1,
    attention_levels=(False, True),
    num_head_channels=8,
    norm_num_groups=4,
)


def plain_monai() -> DiffusionModelUNet:
    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        num_res_blocks=1,
        channels=(8, 16),
        attention_levels=(False, True),
        norm_num_groups=4,
        num_head_channels=8,
        num_class_embeds=3,
    )


def randomise(net: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def test_weights_load_both_ways_and_give_what_plain_monai_gives():
    plain, ours, back = plain_monai(), build_unet(SETTINGS, 2), plain_monai()
    randomise(plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    back.load_state_dict(ours.state_dict())
    images, times, labels = torch.randn(3, 2, 16, 16), torch.tensor([0, 5, 900]), torch.arange(3)
    expected = plain(images, times, class_labels=labels)
    torch.testing.assert_close(ours(images, times, class_labels=labels), expected)
    torch.testing.assert_close(back(images, times, class_labels=labels), expected)


def test_replacing_the_attention_of_a_trained_net_changes_nothing():
    net = plain_monai()
    randomise(net)
    inputs = (torch.randn(2, 2, 16, 16), torch.tensor([1, 500]))
    expected = net(*inputs, class_labels=torch.arange(2))
    use_attention(net, "sdpa")
    torch.testing.assert_close(net(*inputs, class_labels=torch.arange(2)), expected)


def test_every_self_attention_is_ours():
    blocks = [type(m) for m in build_unet(SETTINGS, 2).modules() if hasattr(m, "to_q")]
    assert blocks
    assert set(blocks) == {SelfAttention}


def test_unknown_attention_is_refused_by_name():
    with pytest.raises(ValueError, match="sdpa, xformers, got 'flash3'"):
        use_attention(plain_monai(), "flash3")


def test_xformers_on_a_cpu_is_an_error_that_names_the_remedy():
    net = plain_monai()
    use_attention(net, "xformers")
    with pytest.raises(ValueError, match="attention=sdpa"):
        net(torch.zeros(1, 2, 16, 16), torch.zeros(1), class_labels=torch.zeros(1).long())
    with pytest.raises(ValueError, match="needs a CUDA device"):
        check_attention("xformers", torch.device("cpu"))
    check_attention("sdpa", torch.device("cpu"))


@pytest.mark.gpu
def test_xformers_gives_what_sdpa_gives():
    images, times = torch.randn(2, 2, 16, 16).cuda(), torch.tensor([3, 500]).cuda()
    labels = torch.tensor([0, 1]).cuda()
    fused, other = plain_monai().cuda(), plain_monai().cuda()
    randomise(fused)
    other.load_state_dict(fused.state_dict())
    use_attention(fused, "sdpa")
    use_attention(other, "xformers")
    fused, other = fused.cuda(), other.cuda()
    torch.testing.assert_close(
        other(images, times, class_labels=labels),
        fused(images, times, class_labels=labels),
        atol=2e-3,
        rtol=2e-3,
    )

import copy

import pytest
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

from cldf_dist.config import UNet
from cldf_dist.nets.attention import SelfAttention, use_attention, xformers_fault
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


def test_xformers_is_told_apart_before_it_is_used():
    net, device = plain_monai(), torch.device("cpu")
    assert xformers_fault(net, device, torch.float32) == "needs a CUDA device, got cpu"


def test_another_backend_keeps_the_parameters_and_survives_a_copy():
    net = build_unet(SETTINGS, 2)
    before = dict(net.named_parameters())
    use_attention(net, "xformers")
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    copied = copy.deepcopy(net)
    operators = {m.memory_efficient_attention for m in copied.modules() if hasattr(m, "to_q")}
    assert len(operators) == 1
    assert None not in operators
    use_attention(copied, "sdpa")
    images, times, labels = torch.zeros(1, 2, 16, 16), torch.zeros(1), torch.zeros(1).long()
    assert copied(images, times, class_labels=labels).shape == images.shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_gives_what_sdpa_gives_forward_and_backward(dtype):
    """In bfloat16, by autocast, each is held against sdpa in float32."""
    device = torch.device("cuda")
    oracle, fused, other = (plain_monai().to(device) for _ in range(3))
    randomise(oracle)
    for net, backend in ((oracle, "sdpa"), (fused, "sdpa"), (other, "xformers")):
        net.load_state_dict(oracle.state_dict())
        use_attention(net, backend)
        net.to(device)
    fault = xformers_fault(other, device, dtype)
    if "No operator found" in fault:
        pytest.skip(f"this build of xformers has no operators for this torch: {fault}")
    assert fault == ""
    expected = outcome(oracle, torch.float32)
    allowed = [distance(outcome(fused, dtype), expected)[i] for i in range(2)]
    found = distance(outcome(other, dtype), expected)
    for mine, theirs in zip(found, allowed):
        assert mine <= 2 * theirs + 2e-3


def outcome(net, dtype):
    """The output, and the gradients of all parameters as one vector."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 2, 16, 16, generator=generator).cuda()
    times, labels = torch.tensor([3, 500]).cuda(), torch.tensor([0, 1]).cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        output = net(images, times, class_labels=labels).float()
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def distance(found, expected):
    """Relative errors, in the Euclidean norm."""
    return [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected)]

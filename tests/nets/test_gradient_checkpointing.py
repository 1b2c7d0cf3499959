import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cldf_dist.config import UNet
from cldf_dist.method.features import FeatureTaps
from cldf_dist.nets.unet import build_unet

PLAIN = UNet(
    channels=(8, 16),
    num_res_blocks=2,
    attention_levels=(False, True),
    num_head_channels=8,
    norm_num_groups=4,
)
RECOMPUTED = dataclasses.replace(PLAIN, gradient_checkpointing=True)


def unet(settings: UNet) -> nn.Module:
    net = build_unet(settings, 2)
    torch.manual_seed(0)
    for parameter in net.parameters():  # MONAI starts its residual branches at zero
        nn.init.normal_(parameter, std=0.2)
    return net


def loss_of(net: nn.Module, **options: bool) -> Tensor:
    images = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, **{"enabled": False, **options}):
        output = net(images, torch.tensor([3, 500]), class_labels=torch.tensor([0, 2]))
    return output.float().square().mean()


def gradients(net: nn.Module, **options: bool) -> tuple[Tensor, list[Tensor | None]]:
    loss = loss_of(net, **options)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in net.parameters()]


def assert_same(one: tuple[Tensor, list], other: tuple[Tensor, list]) -> None:
    assert torch.equal(one[0], other[0])
    assert len(one[1]) == len(other[1])
    for mine, theirs in zip(one[1], other[1]):
        assert torch.equal(mine, theirs)


def saved_bytes(net: nn.Module) -> int:
    """What the forward pass keeps for the backward pass, each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Tensor] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(net)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_bit_identical(autocast: bool) -> None:
    expected = gradients(unet(PLAIN), enabled=autocast)
    assert_same(gradients(unet(RECOMPUTED), enabled=autocast), expected)


def test_far_less_is_kept_for_the_backward_pass() -> None:
    assert saved_bytes(unet(RECOMPUTED)) < 0.5 * saved_bytes(unet(PLAIN))


def test_a_copy_recomputes_with_its_own_weights() -> None:
    net = unet(RECOMPUTED)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert_same(gradients(copied), gradients(unet(PLAIN)))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert saved_bytes(copied) < 0.5 * saved_bytes(unet(PLAIN))


def test_names_of_the_weights_stay() -> None:
    assert list(unet(RECOMPUTED).state_dict()) == list(unet(PLAIN).state_dict())


def test_without_a_gradient_nothing_is_recomputed() -> None:
    plain, recomputed = (unet(kind).eval().requires_grad_(False) for kind in (PLAIN, RECOMPUTED))
    assert saved_bytes(recomputed) == saved_bytes(plain) == 0
    assert torch.equal(loss_of(recomputed), loss_of(plain))


def test_a_frozen_net_between_the_label_and_the_loss_recomputes() -> None:
    nets = [unet(kind).eval().requires_grad_(False) for kind in (PLAIN, RECOMPUTED)]
    for net in nets:
        net.get_parameter("class_embedding.weight").requires_grad_(True)
    plain, recomputed = nets
    assert saved_bytes(recomputed) < 0.5 * saved_bytes(plain)
    expected = torch.autograd.grad(loss_of(plain), plain.class_embedding.weight)
    found = torch.autograd.grad(loss_of(recomputed), recomputed.class_embedding.weight)
    assert torch.equal(found[0], expected[0])


def test_hooks_on_the_blocks_run_once_a_step() -> None:
    net, calls = unet(RECOMPUTED), []
    for block in net.up_blocks:  # type: ignore[union-attr]
        for module in (*block.resnets, *getattr(block, "attentions", ())):
            module.register_forward_hook(lambda *_: calls.append(1))
    gradients(net)
    assert len(calls) == 2 * 3 + 3  # resnets of two levels, attention at one


def test_features_are_tapped_alike() -> None:
    inputs = torch.ones(1, 2, 16, 16), torch.tensor([7]), torch.tensor([1])
    found = []
    for net in (unet(PLAIN), unet(RECOMPUTED)):
        with torch.no_grad(), FeatureTaps(net, ["up0.1", "up1.0"]) as taps:
            found.append(taps.run(*inputs))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_data_parallel_training_gets_the_same_gradients(tmp_path: Path) -> None:
    expected = gradients(unet(PLAIN))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert_same(gradients(DistributedDataParallel(unet(RECOMPUTED))), expected)
    finally:
        torch.distributed.destroy_process_group()

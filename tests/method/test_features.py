import dataclasses

import pytest
import torch
from torch import nn

from cldf_dist.config import Cam, Features, UNet
from cldf_dist.method.features import (
    FeatureTaps,
    extract_features,
    features_dtype,
    image_patches,
    tap_shapes,
)
from cldf_dist.method.noise import Schedule, key_noise
from cldf_dist.nets.classifiers import CamClassifier
from cldf_dist.nets.unet import build_unet

SCHEDULE = Schedule(1000, "cosine", "v_prediction")
KEYS = ["a/1", "a/2", "b/7"]
SETTINGS = Features(taps=("up0.1", "up1.0", "up2.1"), timesteps=(50, 300), noise="drawn")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    settings = UNet(
        channels=(8, 8, 16),
        num_res_blocks=1,
        attention_levels=(False, False, True),
        num_head_channels=8,
        norm_num_groups=4,
    )
    unet = build_unet(settings, 2).eval()
    for parameter in unet.parameters():  # MONAI starts its residual branches at zero
        nn.init.normal_(parameter, std=0.15)
    return unet


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_slice_has_the_same_features_in_any_batch(net, images):
    together = extract_features(net, SCHEDULE, images, KEYS, SETTINGS)
    alone = extract_features(net, SCHEDULE, images[1:2], KEYS[1:2], SETTINGS)
    for tap in SETTINGS.taps:
        torch.testing.assert_close(together[tap][1:2], alone[tap], atol=1e-5, rtol=1e-5)
    assert (together["up2.1"][0] - together["up2.1"][1]).abs().max() > 1e-2


def test_global_random_state_does_not_matter(net, images):
    first = extract_features(net, SCHEDULE, images, KEYS, SETTINGS)
    torch.manual_seed(77)
    again = extract_features(net, SCHEDULE, images, KEYS, SETTINGS)
    assert all(torch.equal(first[tap], again[tap]) for tap in first)


def test_order_of_taps_is_kept_and_does_not_change_them(net, images):
    reordered = dataclasses.replace(SETTINGS, taps=tuple(reversed(SETTINGS.taps)))
    one = extract_features(net, SCHEDULE, images, KEYS, SETTINGS)
    other = extract_features(net, SCHEDULE, images, KEYS, reordered)
    assert list(one) == list(SETTINGS.taps)
    assert list(other) == list(reordered.taps)
    assert all(torch.equal(one[tap], other[tap]) for tap in one)


@pytest.mark.parametrize("contrast", [False, True])
def test_shapes_are_as_announced(net, images, contrast):
    settings = dataclasses.replace(SETTINGS, contrast=contrast)
    features = extract_features(net, SCHEDULE, images, KEYS, settings)
    announced = tap_shapes(net, 16, settings, ())
    assert {tap: tuple(f.shape[1:]) for tap, f in features.items()} == announced
    assert announced["up0.1"] == (4 if contrast else 2, 16, 4, 4)


def test_taps_lie_before_the_upsampler_and_behind_the_attention(net, images):
    seen = {}

    def keep(name):
        return lambda _module, inputs: seen.update({name: inputs[0]})

    handles = [
        net.up_blocks[0].upsampler.register_forward_pre_hook(keep("up0.1")),
        net.out.register_forward_pre_hook(keep("up2.1")),
    ]
    times, labels = torch.full((3,), 50), torch.ones(3, dtype=torch.long)
    with torch.no_grad():
        net(images, times, class_labels=labels)
        for handle in handles:
            handle.remove()
        with FeatureTaps(net, ("up0.1", "up2.1")) as taps:
            found = taps.run(images, times, labels)
    assert torch.equal(found["up0.1"], seen["up0.1"])
    assert torch.equal(found["up2.1"], seen["up2.1"])


def test_contrast_and_draws_are_what_they_say(net, images):
    plain = extract_features(net, SCHEDULE, images, KEYS, SETTINGS)
    settings = dataclasses.replace(SETTINGS, contrast=True)
    both = extract_features(net, SCHEDULE, images, KEYS, settings)
    negative = dataclasses.replace(SETTINGS, condition="no_object")
    other = extract_features(net, SCHEDULE, images, KEYS, negative)
    for tap in SETTINGS.taps:
        torch.testing.assert_close(both[tap][:, :2], plain[tap], atol=1e-5, rtol=1e-5)
        difference = plain[tap] - other[tap]
        torch.testing.assert_close(both[tap][:, 2:], difference, atol=2e-5, rtol=1e-4)
        assert difference.abs().max() > 1e-3
    twice = extract_features(
        net,
        SCHEDULE,
        images,
        KEYS,
        dataclasses.replace(SETTINGS, timesteps=(300,), num_noise_samples=2),
    )
    runs = []
    with torch.no_grad(), FeatureTaps(net, ("up1.0",)) as taps:
        for draw in range(2):
            times = torch.full((3,), 300)
            noise = key_noise(KEYS, 300, draw, (2, 16, 16), "cpu")
            noised = SCHEDULE.add_noise(images, times, noise)
            runs.append(taps.run(noised, times, torch.ones(3, dtype=torch.long))["up1.0"])
    torch.testing.assert_close(twice["up1.0"][:, 0], (runs[0] + runs[1]) / 2)


def test_contrast_works_with_unconditional_features(net, images):
    settings = dataclasses.replace(SETTINGS, condition="none", contrast=True)
    features = extract_features(net, SCHEDULE, images, KEYS, settings)
    assert features["up1.0"].shape[1] == 4


def test_net_runs_only_as_deep_as_the_last_tap(net, images):
    reached = []
    handle = net.up_blocks[2].register_forward_pre_hook(lambda *_: reached.append(True))
    shallow = dataclasses.replace(SETTINGS, taps=("up1.0", "up0.1"))
    extract_features(net, SCHEDULE, images, KEYS, shallow)
    assert not reached
    extract_features(net, SCHEDULE, images, KEYS, SETTINGS)
    handle.remove()
    assert reached


def test_hooks_are_removed_even_after_an_error(net):
    def num_hooks() -> int:
        return sum(len(module._forward_hooks) for module in net.modules())

    wrong_channels = torch.zeros(1, 5, 16, 16)
    with FeatureTaps(net, SETTINGS.taps):
        assert num_hooks() == 3
    assert num_hooks() == 0
    with pytest.raises(RuntimeError, match="channels"):
        extract_features(net, SCHEDULE, wrong_channels, KEYS[:1], SETTINGS)
    assert num_hooks() == 0


@pytest.mark.parametrize("taps", [("up0.1", "up3.0"), ("up0.2",), (), ("up0.1", "up0.1")])
def test_impossible_taps_are_refused_with_the_valid_ones(net, taps):
    with pytest.raises(ValueError, match=r"has up0\.0, up0\.1, up1\.0, up1\.1, up2\.0, up2\.1$"):
        FeatureTaps(net, taps)


def test_unknown_condition_is_refused(net, images):
    with pytest.raises(ValueError, match="no_object, object, none, got 'tumour'"):
        extract_features(
            net, SCHEDULE, images, KEYS, dataclasses.replace(SETTINGS, condition="tumour")
        )


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("levels", ["stack", "average"])
@pytest.mark.parametrize("num_noise_samples", ["stack", "average"])
def test_levels_and_draws_are_stacked_or_averaged(net, images, contrast, levels, num_noise_samples):
    """Against every map by itself: level by level, and within a level draw by draw."""
    settings = dataclasses.replace(
        SETTINGS,
        num_noise_samples=2,
        contrast=contrast,
        combine_timesteps=levels,
        combine_noise_samples=num_noise_samples,
    )
    every = dataclasses.replace(settings, combine_timesteps="stack", combine_noise_samples="stack")
    found = extract_features(net, SCHEDULE, images, KEYS, settings)
    single = extract_features(net, SCHEDULE, images, KEYS, every)
    for tap, shape in tap_shapes(net, 16, settings, ()).items():
        maps = single[tap].unflatten(1, (-1, 2, 2))  # (batch, plain or contrast, level, draw, ...)
        if num_noise_samples == "average":
            maps = maps.mean(3, keepdim=True)
        if levels == "average":
            maps = maps.mean(2, keepdim=True)
        assert found[tap].shape == (3, *shape)
        torch.testing.assert_close(found[tap], maps.flatten(1, 3), atol=1e-5, rtol=1e-5)
    different = single["up2.1"].flatten(2)
    assert (different[:, 0] - different[:, 1]).abs().max() > 1e-2, "draws differ"


def test_bf16_passes_give_float32_features_within_its_rounding(net, images):
    exact = extract_features(net, SCHEDULE, images, KEYS, SETTINGS)
    rounded = extract_features(net, SCHEDULE, images, KEYS, SETTINGS, torch.bfloat16)
    for tap in SETTINGS.taps:
        assert rounded[tap].dtype == torch.float32
        error = (rounded[tap] - exact[tap]).norm() / exact[tap].norm()
        assert 1e-4 < error < 5e-2


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("auto", "cpu", None),
        ("auto", "cuda", torch.bfloat16),
        ("bf16", "cpu", torch.bfloat16),
        ("fp32", "cuda", None),
    ],
)
def test_precision_is_bf16_on_gpus_unless_it_says_otherwise(precision, device, dtype):
    settings = Features(precision=precision)
    assert features_dtype(settings, torch.device(device)) == dtype


def test_patches_hold_the_neighbours_of_each_pixel_and_repeat_the_border(images):
    patches = image_patches(images, 3).unflatten(2, (2, 3, 3))[:, 0]
    torch.testing.assert_close(patches[:, :, 1, 1], images)
    torch.testing.assert_close(patches[:, :, 0, 2, 1:, :-1], images[:, :, :-1, 1:])  # up, right
    torch.testing.assert_close(patches[:, :, 0, 1, 0], images[:, :, 0])
    assert torch.equal(image_patches(images, 1)[:, 0], images)


@pytest.mark.parametrize("taps", [("up2.1", "image3", "up0.1"), ("image5",)])
def test_the_image_is_a_tap_beside_those_of_the_network(net, images, taps):
    settings = dataclasses.replace(SETTINGS, taps=taps, contrast=True)
    features = extract_features(net, SCHEDULE, images, KEYS, settings)
    assert {tap: tuple(f.shape[1:]) for tap, f in features.items()} == tap_shapes(
        net, 16, settings, ()
    )
    assert list(features) == list(taps)
    without = dataclasses.replace(settings, taps=("up0.1", "up2.1"))
    for tap, expected in extract_features(net, SCHEDULE, images, KEYS, without).items():
        assert tap not in taps or torch.equal(features[tap], expected)


@pytest.mark.parametrize("taps", [("up2.1", "cam2", "cam1"), ("cam4", "image3")])
def test_layers_of_the_classifier_are_taps(net, images, taps):
    torch.manual_seed(0)
    classifier = CamClassifier(Cam(channels=(16, 16, 32, 48)), images.shape[1]).eval()
    settings = dataclasses.replace(SETTINGS, taps=taps, contrast=True)
    features = extract_features(net, SCHEDULE, images, KEYS, settings, classifier=classifier)
    shapes = tap_shapes(net, 16, settings, (16, 16, 32, 48))
    assert {tap: tuple(f.shape[1:]) for tap, f in features.items()} == shapes
    assert list(features) == list(taps)
    with torch.no_grad():
        found = classifier.layer1(classifier.stem(images))
        if "cam1" in taps:
            assert torch.equal(features["cam1"][:, 0], found)
        else:
            found = classifier.layer4(classifier.layer3(classifier.layer2(found)))
            assert torch.equal(features["cam4"][:, 0], found)
    assert not any(module._forward_hooks for module in classifier.modules())
    with pytest.raises(ValueError, match=r"the taps cam\d.* need the classifier"):
        extract_features(net, SCHEDULE, images, KEYS, settings)


def test_without_noise_a_level_is_the_scaled_slice(net, images):
    settings = dataclasses.replace(SETTINGS, noise="none")
    found = extract_features(net, SCHEDULE, images, KEYS, settings)
    share = SCHEDULE.alphas_cumprod[300].sqrt()
    with FeatureTaps(net, settings.taps) as taps, torch.no_grad():
        expected = taps.run(share * images, torch.full((3,), 300), torch.ones(3, dtype=torch.long))
    for tap in settings.taps:
        torch.testing.assert_close(found[tap][:, 1], expected[tap], atol=1e-5, rtol=1e-5)
    other_keys = extract_features(net, SCHEDULE, images, ["x/1", "x/2", "x/3"], settings)
    assert all(torch.equal(found[tap], other_keys[tap]) for tap in found)

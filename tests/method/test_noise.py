import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

from cldf_dist.method.noise import (
    PREDICTIONS,
    SCHEDULES,
    Schedule,
    key_noise,
    sample_dropout,
    sample_noise,
    spread_uniform,
    training_timesteps,
)

TIMES = torch.tensor([0, 1, 250, 500, 900])


@pytest.fixture(params=SCHEDULES)
def kind(request) -> str:
    return request.param


def test_schedule_equals_monais(kind):
    monai = DDPMScheduler(1000, schedule=SCHEDULES[kind])
    ours = Schedule(1000, kind, "v_prediction")
    assert ours.alphas_cumprod.dtype == torch.float32
    torch.testing.assert_close(ours.alphas_cumprod, monai.alphas_cumprod, rtol=1e-3, atol=1e-7)
    clean, noise = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4)
    torch.testing.assert_close(
        ours.add_noise(clean, TIMES, noise),
        monai.add_noise(clean, noise, TIMES),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        ours.target(clean, TIMES, noise),
        monai.get_velocity(clean, noise, TIMES),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_gives_back_image_and_noise(kind, prediction):
    schedule = Schedule(1000, kind, prediction)
    clean, noise = torch.rand(5, 2, 4, 4) * 2 - 1, torch.randn(5, 2, 4, 4)
    noised = schedule.add_noise(clean, TIMES, noise)
    output = schedule.target(clean, TIMES, noise)
    close = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(schedule.predicted_start(noised, TIMES, output), clean, **close)
    torch.testing.assert_close(schedule.predicted_noise(noised, TIMES, output), noise, **close)


def test_min_snr_weight_by_hand():
    velocity = Schedule(1000, "cosine", "v_prediction")
    epsilon = Schedule(1000, "cosine", "epsilon")
    times = torch.tensor([10, 900])
    high, low = velocity.snr(times)
    assert high > 5 > low
    torch.testing.assert_close(
        velocity.loss_weight(times, 5.0), torch.stack([5 / (high + 1), low / (low + 1)])
    )
    torch.testing.assert_close(
        epsilon.loss_weight(times, 5.0), torch.stack([5 / high, torch.tensor(1.0)])
    )
    assert velocity.loss_weight(times, 0.0).tolist() == [1, 1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_step_equals_monais(kind, prediction):
    schedule = Schedule(1000, kind, prediction)
    monai = DDIMScheduler(1000, schedule=SCHEDULES[kind], prediction_type=prediction)
    monai.set_timesteps(20)
    clean, noise = torch.rand(2, 1, 4, 4) - 0.5, torch.randn(2, 1, 4, 4)
    times = torch.full((2,), 500)
    noised = schedule.add_noise(clean, times, noise)
    output = schedule.target(clean, times, noise)
    expected, _ = monai.step(output, 500, noised)
    ours = schedule.ddim_step(noised, 500, 450, output)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    back = schedule.ddim_step(ours, 450, 500, schedule.target(clean, times - 50, noise))
    torch.testing.assert_close(back, noised, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        schedule.ddim_step(noised, 500, -1, output), clean, rtol=1e-3, atol=1e-3
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="cosine, linear, got 'cosin'"):
        Schedule(10, "cosin", "epsilon")
    with pytest.raises(ValueError, match="v_prediction, epsilon, got 'x0'"):
        Schedule(10, "cosine", "x0")


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_timesteps_cover_the_range_evenly_on_every_rank(stride):
    numbers = torch.arange(10**9, 10**9 + 256 * stride, stride)
    counts = torch.bincount(training_timesteps(numbers, 3, 100, 900) - 100, minlength=800)
    per_bin = counts.view(16, 50).sum(1)
    assert counts.shape == (800,)
    assert per_bin.min() >= 12
    assert per_bin.max() <= 20


def test_timesteps_depend_on_seed_and_sample_alone():
    whole = training_timesteps(torch.arange(64), 0, 0, 1000)
    assert torch.equal(training_timesteps(torch.arange(20, 30), 0, 0, 1000), whole[20:30])
    assert not torch.equal(training_timesteps(torch.arange(64), 1, 0, 1000), whole)
    uniform = spread_uniform(torch.arange(1000), 0, "x")
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1


def test_sample_noise_depends_on_seed_sample_and_purpose_alone():
    whole = sample_noise((2, 8, 8), torch.arange(6), 5, "noise", "cpu")
    torch.manual_seed(123)
    part = sample_noise((2, 8, 8), torch.tensor([4, 1]), 5, "noise", "cpu")
    assert torch.equal(part, whole[[4, 1]])
    assert not torch.equal(sample_noise((2, 8, 8), torch.arange(6), 6, "noise", "cpu"), whole)
    assert not torch.equal(sample_noise((2, 8, 8), torch.arange(6), 5, "other", "cpu"), whole)
    assert abs(float(whole.mean())) < 0.15
    assert abs(float(whole.std()) - 1) < 0.1


def test_sample_dropout_keeps_the_mean():
    factors = sample_dropout((4000,), torch.arange(3), 0, 0.25, "cpu")
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 4 / 3]))
    torch.testing.assert_close(factors.mean(1), torch.ones(3), atol=0.05, rtol=0)
    assert not torch.equal(factors[0], factors[1])


def test_key_noise_depends_on_key_level_and_draw_alone():
    noise = key_noise(["a/1", "b/2"], 50, 0, (1, 8, 8), "cpu")
    torch.manual_seed(9)
    assert torch.equal(key_noise(["b/2"], 50, 0, (1, 8, 8), "cpu")[0], noise[1])
    for level, draw in [(51, 0), (50, 1)]:
        assert not torch.equal(key_noise(["a/1"], level, draw, (1, 8, 8), "cpu")[0], noise[0])
    assert not torch.equal(noise[0], noise[1])

"""The decoding benchmark runs at tiny size, and its floor and its orders are what it says."""

import csv
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

TINY = ("--tiny", "--rounds", "1", "--tile-pixels", "100", "4096")
NAIVE = "upsample, concatenate, project"
OURS = {"ours, whole slices", "ours, tiles of 100 pixels", "ours, tiles of 4096 pixels"}


def test_benchmark_runs_at_tiny_size_and_appends_its_rows(tmp_path, command, capsys):
    output = tmp_path / "decode.csv"
    command("bench_decode", *TINY, "--output", str(output))
    with output.open() as file:
        rows = {row["implementation"]: row for row in csv.DictReader(file)}
    assert set(rows) == {NAIVE} | OURS
    for row in rows.values():
        assert row["config"] == "configs/debug.yaml"
        assert all(row[name] for name in ("date", "commit", "device", "versions"))
        assert row["command"].startswith("python benchmarks/bench_decode.py --tiny")
        assert float(row["cpu_min_ms"]) <= float(row["cpu_ms"]) <= float(row["cpu_max_ms"])
        ratio = float(row["cpu_ms"]) / float(row["floor_ms"])
        assert float(row["times_floor"]) == pytest.approx(ratio, rel=0.01)
        assert row["device_ms"] == ""
        assert float(row["max_difference"]) < 1e-5
        assert math.isnan(float(row["peak_mb"])) or float(row["peak_mb"]) >= 0
    assert float(rows[NAIVE]["over_naive"]) == 1
    assert str(tmp_path) not in output.read_text()
    printed = capsys.readouterr().out
    assert printed.index("floor: 0.00118 GFLOP") < printed.index(NAIVE)


@pytest.mark.gpu
def test_benchmark_runs_at_tiny_size_on_cuda(tmp_path, command):
    output = tmp_path / "decode.csv"
    command("bench_decode", *TINY, "--device", "cuda", "--output", str(output))
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["implementation"] for row in rows} == {NAIVE} | OURS
    assert all(float(row["device_ms"]) > 0 and row["cpu_ms"] == "" for row in rows)
    assert all(float(row["peak_mb"]) > 0 for row in rows)


def test_our_order_does_the_floor_and_the_naive_one_projects_every_pixel(module):
    work = _debug_work(module, num_slices=3)
    flop = {}
    for name, call in module("bench_decode").orders(work, [100]).items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        flop[name] = counter.get_total_flops()
    assert flop["ours, whole slices"] == flop["ours, tiles of 100 pixels"] == 3 * work.floor_flop
    more = sum(work.side**2 - tap[0, 0].numel() for tap in work.taps.values() for _ in tap[0])
    extra = 3 * 2 * more * work.decoder.first.out_features
    assert flop[NAIVE] == 3 * work.floor_flop + extra


def test_the_naive_order_is_the_decoder_at_every_upsampled_pixel(module):
    """Were it another net, the difference of times would mean nothing."""
    work = _debug_work(module, num_slices=2)
    with torch.no_grad():
        scores = module("bench_decode").orders(work, [])[NAIVE]()
        upsampled = [
            torch.nn.functional.interpolate(tap, size=work.size, mode="bilinear")
            for tap in work.taps.values()
        ]
        embedding = work.decoder(torch.cat(upsampled, 1).movedim(1, -1).flatten(0, 2))
        background, objects = work.prototypes
        expected = (embedding @ (objects - background) / 2 + 1) / 2
    torch.testing.assert_close(scores, expected.view(2, *work.size), atol=1e-5, rtol=0)


def test_orders_that_disagree_are_not_compared(module):
    calls = {"one": lambda: torch.zeros(2), "other": lambda: torch.full((2,), 0.1)}
    with pytest.raises(RuntimeError, match=r"other gives scores that differ by up to 0\.1"):
        module("bench_decode").compare(calls)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--slices", "0"], "--slices: must be > 0, got 0"),
        (["--tile-pixels", "9", "0"], "--tile-pixels: must be > 0, got 0"),
    ],
)
def test_a_wrong_option_is_refused(words, reason, command, capsys):
    with pytest.raises(SystemExit):
        command("bench_decode", *words)
    assert reason in capsys.readouterr().err


def _debug_work(module, num_slices):
    config = module("cases").DEBUG.config()
    return module("bench_decode").make_decoding(config, num_slices, torch.device("cpu"))

from pathlib import Path

import numpy as np
import pytest
from chaos_files import (
    IN_PHASE_MS,
    ORDER,
    OUT_PHASE_MS,
    body,
    chaos,
    read_t1,
    truth,
    write_flat_t1,
    write_t1,
)

from cldf_dist.data.formats.dicom import Series
from cldf_dist.data.readers import chaos_phases as phases_module
from cldf_dist.data.readers.chaos import read_patient
from cldf_dist.data.readers.chaos_phases import phases


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    phases_module._say_once.cache_clear()


def series(*, echo_time: float | None, field: float | None = None, folder: str = "a") -> Series:
    image = np.zeros((2, 2, 2), np.int16)
    path = (Path(folder) / "1.dcm", Path(folder) / "2.dcm")
    return Series(image, np.eye(4), path, "MR", echo_time, field)


def test_echo_times_count_where_the_folders_names_contradict_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_t1(tmp_path, echo_times=(OUT_PHASE_MS, IN_PHASE_MS), order=ORDER)
    volume = read_t1(tmp_path)
    np.testing.assert_array_equal(volume.image, np.stack([body(1), body(0)]))
    np.testing.assert_array_equal(volume.mask, truth("liver"))  # named like the files of InPhase
    (said,) = capsys.readouterr().err.splitlines()
    assert "InPhase" in said
    assert "contradict the echo times (2.3 and 4.6 ms); the echo times count" in said


def test_without_echo_times_the_folders_names_count_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for patient in ("1", "2"):
        write_t1(tmp_path, patient, echo_times=(None, None))
        volume = read_patient(chaos(tmp_path), f"MR_{patient}")
        np.testing.assert_array_equal(volume.image, np.stack([body(0), body(1)]))
    (said,) = capsys.readouterr().err.splitlines()
    assert "without EchoTime" in said


def test_two_echoes_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    write_flat_t1(tmp_path)
    volume = read_t1(tmp_path)
    np.testing.assert_array_equal(volume.image, np.stack([body(0), body(1)]))
    assert volume.mask_names[-1] == "MR/1/T1DUAL/Ground/IMG-0004-00008.png"


# one turn of fat against water takes 4.61 ms at 1.5 T and 2.30 ms at 3 T
@pytest.mark.parametrize(
    ("in_phase", "out_phase", "field"),
    [
        *((4.6, 2.3, None), (4.6, 2.3, 1.5), (4.2, 6.9, 1.5), (3.6, 1.4, 1.5), (4.6, 1.3, None)),
        *((2.3, 1.15, 3.0), (2.3, 3.45, 3.0)),
    ],
)
def test_fat_and_water_tell_the_phase(
    in_phase: float, out_phase: float, field: float | None
) -> None:
    one = series(echo_time=in_phase, field=field)
    other = series(echo_time=out_phase, field=field)
    assert phases([one, other]) == (one, other)
    assert phases([other, one]) == (one, other)


@pytest.mark.parametrize(
    ("times", "field", "said"),
    [
        ((2.3, 2.3), None, "2.3 and 2.3 ms are both out of phase"),
        ((2.3, 6.9), 1.5, "2.3 and 6.9 ms are both out of phase"),
        ((2.3, 4.6), 3.0, r"every 1.15 ms\), but those of 2.3 and 4.6 ms are both in phase"),
        ((None, 4.6), None, "EchoTime is missing.* folders named InPhase and OutPhase"),
        ((0.0, 4.6), None, "EchoTime is missing"),
        ((4.6,), None, "must be 2 series or echoes, found 1"),
        ((2.3, 4.6, 6.9), None, "must be 2 series or echoes, found 3"),
    ],
)
def test_echoes_that_do_not_tell_the_phase_are_named(
    times: tuple[float | None, ...], field: float | None, said: str
) -> None:
    with pytest.raises(ValueError, match=f"^scan 1: .*{said}"):
        phases([series(echo_time=time, field=field, folder="scan 1") for time in times])

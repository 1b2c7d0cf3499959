"""T1 in and out of phase: which of two echoes is which."""

import sys
from collections.abc import Sequence
from functools import cache

from cldf_dist.data.formats.dicom import Series

PHASE_FOLDERS = ("InPhase", "OutPhase")
FAT_WATER_SHIFT = 3.4  # ppm: fat turns slower than water
GYROMAGNETIC_RATIO = 42.577  # MHz/T, of the proton
USUAL_FIELD_STRENGTH = 1.5  # T, the scanner of CHAOS, where a header does not say it


def phases(series: Sequence[Series]) -> tuple[Series, Series]:
    """The in-phase and the out-of-phase one of two T1 series, distinguished by their echo times.

    Fat and water turn apart by 3.4 ppm of the field's frequency (217 Hz at 1.5 T): they are in
    phase after whole turns and out of phase after halves. Without echo times in both headers the
    names of the folders, InPhase and OutPhase, count, and that is said on stderr. Raises
    ValueError where neither tells.
    """
    where = " and ".join(dict.fromkeys(str(one.folder) for one in series))
    if len(series) != 2:
        raise ValueError(
            f"{where}: T1 in and out of phase must be 2 series or echoes, found {len(series)}; "
            "keep those two in the folder"
        )
    named = _phases_by_folder(series)
    if not all(one.echo_time for one in series):
        if named is None:
            raise ValueError(
                f"{where}: EchoTime is missing, by which in and out of phase are known; put the "
                f"two series into folders named {' and '.join(PHASE_FOLDERS)}"
            )
        _say_once(
            "mr_t1: headers without EchoTime; in and out of phase are known by the folders "
            f"{' and '.join(PHASE_FOLDERS)}"
        )
        return named
    whole = [_is_in_phase(one) for one in series]
    times = " and ".join(f"{one.echo_time:g}" for one in series)
    if whole[0] == whole[1]:
        apart = 500 / _turns_per_second(series[0])  # ms
        raise ValueError(
            f"{where}: one echo must be in phase and one out of phase (they alternate every "
            f"{apart:.2f} ms), but those of {times} ms are both {'in' if whole[0] else 'out of'} "
            "phase; fetch the other echo, or correct EchoTime"
        )
    told = (series[0], series[1]) if whole[0] else (series[1], series[0])
    if named is not None and named[0] is not told[0]:
        _say_once(
            f"{where}: the folders' names contradict the echo times ({times} ms); "
            "the echo times count"
        )
    return told


def _phases_by_folder(series: Sequence[Series]) -> tuple[Series, Series] | None:
    named = {one.folder.name.lower(): one for one in series}
    found = [named.get(name.lower()) for name in PHASE_FOLDERS]
    return (found[0], found[1]) if found[0] and found[1] else None


def _turns_per_second(series: Series) -> float:
    field = series.field_strength or USUAL_FIELD_STRENGTH
    return FAT_WATER_SHIFT * GYROMAGNETIC_RATIO * field  # ppm of MHz: Hz


def _is_in_phase(series: Series) -> bool:
    turns = (series.echo_time or 0.0) / 1000 * _turns_per_second(series)
    return abs(turns - round(turns)) < 0.25


@cache
def _say_once(sentence: str) -> None:
    print(sentence, file=sys.stderr)

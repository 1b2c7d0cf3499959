"""The adoption of shards that `prepare` wrote elsewhere.

Manifest and true masks are fetched; the shards stay remote and are staged when they are read.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cldf_dist.config import Data, Mark, marked, to_plain
from cldf_dist.data.shards.remote import ManifestEntry, ShardCache, read_remote
from cldf_dist.data.shards.table import MANIFEST, parse_manifest
from cldf_dist.data.slices import KEY_PATTERN
from cldf_dist.data.splits import SPLITS, read_splits
from cldf_dist.system.files import DamagedShardError, atomic_write


def adopt_shards(settings: Data, folder: Path) -> ManifestEntry:
    """Fetch the manifest of `data.shards` and the true masks into `folder`; returns the manifest.

    The manifest gets the shards' location. Raises FileNotFoundError where there is no manifest, and
    ValueError where it was written with other settings or splits than these, or where the shard
    cache is smaller than one shard.
    """
    location = settings.shards.rstrip("/")
    manifest = _fetch_manifest(location)
    _check_settings(settings, manifest, location)
    _check_splits(settings, manifest, location)
    ShardCache.of(settings).check_size(manifest["shards"])
    for old in folder.glob("*.tar"):  # of a preparation here that was interrupted
        old.unlink()
    _fetch_truth(manifest, location, folder / "truth")
    manifest |= {"location": location, "settings": to_plain(settings)}
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())
    return manifest


def _fetch_manifest(location: str) -> ManifestEntry:
    url = f"{location}/{MANIFEST}"
    try:
        manifest = parse_manifest(read_remote(url), url)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.shards: there is no {url}; it must be a finished `prepare` folder"
        ) from None
    if manifest.get("location"):
        raise ValueError(
            f"data.shards: the shards of {location} are at {manifest['location']}; use that"
        )
    if "truth" not in manifest:
        raise ValueError(
            f"data.shards: {url} was made by an older version, which kept no digests of the true "
            "masks; prepare that data again"
        )
    for name in (name for split in SPLITS for name in manifest["splits"][split]):
        if not KEY_PATTERN.fullmatch(name):
            raise ValueError(f"data.shards: {url} names a patient {name!r}; prepare again")
    return manifest


def _check_settings(settings: Data, manifest: ManifestEntry, location: str) -> None:
    differing = list(_differing(settings, manifest["settings"]))
    if differing:
        raise ValueError(
            f"data.shards: {location} was prepared with {'; '.join(differing)}; set what it was "
            "prepared with, or prepare it again"
        )


def _differing(settings: Data, theirs: Mapping[str, Any]) -> Iterator[str]:
    """`data.KEY=theirs, not ours` for each differing setting that affects the shards' content."""
    left_out = set(marked(Data, Mark.NOT_IN_SHARDS))
    if settings.splits or theirs.get("splits"):
        left_out.update(marked(Data, Mark.DRAWS_SPLIT))
    if settings.dataset != "phantom":
        left_out.add("phantom")
    if settings.dataset != "chaos":
        left_out.add("modality")
    for key, ours in to_plain(settings).items():
        if key not in left_out and theirs.get(key) != ours:
            yield f"data.{key}={theirs.get(key)!r}, not {ours!r}"


def _check_splits(settings: Data, manifest: ManifestEntry, location: str) -> None:
    held = manifest["splits"]
    if settings.splits:
        said = read_splits(settings.splits, [name for split in SPLITS for name in held[split]])
        moved = [name for split in SPLITS for name in said[split] if name not in held[split]]
        if moved:
            raise ValueError(
                f"data.splits: {settings.splits} is not the split of {location}: "
                f"{', '.join(moved[:5])} differ; leave data.splits out to use that of the shards"
            )
    elif manifest["settings"].get("splits"):
        print(f"prepare: the split is that of {location}, read from a file", file=sys.stderr)


def _fetch_truth(manifest: ManifestEntry, location: str, folder: Path) -> None:
    """Fetch the true masks of test patients, for the evaluation alone."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.nii.gz"):
        old.unlink()
    known = [name for name in manifest["splits"]["test"] if name in manifest["truth"]]
    for name in known:
        url = f"{location}/truth/{name}.nii.gz"
        try:
            content = read_remote(url)
        except FileNotFoundError:
            raise DamagedShardError(f"{url} is missing; prepare that data again") from None
        if hashlib.sha256(content).hexdigest() != manifest["truth"][name]:
            raise DamagedShardError(
                f"{url} is damaged: its sha256 is wrong; prepare that data again"
            )
        with atomic_write(folder / f"{name}.nii.gz") as file:
            file.write(content)

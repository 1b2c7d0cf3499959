"""The formats that the cache benchmark compares: the same maps of features, each in its own form.

Every format gives a slice in memory that is its own, so that a lazy view is not mistaken for a
reading, and the features at some pixels of a slice in the quickest way that its library offers.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from cldf_dist.data.features.pixels import gather_pixels, interpolate_at
from cldf_dist.data.features.store import FeatureCache

Array = npt.NDArray[Any]
TAP = "up0.0"  # the name of the one tap
MEMMAP, OURS = "np.memmap", "ours"


@dataclass(frozen=True)
class Sizes:
    """How many slices of one tap, pixel-major, and how they are packed."""

    num_slices: int
    levels: int
    side: int  # of the map
    channels: int
    slices_per_shard: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one slice: (levels, height, width, channels)."""
        return (self.levels, self.side, self.side, self.channels)

    @property
    def image_size(self) -> int:
        """Of the image whose pixels are asked for: twice the map's side, as for an inner tap."""
        return 2 * self.side

    def values(self) -> Array:
        """(slices, levels, height, width, channels) float16: noise, which does not compress."""
        rng = np.random.default_rng(0)
        rows = (rng.standard_normal(self.shape, np.float32) for _ in range(self.num_slices))
        return np.stack([row.astype(np.float16) for row in rows])


@dataclass(frozen=True)
class Opened:
    """An open store. `pixels` takes a row, and rows and columns of the map."""

    read: Callable[[int], Array]  # the slice, every byte of it, in memory of its own
    pixels: Callable[[int, Array, Array], Array]  # (levels, pixels, channels)
    # the loader's form, (pixels, levels x channels) float32 at pixels (n, 2) of the image
    interpolated: Callable[[int, Array], Array] | None = None


@dataclass(frozen=True)
class Format:
    name: str
    write: Callable[[Path, Array, Sizes], None]  # into a folder that is there and empty
    open: Callable[[Path, Sizes], Opened]
    reads: str = ""  # the format whose store it reads; empty: its own


def formats() -> list[Format]:
    """np.memmap first; what is not installed is left out, with a word."""
    known = [
        Format(MEMMAP, _write_memmap, _open_memmap),
        Format(OURS, _write_ours, _open_ours),
        Format("h5py", _write_h5py, _open_h5py),
        Format("safetensors", _write_safetensors, _open_safetensors),
        Format("zarr-python", _write_zarr, _open_zarr, reads=OURS),
        Format("tensorstore", _write_tensorstore, _open_tensorstore, reads=OURS),
    ]
    found = []
    for form in known:
        if form.name in ("h5py", "tensorstore") and importlib.util.find_spec(form.name) is None:
            print(f"{form.name}: left out, it is not installed")
        else:
            found.append(form)
    return found


def sync_files(folder: Path) -> None:
    """Bring every file of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file)


def _write_memmap(folder: Path, values: Array, sizes: Sizes) -> None:
    mapped = np.memmap(folder / "features", np.float16, "w+", shape=values.shape)
    mapped[:] = values
    mapped.flush()


def _open_memmap(folder: Path, sizes: Sizes) -> Opened:
    mapped = np.memmap(folder / "features", np.float16, "r", shape=(sizes.num_slices, *sizes.shape))
    buffer = np.empty(sizes.shape, np.float16)
    size = (sizes.image_size, sizes.image_size)
    return Opened(
        lambda row: _copied(buffer, mapped[row]),
        lambda row, y, x: mapped[row][:, y, x],
        lambda row, pixels: interpolate_at(np.asarray(mapped[row]), pixels, size),
    )


def _write_ours(folder: Path, values: Array, sizes: Sizes) -> None:
    arrays = {TAP: (sizes.shape, "float16")}
    cache = FeatureCache.create(
        folder / "store",
        len(values),
        arrays,
        slices_per_shard=sizes.slices_per_shard,
        attributes={},
    )
    for shard in range(cache.num_shards):
        rows = cache.slices_of(shard)
        cache.write_shard(
            shard, [f"slice_{row}" for row in rows], {TAP: values[rows.start : rows.stop]}
        )


def _open_ours(folder: Path, sizes: Sizes) -> Opened:
    cache = FeatureCache(folder / "store")
    buffer = np.empty(sizes.shape, np.float16)
    size = (sizes.image_size, sizes.image_size)
    return Opened(
        lambda row: _copied(buffer, cache.read(TAP, row)),
        lambda row, y, x: cache.read(TAP, row)[:, y, x],
        lambda row, pixels: gather_pixels(cache, (TAP,), row, pixels, size),
    )


def _write_h5py(folder: Path, values: Array, sizes: Sizes) -> None:
    import h5py

    with h5py.File(folder / "features.h5", "w") as file:
        file.create_dataset("features", data=values)


def _open_h5py(folder: Path, sizes: Sizes) -> Opened:
    import h5py

    stored = h5py.File(folder / "features.h5", "r")["features"]
    buffer = np.empty(sizes.shape, np.float16)

    def read(row: int) -> Array:
        stored.read_direct(buffer, np.s_[row])
        return buffer

    return Opened(read, partial(_read_whole, read))


def _write_safetensors(folder: Path, values: Array, sizes: Sizes) -> None:
    from safetensors.numpy import save_file

    save_file({"features": values}, folder / "features.safetensors")


def _open_safetensors(folder: Path, sizes: Sizes) -> Opened:
    from safetensors import safe_open

    file: Any = safe_open(folder / "features.safetensors", "numpy")
    stored = file.get_slice("features")

    def read(row: int) -> Array:
        return np.asarray(stored[row])

    return Opened(read, partial(_read_whole, read))


def _write_zarr(folder: Path, values: Array, sizes: Sizes) -> None:
    stored = zarr.create_array(
        folder / "features",
        shape=values.shape,
        chunks=(1, *sizes.shape),
        shards=(sizes.slices_per_shard, *sizes.shape),
        dtype="float16",
        compressors=[Crc32cCodec()],
        fill_value=0,
    )
    for rows in _shards(values, sizes):
        stored[rows] = values[rows]


def _open_zarr(folder: Path, sizes: Sizes) -> Opened:
    stored: Any = zarr.open_array(folder / "store" / TAP, mode="r")

    def read(row: int) -> Array:
        return np.asarray(stored[row])

    return Opened(read, partial(_read_whole, read))


def _write_tensorstore(folder: Path, values: Array, sizes: Sizes) -> None:
    import tensorstore

    stored = tensorstore.open(
        {
            **_spec(folder / "features"),
            "create": True,
            "metadata": {
                "shape": values.shape,
                "data_type": "float16",
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [sizes.slices_per_shard, *sizes.shape]},
                },
                "codecs": [
                    {
                        "name": "sharding_indexed",
                        "configuration": {
                            "chunk_shape": [1, *sizes.shape],
                            "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                            "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                        },
                    }
                ],
            },
        }
    ).result()
    for rows in _shards(values, sizes):
        stored[rows] = values[rows]


def _open_tensorstore(folder: Path, sizes: Sizes) -> Opened:
    import tensorstore

    stored = tensorstore.open(_spec(folder / "store" / TAP), read=True).result()
    return Opened(
        lambda row: stored[row].read().result(),
        lambda row, y, x: stored[row].vindex[:, y, x].read().result().swapaxes(0, 1),
    )


def _spec(folder: Path) -> dict[str, Any]:
    limits = {name: {"limit": 1} for name in ("data_copy_concurrency", "file_io_concurrency")}
    kvstore = {"driver": "file", "path": f"{folder}/"}
    return json.loads(json.dumps({"driver": "zarr3", "kvstore": kvstore, "context": limits}))


def _shards(values: Array, sizes: Sizes) -> Sequence[slice]:
    step = sizes.slices_per_shard
    return [slice(start, min(start + step, len(values))) for start in range(0, len(values), step)]


def _copied(buffer: Array, values: Array) -> Array:
    np.copyto(buffer, values)
    return buffer


def _read_whole(read: Callable[[int], Array], row: int, y: Array, x: Array) -> Array:
    """Where a library has no quicker way to some pixels than the whole slice."""
    return read(row)[:, y, x]

"""The formats that the cache benchmark compares: the same maps of features, each in its own form.

Every format gives a slice in memory that is its own, so that a lazy view is not mistaken for a
reading, and the features at some pixels of a slice in the quickest way that its library offers.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from made_up import fill_store
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

    def shards(self) -> Iterator[slice]:
        for start in range(0, self.num_slices, self.slices_per_shard):
            yield slice(start, min(start + self.slices_per_shard, self.num_slices))

    def values(self) -> Array:
        """(slices, levels, height, width, channels) float16: noise, which does not compress."""
        rng = np.random.default_rng(0)
        rows = (rng.standard_normal(self.shape, np.float32) for _ in range(self.num_slices))
        return np.stack([row.astype(np.float16) for row in rows])


@dataclass(frozen=True)
class Opened:
    """An open store."""

    read: Callable[[int], Array]  # the slice, every byte of it, in memory of its own
    # (levels, pixels, channels) of a slice, at rows and columns of the map
    pixels: Callable[[int, Array, Array], Array]
    # the loader's form, (pixels, levels x channels) float32 at pixels (n, 2) of the image
    interpolated: Callable[[int, Array], Array] | None = None


@dataclass(frozen=True)
class Format:
    """`write` takes a folder that is there and empty, `open` the folder of what it `reads`."""

    name: str
    write: Callable[[Path, Array, Sizes], None]
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
    missing = [name for name in ("h5py", "tensorstore") if not importlib.util.find_spec(name)]
    for name in missing:
        print(f"{name}: left out, it is not installed")
    return [form for form in known if form.name not in missing]


def _mapped(
    sizes: Sizes, view: Callable[[int], Array], interpolated: Callable[[int, Array], Array]
) -> Opened:
    """Where a library gives a view of the slice."""
    buffer = np.empty(sizes.shape, np.float16)

    def read(row: int) -> Array:
        np.copyto(buffer, view(row))
        return buffer

    return Opened(read, lambda row, y, x: view(row)[:, y, x], interpolated)


def _whole(read: Callable[[int], Array]) -> Opened:
    """Where a library has no quicker way to some pixels than the whole slice."""
    return Opened(read, lambda row, y, x: read(row)[:, y, x])


def _write_memmap(folder: Path, values: Array, sizes: Sizes) -> None:
    mapped = np.memmap(folder / "features", np.float16, "w+", shape=values.shape)
    mapped[:] = values
    mapped.flush()


def _open_memmap(folder: Path, sizes: Sizes) -> Opened:
    mapped = np.memmap(folder / "features", np.float16, "r", shape=(sizes.num_slices, *sizes.shape))
    size = (sizes.image_size, sizes.image_size)
    return _mapped(
        sizes,
        lambda row: mapped[row],
        lambda row, pixels: interpolate_at(np.asarray(mapped[row]), pixels, size),
    )


def _write_ours(folder: Path, values: Array, sizes: Sizes) -> None:
    fill_store(
        folder / "store",
        len(values),
        {TAP: (sizes.shape, "float16")},
        lambda indices: {TAP: values[indices.start : indices.stop]},
        sizes.slices_per_shard,
    )


def _open_ours(folder: Path, sizes: Sizes) -> Opened:
    cache = FeatureCache(folder / "store")
    size = (sizes.image_size, sizes.image_size)
    return _mapped(
        sizes,
        lambda row: cache.read(TAP, row),
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

    return _whole(read)


def _write_safetensors(folder: Path, values: Array, sizes: Sizes) -> None:
    from safetensors.numpy import save_file

    save_file({"features": values}, folder / "features.safetensors")


def _open_safetensors(folder: Path, sizes: Sizes) -> Opened:
    from safetensors import safe_open

    file: Any = safe_open(folder / "features.safetensors", "numpy")
    stored = file.get_slice("features")
    return _whole(lambda row: np.asarray(stored[row]))


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
    for rows in sizes.shards():
        stored[rows] = values[rows]


def _open_zarr(folder: Path, sizes: Sizes) -> Opened:
    stored: Any = zarr.open_array(folder / "store" / TAP, mode="r")
    return _whole(lambda row: np.asarray(stored[row]))


def _write_tensorstore(folder: Path, values: Array, sizes: Sizes) -> None:
    """As zarr-python writes it: slices in shards, with checksums."""
    import tensorstore

    codecs = [{"name": "bytes"}, {"name": "crc32c"}]
    chunks = {"chunk_shape": [1, *sizes.shape], "codecs": codecs, "index_codecs": codecs}
    shard = {"chunk_shape": [sizes.slices_per_shard, *sizes.shape]}
    metadata = {
        "shape": values.shape,
        "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": shard},
        "codecs": [{"name": "sharding_indexed", "configuration": chunks}],
    }
    spec = {**_spec(folder / "features"), "create": True, "metadata": metadata}
    stored = tensorstore.open(spec).result()
    for rows in sizes.shards():
        stored[rows] = values[rows]


def _open_tensorstore(folder: Path, sizes: Sizes) -> Opened:
    import tensorstore

    stored = tensorstore.open(_spec(folder / "store" / TAP), read=True).result()
    return Opened(
        lambda row: stored[row].read().result(),
        lambda row, y, x: stored[row].vindex[:, y, x].read().result().swapaxes(0, 1),
    )


def _spec(folder: Path) -> dict[str, Any]:
    """Of one thread."""
    limits = {name: {"limit": 1} for name in ("data_copy_concurrency", "file_io_concurrency")}
    kvstore = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "zarr3", "kvstore": kvstore, "context": limits}

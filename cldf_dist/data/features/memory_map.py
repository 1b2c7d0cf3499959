"""A file as a read-only array on a private mapping, without an open descriptor.

Python's own `mmap` keeps a descriptor (until 3.13), and a process may often have 1024 of them only.
So the C library's `mmap` is called through ctypes; seen to hold with CPython 3.11 to 3.13 on Linux
and kept by `tests/test_private_interfaces.py`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes, mapped for as long as an array on them is alive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        if not size:
            return np.zeros(0, np.uint8)
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
        if address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot be mapped: {os.strerror(number)}", str(path))
    finally:
        os.close(descriptor)
    memory = (ctypes.c_ubyte * size).from_address(address)
    # when no array on it is left; at the end of the process the system does it
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    return np.frombuffer(memoryview(memory).toreadonly(), np.uint8)


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_int
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_ssize_t,
    ]  # fmt: skip
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


_LIBC = _libc()
_MAP_FAILED = ctypes.c_void_p(-1).value

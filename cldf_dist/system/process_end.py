"""The end of a program that has used torch: its exit functions run, then it exits at once.

`atexit._run_exitfuncs` has no public name; seen in CPython 3.11 to 3.13 and kept by
`tests/test_private_interfaces.py`.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from cldf_dist.system.distributed import leave_group


def end_process(code: int) -> NoReturn:
    """Exit with `code`, without the interpreter's own shutdown; leave the process group first if 0.

    In that shutdown a thread of torch that needs the interpreter aborts the process, and a finished
    job would count as failed.
    """
    if code == 0:  # after an error others may still be in a collective with us
        leave_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as where a daemon starts us
                stream.flush()
        except BrokenPipeError:
            pass  # nobody reads it any more
        except OSError:
            code = code or 1  # what was printed is lost
    os._exit(code)

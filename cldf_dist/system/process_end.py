"""The end of a program that has used torch: its exit functions run, then it is gone.

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
    """The end of a program: out of the group after a success, then gone.

    That is not left to the interpreter's end: where one of torch's threads wants the interpreter
    in that moment, the process is aborted, and a job that was done has failed.
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

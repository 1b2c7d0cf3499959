"""Worker processes of torch's DataLoader: the signals they ignore, and a shutdown without hangs.

torch has no public names for an iterator's workers, queues and state. The private ones that are
used here were seen in torch 2.11 to 2.13, and `tests/test_private_interfaces.py` keeps them.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data._utils import signal_handling

from cldf_dist.system.signals import STOP_SIGNALS

Batch = dict[str, Any]


class LoadedBatches:
    """The batches of a loader, whose worker processes end with `close`.

    Dropping the iterator or leaving the program closes it too. Raises RuntimeError if a worker dies
    while batches are loaded, but not if it dies while it is stopped.
    """

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._workers = tuple(getattr(loaded, "_workers", ()))  # torch has no public name
        self.close = weakref.finalize(self, _stop_workers, loaded, self._workers)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        try:
            batch: Batch = next(self._loaded)
        except (RuntimeError, OSError, EOFError) as error:
            dead = _dead(self._workers)
            if not dead:
                raise  # the items' own error
            raise RuntimeError(
                f"loader worker {', '.join(dead)} died while it loaded samples: {error}; is memory "
                "short? fit.num_workers=0 loads without workers"
            ) from error
        return batch


def prepare_worker(_worker: int) -> None:
    """Let this worker ignore stop signals, and end with its parent.

    A scheduler or a Ctrl-C signals the whole process group, and a worker that died of it would
    prevent the last checkpoint. The worker exits before the interpreter's shutdown, which aborts if
    the thread that sends batches is inside C++ at the time.
    """
    # torch's own watch compares parents: where ours died before, that never changes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit.register(os._exit, 0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(0)


def _dead(workers: Sequence[Any]) -> list[str]:
    """Process numbers of dead workers; waits a moment, as a pipe breaks before its worker ends."""
    if workers:
        with suppress(RuntimeError):  # torch's handler of SIGCHLD raises
            ended = wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()  # its pipes close before it can be asked how it ended
    return [str(worker.pid) for worker in workers if not worker.is_alive()]


def _stop_workers(loaded: Any, workers: Iterable[Any]) -> None:
    """End the worker processes, gracefully where they respond. No worker is left afterwards."""
    if not workers:
        return
    # torch's handler of SIGCHLD raises for a worker that failed; it was to end anyway
    with suppress(RuntimeError):
        if all(worker.exitcode is None for worker in workers):
            loaded._shutdown_workers()  # torch has no public name
    if loaded._worker_pids_set:  # else a later iterator at the same address would be refused
        handling: Any = signal_handling
        handling._remove_worker_pids(id(loaded))
        loaded._worker_pids_set = False
    if not loaded._shutdown:  # a dead one may hold for ever what torch would wait for
        loaded._shutdown = True
        if loaded._pin_memory:
            loaded._pin_memory_thread_done_event.set()
        for queue in loaded._index_queues:
            queue.cancel_join_thread()
            queue.close()
    for worker in workers:
        with suppress(RuntimeError):
            worker.kill()  # SIGTERM is ignored there
            worker.join()
        worker.join()


@contextmanager
def stop_signals_wait() -> Iterator[None]:
    """A context in which stop signals are blocked, while workers start; delivered at its end."""
    if threading.current_thread() is not threading.main_thread():  # may not touch signals
        yield
        return
    resource_tracker.ensure_running()  # its start would let two of them through (Python 3.11)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)  # what came meanwhile arrives now

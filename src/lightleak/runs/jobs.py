"""Jobs that know nothing of each other, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Job = TypeVar("Job")


def each(
    jobs: Sequence[Job],
    perform: Callable[[Job], None],
    workers: int | None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Perform every job.

    Args:
        jobs: what to do, the longest first if that is known; they are pickled for other processes.
        perform: a function of a module, which writes what it finds.
        workers: processes, each with one thread; one stays in this process, None takes a core
            each.
        advance: told of each job that is done.

    Raises:
        Exception: of the first job that failed, after the others in hand are done; what is done
            is written, and a next call leaves it as it is.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        for job in jobs:
            perform(job)
            advance(1)
        return
    # Threads of a process that forks would be lost, and libraries that hold locks with them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepared) as pool:
        waiting = [pool.submit(perform, job) for job in jobs]
        try:
            for done in as_completed(waiting):
                done.result()
                advance(1)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _prepared() -> None:
    """One thread, since so many processes share the cores; and no longer life than the caller's."""
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    """A caller that was killed must leave nobody behind who writes where the next one does."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)

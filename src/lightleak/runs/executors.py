"""Where jobs are done: in this process, in several on this machine, or on a Ray cluster.

Jobs know nothing of each other, and each writes what it finds at once when it is whole. So a
process may die at any moment: the job that it had in hand is done again, and no other.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol, TypeVar

from lightleak.errors import UserError
from lightleak.runs.progress import Advance

Job = TypeVar("Job")
Result = TypeVar("Result")
# A function of a module: a job and what it tells of its advance.
Perform = Callable[[Job, Advance], Result]

# A job that has killed so many processes will kill the next.
_PATIENCE = 3
_POLL_SECONDS = 0.2


def _unheard(done: int) -> None:
    del done


class Executor(Protocol):
    """Does jobs.

    Attributes:
        workers: how many at once.
        share: the part of a machine's memory, or of an accelerator's, that one may take.
    """

    workers: int
    share: float

    def map(
        self,
        perform: Perform[Job, Result],
        jobs: Sequence[Job],
        advance: Advance = _unheard,
    ) -> list[Result]:
        """Do every job; what each returns, in the order of the jobs.

        Raises:
            Exception: of the first job that failed, after those in hand are done.
            UserError: a job killed its process several times.
        """
        ...


@contextmanager
def executor(
    kind: Literal["local", "ray"] = "local",
    workers: int | None = 1,
    *,
    address: str | None = None,
    spread: bool = True,
) -> Iterator[Executor]:
    """What does the jobs of a run; processes end with it.

    Args:
        kind: "local" or "ray".
        workers: processes, each with one thread; None takes one for each accelerator, or each
            core where there is none. One local worker is this process itself. More need a
            program whose main part stands under `if __name__ == "__main__":`.
        address: of a Ray cluster to join; else `RAY_ADDRESS`, else one is started here.
        spread: whether each worker sees an accelerator of its own.
    """
    if kind == "ray":
        cluster = _Ray(workers, address, spread=spread)
        try:
            yield cluster
        finally:
            cluster.close()
        return
    visible = _accelerators() if spread and workers != 1 else []
    count = workers or len(visible) or _cores()
    if count == 1:
        yield _Here()
        return
    lanes = _Local(count, visible)
    try:
        yield lanes
    except BaseException as error:
        lanes.close(at_once=not isinstance(error, Exception))  # Who interrupts will not wait.
        raise
    lanes.close()


class _Here:
    """In this process, one after another."""

    workers, share = 1, 1.0

    def map(
        self, perform: Perform[Job, Result], jobs: Sequence[Job], advance: Advance = _unheard
    ) -> list[Result]:
        return [perform(job, advance) for job in jobs]


class _Local:
    """In processes of this machine, each a lane of its own: the death of one spares the others."""

    def __init__(self, count: int, visible: Sequence[str]) -> None:
        self.workers = count
        self.share = 1 / math.ceil(count / max(1, len(visible)))
        self._lanes = [
            _Lane(visible[index % len(visible)] if visible else None) for index in range(count)
        ]

    def map(
        self, perform: Perform[Job, Result], jobs: Sequence[Job], advance: Advance = _unheard
    ) -> list[Result]:
        results: dict[int, Result] = {}
        waiting, deaths = deque(range(len(jobs))), Counter[int]()
        idle, running = deque(self._lanes), dict[Future[Any], tuple[_Lane, int]]()
        failed: dict[int, Exception] = {}
        while running or (waiting and not failed):
            while waiting and idle and not failed:
                lane, index = idle.popleft(), waiting.popleft()
                running[lane.start(perform, jobs[index])] = lane, index
            done, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
            for lane, _ in running.values():
                advance(lane.told())
            for future in done:
                lane, index = running.pop(future)
                try:
                    results[index] = future.result()
                except BrokenProcessPool:
                    advance(-lane.revive())
                    deaths[index] += 1
                    waiting.appendleft(index)
                    if deaths[index] == _PATIENCE:
                        failed[index] = _died()
                except Exception as error:
                    failed[index] = error
                idle.appendleft(lane)
        if failed:
            raise failed[min(failed)]
        return [results[index] for index in range(len(jobs))]

    def close(self, *, at_once: bool = False) -> None:
        for lane in self._lanes:
            lane.close(at_once=at_once)


class _Lane:
    """One process, started when it is first needed and again when it has died."""

    def __init__(self, visible: str | None) -> None:
        self._visible = visible
        # Threads of a process that forks would be lost, and libraries that hold locks with them.
        self._context = multiprocessing.get_context("spawn")
        self._count = self._context.Value("q", 0)
        self._known = self._before = 0
        self._pool: ProcessPoolExecutor | None = None

    def start(self, perform: Perform[Job, Result], job: Job) -> Future[Result]:
        if self._pool is None:
            leash, self._leash = self._context.Pipe(duplex=False)
            start = (self._count, self._visible, leash)
            self._pool = ProcessPoolExecutor(1, self._context, _prepared, start)
        self._before = self._known
        try:
            with _deaf():
                return self._pool.submit(_perform, perform, job)
        except BrokenProcessPool:  # It died between two jobs.
            self.revive()
            return self.start(perform, job)

    def told(self) -> int:
        """How much more is done than when last asked."""
        before, self._known = self._known, self._count.value
        return self._known - before

    def revive(self) -> int:
        """Let a new process take the dead one's place; how much of its job had been told."""
        self.close()
        self._pool = None
        lost = self._known - self._before
        self._count.value = self._known = self._before
        return lost

    def close(self, *, at_once: bool = False) -> None:
        if self._pool is not None:
            if at_once:
                self._leash.close()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._leash.close()


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started here does not hear Ctrl-C: the caller does, and ends it without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_count: Any = None


def _prepared(count: Any, visible: str | None, leash: Connection) -> None:
    """One thread, since so many processes share the cores; and no longer life than the caller's."""
    global _count
    _count = count
    os.environ["OMP_NUM_THREADS"] = "1"
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    threading.Thread(target=_end_with_caller, args=(leash,), daemon=True).start()


def _perform(perform: Perform[Job, Result], job: Job) -> Result:
    return perform(job, _tell)


def _tell(done: int) -> None:
    with _count.get_lock():
        _count.value += done


def _end_with_caller(leash: Connection) -> None:
    """A caller that was killed must leave nobody behind who writes where the next one does."""
    leash.poll(None)  # Nothing is ever sent: it has been let go of.
    os._exit(1)


def _cores() -> int:
    """Cores that this process may use; a batch system gives it some of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerators() -> list[str]:
    """What CUDA calls the devices of this machine that may be used."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def _died() -> UserError:
    return UserError(
        f"a worker process died {_PATIENCE} times at the same records; most often the system ended "
        "it for want of memory",
        "--workers",
        "Use fewer workers or a smaller --batch-size; what is done is kept. From Python, does the "
        'main part stand under `if __name__ == "__main__":`?',
    )


class _Ray:
    """In actors of Ray Core, one a core or accelerator, on this machine or a cluster.

    An actor that dies is started again, elsewhere if need be, and its job with it.
    """

    def __init__(self, workers: int | None, address: str | None, *, spread: bool) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "it needs a package that is missing",
                "--executor ray",
                "Install it: pip install 'lightleak[ray]'.",
            ) from error
        self._ray = ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Nothing leaves this machine.
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            _knock(address)
            ray.init(
                address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"no Ray cluster could be joined ({lines[0]})",
                f"--ray-address {address}",
                "Is it running there? A cluster with tokens wants RAY_AUTH_MODE=token here, too.",
            ) from error
        there = ray.cluster_resources()
        accelerators = int(there.get("GPU", 0)) if spread else 0
        most = accelerators or int(there.get("CPU", 1))
        self.workers = max(1, min(workers or most, most))
        nodes = max(1, len([node for node in ray.nodes() if node["Alive"]]))
        self.share = 1.0 if accelerators else 1 / math.ceil(self.workers / nodes)
        actor = ray.remote(
            num_cpus=1,
            num_gpus=1 if accelerators else 0,
            max_restarts=-1,
            max_task_retries=_PATIENCE - 1,
        )(_Actor)
        self._actors = [actor.remote() for _ in range(self.workers)]

    def map(
        self, perform: Perform[Job, Result], jobs: Sequence[Job], advance: Advance = _unheard
    ) -> list[Result]:
        ray = self._ray
        results: dict[int, Result] = {}
        waiting, idle = deque(range(len(jobs))), deque(self._actors)
        running: dict[Any, tuple[Any, int]] = {}
        failed: dict[int, Exception] = {}
        while running or (waiting and not failed):
            while waiting and idle and not failed:
                actor, index = idle.popleft(), waiting.popleft()
                running[actor.perform.remote(perform, jobs[index])] = actor, index
            for done in ray.wait(list(running))[0]:
                actor, index = running.pop(done)
                idle.appendleft(actor)
                try:
                    results[index], told = ray.get(done)
                    advance(told)
                except ray.exceptions.RayTaskError as error:
                    failed[index] = error.cause or error
                except ray.exceptions.RayError as error:
                    failed[index] = _died()
                    failed[index].__cause__ = error
        if failed:
            raise failed[min(failed)]
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Ray tries an address for minutes; whether anybody answers shows at once."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


class _Actor:
    """Does one job at a time where Ray put it."""

    def perform(self, perform: Perform[Job, Result], job: Job) -> tuple[Result, int]:
        told: list[int] = []
        return perform(job, told.append), sum(told)

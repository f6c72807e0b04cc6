"""Tasks in processes of this machine. A process that dies costs the task one of its attempts, nothing else."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from distill3d.interrupts import raise_on_signals
from distill3d.workers.executor import (
    STOP_SECONDS,
    Answer,
    Done,
    OnProgress,
    Queue,
    R,
    Setup,
    T,
    Throttled,
    attempt,
    use_threads,
)


@dataclass(frozen=True)
class Processes:
    """Makes tasks in `workers` processes, each with its share of the cores; on several GPUs, one after the other."""

    workers: int
    gpus: tuple[str, ...] = ()  # values of CUDA_VISIBLE_DEVICES, dealt to the workers in turn

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return max(1, cores() // self.workers)

    def run(
        self, setup: Setup[T, R], tasks: Sequence[T], on_progress: OnProgress = lambda index, report: None
    ) -> Generator[Done[R], None, None]:
        """See `Executor`."""
        queue, team = Queue(len(tasks)), _Team(setup, self.threads, self.gpus)
        try:
            while queue.waiting or team.at_work:
                while queue.waiting and team.at_work < self.workers:
                    index = queue.waiting.popleft()
                    team.give(index, tasks[index])
                for index, message in team.messages():
                    if not isinstance(message, Answer):
                        on_progress(index, message)
                    elif message.result(queue, index):
                        yield Done(index, message.content)
        finally:
            team.stop()
        queue.check()


class _Worker:
    """A process and the driver's end of its pipe."""

    def __init__(self, setup: Setup, threads: int, gpu: str | None):
        context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA and threads in an undefined state
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, setup, threads, gpu), daemon=True)
        self.process.start()
        theirs.close()
        self.index: int | None = None  # of the task that it makes


class _Team:
    """The workers: gives them tasks, and hears of results and deaths."""

    def __init__(self, setup: Setup, threads: int, gpus: Sequence[str]):
        self._setup, self._threads, self._gpus = setup, threads, gpus
        self._workers: list[_Worker] = []
        self._started = 0

    @property
    def at_work(self) -> int:
        return sum(worker.index is not None for worker in self._workers)

    def give(self, index: int, task: object) -> None:
        """Gives a task to an idle worker, or to a new one."""
        for worker in [w for w in self._workers if w.index is None]:
            with suppress(OSError):
                worker.pipe.send(task)
                worker.index = index
                return
            self._workers.remove(worker)  # it died while it was idle
        gpu = self._gpus[self._started % len(self._gpus)] if self._gpus else None
        self._started += 1
        worker = _Worker(self._setup, self._threads, gpu)
        self._workers.append(worker)
        worker.index = index
        with suppress(OSError):  # a worker that is dead already is found so by `messages`
            worker.pipe.send(task)

    def messages(self) -> Iterator[tuple[int, object]]:
        """(index, `Answer` or report of progress) of what the workers say; waits for the first."""
        ready = wait([worker.pipe for worker in self._workers if worker.index is not None])
        for worker in [w for w in self._workers if w.pipe in ready]:
            index = worker.index
            assert index is not None
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join(STOP_SECONDS)
                message = Answer("failed", f"its process ended {_how(worker.process.exitcode)}")
            if isinstance(message, Answer):
                worker.index = None
                if message.kind == "failed":  # a process in an unknown state makes no other task
                    self._workers.remove(worker)
                    _end(worker)
            yield index, message

    def stop(self) -> None:
        """Ends all workers; those at work save their state first."""
        for worker in self._workers:
            if worker.index is None:
                worker.pipe.close()
            else:
                worker.process.terminate()
        for worker in self._workers:
            _end(worker)


def _end(worker: _Worker) -> None:
    """Waits for the end of a worker that is about to stop, and kills it if it does not."""
    worker.pipe.close()
    worker.process.join(STOP_SECONDS)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _how(status: int | None) -> str:
    return f"by signal {-status}" if status is not None and status < 0 else f"with status {status}"


def _work(pipe: Connection, setup: Setup, threads: int, gpu: str | None) -> None:
    """A worker: makes tasks until the driver closes the pipe, stops it or dies."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    raise_on_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the driver decides what its workers do
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_threads(threads)
    kept = functools.cache(setup)
    with suppress(EOFError, OSError, KeyboardInterrupt):  # the driver has ended, or stops this worker
        while True:
            task = pipe.recv()
            pipe.send(attempt(lambda task=task: kept()(task, Throttled(pipe.send))))


def _end_with_parent() -> None:
    """Stops this process, with its state saved, when its driver was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(STOP_SECONDS)
    os._exit(1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Tasks on a Ray cluster: one actor for each share of a GPU or of the cores, for as long as there are tasks."""

# Ray is an optional package that is not installed for development.
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from distill3d.interrupts import Interrupted
from distill3d.workers.executor import (
    STOP_SECONDS,
    Answer,
    Done,
    OnProgress,
    Queue,
    R,
    Setup,
    T,
    attempt,
    one_line,
    use_threads,
)

CONNECT_SECONDS = 10.0  # for the port of the cluster to answer
START_SECONDS = 60.0  # for Ray to join it
POLL_SECONDS = 1.0
GROW_SECONDS = 5.0  # between two looks for new nodes


@dataclass(frozen=True)
class RayCluster:
    """Makes tasks on a Ray cluster.

    `address` is that of the head node ("auto": the cluster that this machine belongs to). A worker gets `gpus` GPUs
    (0.25: four workers share one) and `cpus` cores.
    """

    address: str = "auto"
    gpus: float = 0.0
    cpus: int = 1

    def __post_init__(self) -> None:
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ValueError(f"--gpus-per-cell must be a fraction such as 0.25, or whole GPUs, got {self.gpus:g}")

    def run(
        self, setup: Setup[T, R], tasks: Sequence[T], on_progress: OnProgress = lambda index, report: None
    ) -> Generator[Done[R], None, None]:
        """See `Executor`.

        Raises:
            ImportError: where Ray is not installed; says what to type.
            ValueError: where the cluster cannot be reached in time, or has no room for a single worker.
        """
        connect(self.address)
        queue = Queue(len(tasks))
        team = _Team(setup, self)
        try:
            while queue.waiting or team.at_work:
                team.grow(len(queue.waiting))
                while queue.waiting and team.free(queue.waiting[0]):
                    index = queue.waiting.popleft()
                    team.give(index, tasks[index])
                for index, answer in team.answers():
                    if answer.result(queue, index):
                        yield Done(index, answer.content)
                team.report(on_progress)
        finally:
            team.stop()
        queue.check()


@dataclass
class _Worker:
    """An actor and what it is doing."""

    actor: Any
    hello: Any  # the reference to the name of its node; until it is there, the actor waits for room in the cluster
    node: str = ""
    index: int | None = None  # of the task that it makes
    answer: Any = None  # the reference to its answer
    progress: Any = None  # the reference to its report of progress


@dataclass
class _Team:
    """The actors: gives them tasks, and hears of results and deaths."""

    setup: Setup
    share: RayCluster
    workers: list[_Worker] = field(default_factory=list)
    avoid: dict[int, set[str]] = field(default_factory=dict)  # by task, the nodes on which it failed
    looked: float = -GROW_SECONDS

    def __post_init__(self) -> None:
        import ray

        self.kept = ray.put(self.setup)  # sent once for each node
        # Two threads: one makes the task, the other tells about it.
        self.kind = ray.remote(_Actor).options(  # type: ignore[attr-defined]
            num_cpus=self.share.cpus, num_gpus=self.share.gpus, max_restarts=0, max_concurrency=2
        )

    @property
    def at_work(self) -> int:
        return sum(worker.index is not None for worker in self.workers)

    def capacity(self) -> int:
        """How many workers the nodes that are alive have room for."""
        import ray

        def room(resources: dict[str, float]) -> int:
            shares = [resources.get("CPU", 0.0) // self.share.cpus]
            if self.share.gpus >= 1:
                shares.append(resources.get("GPU", 0.0) // self.share.gpus)
            elif self.share.gpus:  # a worker cannot have parts of two GPUs
                shares.append(resources.get("GPU", 0.0) * (1 // self.share.gpus))
            return int(min(shares))

        return sum(room(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def grow(self, waiting: int) -> None:
        """Starts workers for tasks that wait, as many as the cluster has room for now; nodes may come and go."""
        idle = len(self.workers) - self.at_work
        if waiting <= idle or time.monotonic() - self.looked < GROW_SECONDS:
            return
        self.looked, capacity = time.monotonic(), self.capacity()
        if not capacity and not self.workers:
            raise ValueError(
                f"no node of the Ray cluster has {self.share.cpus} CPU and {self.share.gpus:g} GPU for a cell: "
                "add nodes, or lower --gpus-per-cell"
            )
        for _ in range(min(waiting - idle, capacity - len(self.workers))):
            actor = self.kind.remote(self.kept, self.share.cpus)
            self.workers.append(_Worker(actor, actor.node.remote()))

    def free(self, index: int) -> _Worker | None:
        """An idle worker for a task, if possible on a node where it has not failed."""
        idle = [worker for worker in self.workers if worker.index is None and worker.node]
        elsewhere = [worker for worker in idle if worker.node not in self.avoid.get(index, ())]
        return next(iter(elsewhere or idle), None)

    def give(self, index: int, task: object) -> None:
        """Gives a task to an idle worker."""
        worker = self.free(index)
        assert worker is not None
        worker.index, worker.answer = index, worker.actor.make.remote(index, task)

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """The answers that there are; waits a moment for the first."""
        import ray
        from ray.exceptions import RayError

        pending = {worker.answer: worker for worker in self.workers if worker.index is not None}
        hellos = {worker.hello: worker for worker in self.workers if not worker.node}
        every = [*pending, *hellos]
        ready, _ = ray.wait(every, timeout=POLL_SECONDS) if every else ([], time.sleep(POLL_SECONDS))
        for worker in [hellos[reference] for reference in ready if reference in hellos]:
            try:
                worker.node = ray.get(worker.hello)
            except RayError:  # its node died before it could start
                self.workers.remove(worker)
                self.looked = -GROW_SECONDS
        for worker in [pending[reference] for reference in ready if reference in pending]:
            index = worker.index
            assert index is not None
            try:
                answer = cast(Answer, ray.get(worker.answer))
            except RayError as error:
                answer = Answer("failed", f"its worker ended ({type(error).__name__})")
            worker.index = worker.answer = worker.progress = None
            if answer.kind == "failed":  # a process in an unknown state makes no other task
                self.avoid.setdefault(index, set()).add(worker.node)
                self.workers.remove(worker)
                self.looked = -GROW_SECONDS
                with suppress(RayError):
                    ray.kill(worker.actor)
            yield index, answer

    def report(self, on_progress: OnProgress) -> None:
        """Passes on what workers said about their tasks since the last call, and asks again."""
        import ray
        from ray.exceptions import RayError

        working = [worker for worker in self.workers if worker.index is not None]
        asked = {worker.progress: worker for worker in working if worker.progress is not None}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for reference in ready:
            worker = asked[reference]
            worker.progress = None
            with suppress(RayError):  # `answers` finds it dead
                said = ray.get(reference)
                if said is not None and worker.index == said[0]:
                    on_progress(*said)
        for worker in working:
            if worker.progress is None:
                worker.progress = worker.actor.report.remote()

    def stop(self) -> None:
        """Ends all workers; those at work save their state first."""
        import ray
        from ray.exceptions import RayError

        working = [worker for worker in self.workers if worker.index is not None]
        for worker in working:
            worker.actor.stop.remote()
        if working:
            ray.wait([worker.answer for worker in working], num_returns=len(working), timeout=STOP_SECONDS)
        for worker in self.workers:
            with suppress(RayError):
                ray.kill(worker.actor)


class _Actor:
    """A worker on some node. `make` runs in one thread; `report` and `stop` are answered by the other one."""

    def __init__(self, setup: Setup, threads: int):
        self._kept, self._threads = functools.cache(setup), threads
        self._said: tuple[int, object] | None = None
        self._stopped = False

    def node(self) -> str:
        """The name of its node."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def make(self, index: int, task: object) -> Answer:
        """Makes a task."""

        def tell(report: object) -> None:
            self._said = (index, report)
            if self._stopped:
                raise Interrupted(signal.SIGTERM)

        use_threads(self._threads)
        return attempt(lambda: self._kept()(task, tell))

    def report(self) -> tuple[int, object] | None:
        """The index of a task, and its last report."""
        return self._said

    def stop(self) -> None:
        """The task at work saves its state after the present step, and ends."""
        self._stopped = True


def connect(address: str) -> None:
    """Joins a Ray cluster, unless this process has joined one.

    Raises:
        ImportError: where Ray is not installed; says what to type.
        ValueError: where the cluster does not answer in time.
    """
    if find_spec("ray") is None:
        raise ImportError('--ray needs the package ray: type  pip install "distill3d[ray]"')
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else every start prints a notice about GPUs
    _knock(address)
    import ray

    if ray.is_initialized():
        return
    failures: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True)  # Ray has no time limit of its own for all it waits for
    thread.start()
    thread.join(START_SECONDS)
    if failures or thread.is_alive():
        reason = one_line(failures[0]) if failures else f"no answer in {START_SECONDS:.0f} s"
        raise ValueError(_unreachable(address, reason))


def _knock(address: str) -> None:
    """Raises ValueError where nothing listens at the address of a cluster."""
    place = address
    if address == "auto":
        current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        place = os.environ.get("RAY_ADDRESS") or (current.read_text().strip() if current.is_file() else "")
        if not place:
            raise ValueError(_unreachable(address, "no Ray cluster runs on this machine"))
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--ray needs auto or the address of a head node, such as 10.0.0.5:6379, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(_unreachable(place, one_line(error))) from None


def _unreachable(address: str, reason: str) -> str:
    return (
        f"the Ray cluster {address} cannot be reached ({reason}); start one with  ray start --head  and pass "
        "--ray auto there, or pass --ray HOST:6379"
    )

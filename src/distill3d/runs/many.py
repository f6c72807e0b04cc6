"""Objects for many prompts on workers: a run folder for each, named by its configuration: nothing is made twice.

A finished run has `result.json` beside the files of any other run. The same call again makes what is missing, and goes
on with what was begun.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import distill3d
from distill3d.distill.divergence import Diverged
from distill3d.distill.loop import OnStep, Progress
from distill3d.files import locked, replacing
from distill3d.interrupts import Interrupted
from distill3d.objectives import ESD, VSD
from distill3d.priors.components.hub import BUNDLED
from distill3d.runs.config import resolved, to_plain
from distill3d.runs.folder import RunFolder, slug
from distill3d.runs.objects import Config, generate_in, load_priors
from distill3d.runs.shared_work import check_worker, make_published
from distill3d.types import Prior
from distill3d.workers.executor import WAIT_SECONDS, Executor, Make, Tell
from distill3d.workers.store import Place, Store

MARKER = "result.json"  # the file of a run that is written last
ROWS = 16  # of a network call: with more, an object takes no less time (docs/performance.md, growth)
Share = Callable[[Prior], Prior]  # the prior that one of several runs uses


def unshared(prior: Prior) -> Prior:
    """The prior itself."""
    return prior


def objects_at_once(config: Config) -> int:
    """The default number of objects that share network calls: as many as fill `ROWS` (bundled priors), else 1."""
    recipe = config.recipe
    if config.prior not in BUNDLED or not shares_calls(config):
        return 1
    views = recipe.views if recipe.sampling is None else recipe.sampling.views
    return max(1, ROWS // (2 * views))  # with and without the prompt


def shares_calls(config: Config) -> bool:
    """Whether runs with this configuration can share network calls: a method that trains a student cannot."""
    return not isinstance(config.recipe.objective, VSD | ESD)


@dataclass(frozen=True)
class Ending:
    """How a run ended: result.json."""

    steps: int
    nfe: int
    seconds: float  # of the loop
    export_seconds: float
    files: tuple[str, ...] = ()  # what the scene was exported to; empty if there is no surface
    failure: str = ""  # why there is no object


@dataclass(frozen=True)
class Job:
    """An object to make."""

    config: Config

    @property
    def folder(self) -> str:
        """The name of its run folder: the prompt, and a digest of all that decides the object."""
        plain = json.dumps(to_plain(self.config), sort_keys=True, allow_nan=False)
        digest = hashlib.sha256(f"{distill3d.__version__} {plain}".encode()).hexdigest()[:8]
        return f"{slug(self.config.prompt)[:48].strip('-') or 'run'}-{digest}"


@dataclass(frozen=True)
class JobSetup:
    """Makes objects in a worker. It loads the priors once: they are those of all jobs."""

    out: Place
    config: Config
    retries: int = 0
    version: str = distill3d.__version__
    share: Share = unshared

    def __call__(self) -> Make[Job, Ending]:
        """See `workers.executor.Setup`.

        Raises:
            ValueError: where this machine has another version, or does not see the folder.
        """
        check_worker(self.version, self.out)
        prior, second = load_priors(self.config)

        def make(job: Job, tell: Tell) -> Ending:
            return self.make(job, self.share(prior), None if second is None else self.share(second), tell)

        return make

    def make(self, job: Job, prior: Prior, second: Prior | None, tell: Tell) -> Ending:
        """Makes an object unless it is there."""
        if isinstance(self.out, Path):
            folder = RunFolder(self.out / job.folder)
            with locked(self.out / ".locks" / job.folder, wait=WAIT_SECONDS):
                return read_ending(folder.path) or self._make(folder, job, prior, second, tell)
        store = Store(self.out)

        def make(scratch: Path, on_step: OnStep) -> tuple[Path, Ending]:
            folder = RunFolder(scratch / "work" / job.folder)
            return folder.path, self._make(folder, job, prior, second, on_step)

        made = make_published(store, job.folder, job.folder, MARKER, make, tell)
        if made is None:
            made = _ending_at(self.out, job.folder)
            assert made is not None, job.folder
        return made

    def _make(self, folder: RunFolder, job: Job, prior: Prior, second: Prior | None, on_step: OnStep) -> Ending:
        try:
            result = generate_in(folder, job.config, prior, second, on_step, self.retries)
            if result.interrupted:
                raise Interrupted(result.interrupted)
            files = tuple(path.name for path in result.files)
            ending = Ending(result.steps, result.nfe, result.seconds, result.export_seconds, files)
        except Diverged as error:
            last = (folder.history() or [{"step": -1, "seconds": 0.0, "nfe": 0}])[-1]
            ending = Ending(last["step"] + 1, last["nfe"], last["seconds"], 0.0, failure=f"diverged {error}")
        with replacing(folder.path / MARKER) as draft:
            draft.write_text(json.dumps(asdict(ending), allow_nan=False))
        return ending


def read_ending(folder: Path) -> Ending | None:
    """How the run in a folder ended; None if it has not."""
    path = folder / MARKER
    return _parsed(path.read_bytes()) if path.is_file() else None


def _ending_at(out: Place, name: str) -> Ending | None:
    """How the run of this name ended, in a folder or at an address; None if it has not."""
    return read_ending(out / name) if isinstance(out, Path) else _parsed(Store(out).read(f"{name}/{MARKER}"))


def _parsed(content: bytes | None) -> Ending | None:
    if content is None:
        return None
    plain = json.loads(content)
    return Ending(**{**plain, "files": tuple(plain["files"])})


def generate_all(
    configs: Sequence[Config],
    out: Place,
    executor: Executor,
    *,
    retries: int = 0,
    on_step: Callable[[Config, Progress], None] = lambda config, progress: None,
    share: Share = unshared,
) -> Iterator[tuple[Config, str, Ending]]:
    """Makes an object for each configuration on an executor's workers; yields (configuration, folder, ending).

    The configurations share the prior; each run uses `share` of it. `out` is a folder, or an address such as
    s3://bucket/folder.

    Raises:
        ValueError: where `out` cannot be written, or another process is at work there; see also `Executor.run`.
    """
    jobs = list({job.folder: job for job in (Job(resolved(config)) for config in configs)}.values())
    with contextlib.ExitStack() as stack:
        if isinstance(out, Path):
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"cannot write to {out}: {error.strerror}; choose another place with --out") from error
        else:
            Store(out).check()
            stack.enter_context(Store(out).leased())
        missing = list[Job]()
        for job in jobs:
            if (ending := _ending_at(out, job.folder)) is None:
                missing.append(job)
            else:
                yield job.config, f"{out}/{job.folder}", ending
        setup = JobSetup(out, jobs[0].config, retries, share=share)

        def on_progress(index: int, progress: Progress) -> None:
            on_step(missing[index].config, progress)

        for done in stack.enter_context(contextlib.closing(executor.run(setup, missing, on_progress))):
            yield missing[done.index].config, f"{out}/{missing[done.index].folder}", done.result
        if not isinstance(out, Path):
            Store(out).remove("work")

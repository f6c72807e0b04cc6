"""The browser viewer: its flags, and the command that shows a run that has ended."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from distill3d.cli.shared import NO_DEFAULT, Run, run_folder

if TYPE_CHECKING:
    from distill3d.distill.observer import Observer


WHERE = "127.0.0.1:8080"
PLACE = "[TOKEN@][HOST:]PORT"
Watched = Annotated[
    str | None,
    PrimitiveConstructorSpec(  # the address may be left out
        nargs="*",
        metavar=f"[{PLACE}]",
        instance_from_str=lambda words: " ".join(words) or WHERE,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    ),
    NO_DEFAULT,
]


@dataclass(frozen=True, kw_only=True)
class Viewing:
    """Watch and steer the run."""

    view: Watched = None
    """Show the run in a browser while it is under way, at 127.0.0.1:8080 unless an address follows; port 0 takes a free
    one. One that others can reach needs a token, which they must give. Needs pip install 'distill3d[viewer]'."""

    @contextlib.contextmanager
    def observers(self) -> Iterator[tuple[Observer, ...]]:
        """The viewer, open, if it is asked for."""
        if self.view is None:
            yield ()
            return
        from distill3d.viewer.gate import address

        place = address(self.view)  # wrong ones are found before torch is imported
        from distill3d.viewer.live import LiveViewer

        viewer = LiveViewer(place)
        say_where(viewer.screen.url)
        try:
            yield (viewer,)
        finally:
            viewer.close()


@dataclass(frozen=True)
class View:
    """Show a run in a browser: mesh, splats, normals, opacity, depth and turntable.

    Needs pip install 'distill3d[viewer]'. Ctrl-C ends it.
    """

    folder: Run
    """The run's folder."""
    at: Annotated[str, arg(metavar=PLACE, help_behavior_hint="")] = WHERE
    """Address of the page; default: 127.0.0.1:8080. Port 0 takes a free one. One that others can reach needs a token,
    which they must give."""
    device: Annotated[str, arg(metavar="NAME")] = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    def run(self) -> int:
        """Shows it until Ctrl-C; returns the exit status."""
        from distill3d.viewer.gate import address

        place, folder = address(self.at), run_folder(self.folder)
        from distill3d.viewer.after import AfterViewer

        viewer = AfterViewer(folder, place, self.device)
        say_where(viewer.screen.url)
        try:
            while True:
                viewer.tick()
        except KeyboardInterrupt:
            return 0
        finally:
            viewer.close()


def say_where(url: str) -> None:
    """Prints what to open."""
    print(f"viewer: {url}", file=sys.stderr, flush=True)

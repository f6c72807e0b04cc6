"""The command that shows runs to others: gallery."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from distill3d.cli.shared import Flag, counter


@dataclass(frozen=True)
class Gallery:
    """Write one HTML page with turning models from any runs.

    It shows each object with its prompt, method, prior, seed and command. The page needs no other file and no network.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUNS")]
    """Run folders, folders of run folders, bench folders, or meshes (.glb, .gltf, .obj, .ply)."""
    title: Annotated[str, arg(metavar="TEXT")] = "distill3d gallery"
    """Heading of the page."""
    no_models: Flag = False
    """Turning pictures alone: a page of about 40 kB for each object."""
    most_mb: float = 200.0
    """Largest size of the page in megabytes; browsers are slow with much larger ones."""
    out: Annotated[Path, arg(metavar="PATH")] = Path("gallery.html")
    """The page to write."""

    def run(self) -> int:
        """Writes the page and prints where it is; returns the exit status."""
        from distill3d.bench import check_libraries
        from distill3d.bench.gallery import check_size, find_entries, write_gallery
        from distill3d.cli.typed import typed

        if self.out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--out must end in .html, got {self.out}")
        check_libraries("a gallery needs", ("jinja2",))
        entries, unfinished = find_entries(self.runs)
        check_size(entries, self.most_mb, models=not self.no_models)
        commands = ["" if entry.config is None else typed(entry.config, entry.path) for entry in entries]
        with counter("reading", len(entries)) as on_entry:
            write_gallery(self.out, entries, commands, self.title, not self.no_models, on_entry)
        print(f"{self.out}: {len(entries)} model{'s'[: len(entries) > 1]}, {self.out.stat().st_size / 1e6:.1f} MB")
        if unfinished:
            left_out = "run without an object is" if unfinished == 1 else "runs without an object are"
            print(f"{unfinished} {left_out} left out; distill3d resume RUN continues a run", file=sys.stderr)
        return 0

"""A gallery: one HTML file of turning models from any runs, each with what it was made from and the command.

Its template is page/gallery.html; see `pages` for what it shares with the report of a bench.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill3d.bench.pages import base64_text, data_uri, packed, write_page
from distill3d.export.video import as_image, read_video, still_webp, turning_webp, turntable_frames
from distill3d.meshes.files import read_mesh, save_mesh
from distill3d.meshes.gltf_file import MESHOPT, open_gltf
from distill3d.objectives import METHODS
from distill3d.runs.folder import CONFIG, RunFolder
from distill3d.runs.objects import Config
from distill3d.scenes.mesh import MeshOptions

FRAMES = 24  # of a turning picture
PICTURE_SIZE = 128  # pixels a side of the pictures of a mesh file
LEVELS = (16, 32, 64, 128)  # of the colors of these pictures
MODELS = ("mesh.glb", "splats.ply")  # what a run that has an object ends with
MESHES = (".glb", ".gltf", ".obj", ".ply")
COMPRESSED = {"KHR_draco_mesh_compression", "KHR_texture_basisu", *MESHOPT}  # the viewer loads their decoders
AS_TEXT = 4 / 3  # characters for a byte


@dataclass(frozen=True)
class Entry:
    """One model of a gallery, before its files are read."""

    path: Path  # a run folder or a mesh file
    config: Config | None  # of a run

    @property
    def title(self) -> str:
        """Its prompt, or the name of its file."""
        return self.path.name if self.config is None else self.config.prompt

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What it was made from, by name; empty for a file."""
        if self.config is None:
            return []
        config, prior = self.config, Path(self.config.prior).name or self.config.prior
        named = {"method": method_name(config), "prior": prior, "seed": config.seed, "steps": config.recipe.steps}
        return [(name, str(value)) for name, value in named.items()]

    @property
    def lacks(self) -> str:
        """What is missing from a run, steps or a model; empty for a finished run and for a file."""
        if self.config is None:
            return ""
        steps, taken = self.config.recipe.steps, RunFolder(self.path).taken
        parts = [] if taken is None or taken >= steps else [f"unfinished: {taken} of {steps} steps"]
        parts += [] if any((self.path / name).is_file() for name in MODELS) else ["no mesh"]
        return ", ".join(parts)

    @property
    def model(self) -> Path | None:
        """The mesh file that the page shows; None where there is none, as for splats."""
        path = self.path if self.config is None else self.path / "mesh.glb"
        return path if path.is_file() else None

    @property
    def turntable(self) -> Path | None:
        """Where turning pictures come from: that of a bench, or a video; None for mesh files."""
        files = (self.path / name for name in ("turn.webp", "turntable.mp4"))
        return next((path for path in files if path.is_file()), None)


@dataclass(frozen=True)
class _Card:
    """One model on the page; pictures and model are text that the page can use, or empty."""

    id: int
    title: str
    facts: list[tuple[str, str]]
    lacks: str  # what is missing from the run
    command: str
    still: str  # data URI
    turn: str  # base64
    model: str  # base64 of gzip


def method_name(config: Config) -> str:
    """The name of a run's method, as --method takes it; of one of your own, the name of its class."""
    kind = type(config.recipe.objective)
    named = (name for name, settings in METHODS.items() if type(settings) is kind)
    return next(named, getattr(config.recipe.objective, "kind", kind.__name__).rpartition(":")[2])


def find_entries(paths: Sequence[Path]) -> tuple[list[Entry], int]:
    """The models of run folders, folders of these, bench folders and mesh files; how many unfinished ones are left out.

    Raises:
        ValueError: for a path that is nothing of these, a run without an object, or where no model is found at all.
    """
    entries, unfinished = [], 0
    for path in paths:
        whole = [path / "cells", path]
        inside = [run for folder in whole for run in sorted(folder.glob(f"*/{CONFIG}"))]
        if path.is_file() and path.suffix.lower() in MESHES:
            entries.append(Entry(path, None))
        elif (path / CONFIG).is_file():
            entry = Entry(path, RunFolder(path).read_config("object", Config))
            if not (entry.turntable or entry.model):
                raise ValueError(f"{path} has no object yet: type  distill3d resume {path}")
            entries.append(entry)
        elif inside:
            for run in inside:
                entry = _entry(run.parent)
                if entry is not None and (entry.turntable or entry.model):
                    entries.append(entry)
                else:
                    unfinished += entry is not None
        elif path.exists():
            raise ValueError(
                f"{path} is neither a run folder, a folder of these, a bench folder, nor a mesh ({', '.join(MESHES)})"
            )
        else:
            raise ValueError(f"{path} does not exist")
    if not entries:
        raise ValueError(f"there is no finished object in {', '.join(map(str, paths))}")
    return entries, unfinished


def check_size(entries: Sequence[Entry], most: float, models: bool) -> None:
    """Raises ValueError where a page of these would have more than `most` megabytes."""
    files = [path for entry in entries for path in (entry.turntable, entry.model if models else None)]
    size = AS_TEXT * sum(path.stat().st_size for path in files if path is not None) / 1e6
    if size > most:
        advice = "or --no-models for turning pictures alone" if models else "or a larger --most-mb"
        raise ValueError(
            f"a page of these {len(entries)} models would have about {size:.0f} MB, --most-mb allows {most:g}: "
            f"pass fewer, {advice}"
        )


def write_gallery(
    path: Path,
    entries: Sequence[Entry],
    commands: Sequence[str],
    title: str = "distill3d gallery",
    models: bool = True,
    on_entry: Callable[[], None] = lambda: None,
) -> None:
    """Writes the page.

    Args:
        commands: what to type for each entry, or an empty text.
        models: whether it holds the models, or only turning pictures.
        on_entry: called after each.

    Raises:
        ValueError: for a file that cannot be read.
    """
    cards = []
    for i, (entry, command) in enumerate(zip(entries, commands, strict=True)):
        still, turn = _pictures(entry)
        model = _glb(entry.model) if models and entry.model is not None else b""
        texts = (entry.title, entry.facts, entry.lacks, command)
        cards.append(_Card(i, *texts, data_uri(still), base64_text(turn), packed(model)))
        on_entry()
    write_page(path, "gallery.html", title=title, cards=cards)


def _entry(folder: Path) -> Entry | None:
    """The entry of a folder that was found; None where it is no run of an object, such as an image or a prior."""
    try:
        return Entry(folder, RunFolder(folder).read_config("object", Config))
    except ValueError:
        return None


def _pictures(entry: Entry) -> tuple[bytes, bytes]:
    """A still and a turning picture."""
    source = entry.turntable
    if source is None:
        scene = MeshOptions(mesh=str(entry.model), colors=True, levels=LEVELS).build().eval()
        images = [as_image(frame) for frame in turntable_frames(scene, FRAMES, PICTURE_SIZE)]
    elif source.suffix == ".webp":
        still = source.with_name("still.webp")
        return (still if still.is_file() else source).read_bytes(), source.read_bytes()
    else:
        images = read_video(source, FRAMES)
    return still_webp(images[0]), turning_webp(images)


def self_contained(document: Mapping[str, Any]) -> bool:
    """Whether a glTF document needs no other file, and no decoder that the viewer would load."""
    entries = (entry for kind in ("buffers", "images") for entry in document.get(kind, []))
    return not any("uri" in entry for entry in entries) and COMPRESSED.isdisjoint(
        document.get("extensionsRequired", [])
    )


def _glb(path: Path) -> bytes:
    """A mesh as a self-contained GLB file."""
    if path.suffix.lower() == ".glb" and self_contained(open_gltf(path).document):
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "mesh.glb"
        save_mesh(plain, read_mesh(path))
        return plain.read_bytes()

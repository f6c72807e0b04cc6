"""Everything on the gallery page of the manual: 24 objects and 6 textured meshes, each with the command that made it.

    python benchmarks/docs_gallery.py --out gallery [--only mushroom,chair] [--page docs/gallery.md]

It runs the commands that the page shows: one object of each kind that the bundled priors know, in the color of
`toybox_3d.py`, and six gray meshes of `texture.py`. Nothing is picked. Finished runs are not made again and begun ones
go on, so it can be stopped and continued; several processes can share the work by --only. The turning pictures lie
beside the page, in images/gallery; the tables of the page list those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from texture import meshes, save_gray
from toybox_3d import prompts

from distill3d.cli import main as cli
from distill3d.export.video import read_video, turning_webp
from distill3d.files import replacing
from distill3d.priors.loading import load_prior
from distill3d.runs.folder import slug
from distill3d.runs.objects import Config, generate, read_config, resume
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, Claim, sentence
from distill3d.types import Prior

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
TEXTURED = ("chair", "car", "duck", "house", "person", "teapot")  # of the ten of texture.py
FRAMES, COLUMNS = 24, 4


@dataclass(frozen=True)
class Item:
    """One picture of the page."""

    prompt: str
    mesh: str = ""  # a gray mesh that is textured; else an object is made

    @property
    def name(self) -> str:
        """The stem of its picture."""
        return slug(f"{Path(self.mesh).stem} as {self.prompt}" if self.mesh else self.prompt)

    @property
    def folder(self) -> str:
        """The folder of its run folder."""
        return "textured" if self.mesh else "objects"

    @property
    def command(self) -> str:
        """What to type for it."""
        return f'distill3d texture {self.mesh} "{self.prompt}"' if self.mesh else f'distill3d generate "{self.prompt}"'


def objects() -> list[Item]:
    """One for each kind of toy."""
    claims = [Claim(KIND_NAMES.index(kind), COLOR_NAMES.index(color)) for kind, color, _ in prompts()]
    return [Item(sentence(claim)) for claim in claims]


def textured() -> list[Item]:
    """One for each mesh."""
    return [Item(prompt, f"{name}.glb") for name, prompt, *_ in meshes() if name in TEXTURED]


def run_of(item: Item, config: Config) -> Path | None:
    """The folder of an item's run below the current one, finished or begun."""
    for path in sorted(Path(item.folder).glob("*/config.json")):
        found = read_config(path.parent)
        if (found.prompt, found.seed, found.recipe.steps) == (item.prompt, config.seed, config.recipe.steps):
            return path.parent
    return None


def make(item: Item, priors: dict[str, Prior], most_steps: int | None) -> Path:
    """The folder of an item's finished run below the current one; it is made if need be."""
    words = shlex.split(item.command)[1:]
    words += [] if most_steps is None else ["--steps", str(most_steps)]
    command = cli.parse(words)
    config = command.config()  # type: ignore[attr-defined]  # generate and texture have it
    folder = run_of(item, config)
    if folder is not None and (folder / "mesh.glb").is_file():
        return folder
    if config.prior not in priors:
        priors[config.prior] = load_prior(config.prior, config.device, config.dtype)
    prior = priors[config.prior]
    result = resume(folder, prior=prior) if folder is not None else generate(config, item.folder, prior=prior)
    if result.interrupted:
        raise SystemExit(128 + result.interrupted)
    assert result.mesh is not None, f"{item.prompt}: no mesh"
    return result.folder


def table(items: list[Item], pictures: Path) -> str:
    """Markdown: the pictures that are there, `COLUMNS` in a row, the command under each."""
    there = [item for item in items if (pictures / f"{item.name}.webp").is_file()]
    cells = [f"![{item.prompt}](images/gallery/{item.name}.webp)<br>`{item.command}`" for item in there]
    cells += [""] * (-len(cells) % COLUMNS)
    rows = [f"| {' | '.join(cells[i : i + COLUMNS])} |" for i in range(0, len(cells), COLUMNS)]
    return "\n".join([*rows[:1], f"|{':-:|' * COLUMNS}", *rows[1:]])


def filled(text: str, pictures: Path) -> str:
    """The page with its two tables as they are now: they stand between `<!-- NAME -->` and `<!-- end -->`."""
    for name, items in (("objects", objects()), ("textured", textured())):
        block = f"<!-- {name} -->\n\n{table(items, pictures)}\n\n<!-- end -->"
        text, found = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL)
        assert found == 1, f"the page has no place for {name}"
    return text


def asked_for(only: str | None) -> Iterator[Item]:
    """The items whose names hold one of these words."""
    words = [word.strip() for word in (only or "").split(",")]
    yield from (item for item in [*objects(), *textured()] if any(word in item.name for word in words))


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", help="words of names, separated by commas; default: all")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="the page; its pictures lie in images/gallery beside it"
    )
    parser.add_argument("--steps", type=int, help="fewer steps, to try this script")
    arguments = parser.parse_args()
    page, priors = arguments.page.resolve(), {}
    pictures = page.parent / "images" / "gallery"
    arguments.out.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(arguments.out):
        for name, _, _, _, solid in meshes():
            if name in TEXTURED and not Path(f"{name}.glb").is_file():
                save_gray(Path(f"{name}.glb"), solid)
        for item in asked_for(arguments.only):
            picture, began = pictures / f"{item.name}.webp", time.process_time()
            folder = make(item, priors, arguments.steps)
            with replacing(picture) as draft:
                draft.write_bytes(turning_webp(read_video(folder / "turntable.mp4", FRAMES)))
            size = picture.stat().st_size / 1000
            print(f"{item.name}: {size:.0f} kB, {time.process_time() - began:.0f} s of CPU, {folder}", flush=True)
    text = filled(page.read_text(), pictures)
    with replacing(page) as draft:
        draft.write_text(text)


if __name__ == "__main__":
    main()

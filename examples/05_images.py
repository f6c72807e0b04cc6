"""2D images: DDIM and SDI from the same noise, and methods side by side.

python examples/05_images.py
"""

import dataclasses

import distill3d as d3d
from distill3d.distill.image_recipes import image_recipe
from distill3d.runs.compare import CompareConfig, compare


def main(out: str = "runs", steps: int = 40) -> list[str]:
    """Makes an image, then a comparison; returns the files."""
    config = d3d.ImageConfig("a blue car", image_recipe("ddim"), seed=1)
    image = d3d.generate_image(config, out).image

    names = ("ddim", "sdi_cached", "sdi")
    recipes = {name: dataclasses.replace(image_recipe(name), steps=steps) for name in names}
    comparison = compare(CompareConfig("a blue car", recipes, seed=1), out)
    for row in comparison.rows:
        print(f"{row.method:<12} {row.nfe:>5} NFE  sharpness {row.sharpness:.2f}")
    return [str(image), str(comparison.image)]


if __name__ == "__main__":
    print(*main(), sep="\n")

"""Texture a mesh of yours: its shape stays, the prior paints it.

python examples/06_texture_a_mesh.py chair.glb "a red chair"
"""

import dataclasses
import sys

import distill3d as d3d
from distill3d.distill.recipes import TEXTURE_RECIPES


def main(mesh: str, prompt: str, prior_name: str = "toybox", steps: int = 60, out: str = "runs") -> d3d.Result:
    """Writes a run folder with the textured mesh.glb."""
    recipe = TEXTURE_RECIPES["laptop"]
    scene = dataclasses.replace(recipe.scene, mesh=mesh, texture=1024)
    recipe = dataclasses.replace(recipe, scene=scene, steps=steps)
    return d3d.generate(d3d.Config(prompt, recipe, prior=prior_name), out)


if __name__ == "__main__":
    print(main(*sys.argv[1:3]).mesh)

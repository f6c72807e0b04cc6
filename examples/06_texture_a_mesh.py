"""Texture a mesh of yours: its shape stays, the prior paints it.

python examples/06_texture_a_mesh.py chair.glb "a red chair"
"""

import dataclasses
import sys

import distill3d as d3d
from distill3d.distill.recipes import TEXTURE_RECIPES


def main(mesh: str, prompt: str, recipe: d3d.Recipe = TEXTURE_RECIPES["laptop"], out: str = "runs") -> d3d.Result:
    """Writes a run folder with the textured mesh.glb."""
    recipe = dataclasses.replace(recipe, scene=dataclasses.replace(recipe.scene, mesh=mesh))
    return d3d.generate(d3d.Config(prompt, recipe), out)


if __name__ == "__main__":
    print(main(*sys.argv[1:3]).mesh)

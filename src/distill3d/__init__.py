"""distill3d: from a prompt to a 3D object, by score distillation from a frozen 2D diffusion model.

    import distill3d as d3d

    result = d3d.generate("a red mushroom")              # the bundled prior, two CPU cores
    print(result.mesh)                                   # runs/a-red-mushroom-1a2b3c/mesh.glb

    prior = d3d.load_prior("toybox")                     # or a Stable Diffusion folder or hub id
    prompts = d3d.ViewPrompts("a red mushroom")
    scene = d3d.VoxelField(d3d.VoxelOptions())           # or any nn.Module with a `render` method
    d3d.distill(scene, prior, d3d.sdi(), prompts, steps=200)

docs/conventions.md states axes, units and ranges once.
"""

from distill3d.cameras import CameraSampler
from distill3d.distill.loop import Progress
from distill3d.distill.objects import distill
from distill3d.distill.recipes import RECIPES, Recipe
from distill3d.objectives import METHODS, SDI, SDS, Objective, attach, sdi, sds
from distill3d.priors.loading import load_prior
from distill3d.priors.mixture import MixturePrior
from distill3d.prompts import ViewPrompts
from distill3d.runs.images import ImageConfig, generate_image
from distill3d.runs.objects import Config, Result, generate, load_scene, resume
from distill3d.scenes import Gaussians, HashField, ImageScene, MeshScene, VoxelField, VoxelOptions
from distill3d.types import Cameras, Condition, Conditioning, Guidance, Prior, Rendering, Scene

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "RECIPES",
    "SDI",
    "SDS",
    "CameraSampler",
    "Cameras",
    "Condition",
    "Conditioning",
    "Config",
    "Gaussians",
    "Guidance",
    "HashField",
    "ImageConfig",
    "ImageScene",
    "MeshScene",
    "MixturePrior",
    "Objective",
    "Prior",
    "Progress",
    "Recipe",
    "Rendering",
    "Result",
    "Scene",
    "ViewPrompts",
    "VoxelField",
    "VoxelOptions",
    "__version__",
    "attach",
    "distill",
    "generate",
    "generate_image",
    "load_prior",
    "load_scene",
    "resume",
    "sdi",
    "sds",
]

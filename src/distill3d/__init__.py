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

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where the public names are; each module is imported when one of its names is asked for, because torch takes longer to
# import than many a command to run.
_HOMES = {
    "cameras": "CameraSampler",
    "distill.loop": "Progress",
    "distill.objects": "distill",
    "distill.recipes": "RECIPES Recipe",
    "objectives": "METHODS SDI SDS Objective attach sdi sds",
    "priors.loading": "load_prior",
    "priors.mixture": "MixturePrior",
    "prompts": "ViewPrompts",
    "runs.images": "ImageConfig generate_image",
    "runs.objects": "Config Result generate load_scene resume",
    "scenes": "Gaussians HashField ImageScene MeshScene VoxelField VoxelOptions",
    "types": "Cameras Condition Conditioning Guidance Prior Rendering Scene",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


class _Package(ModuleType):
    """A module that imports on demand, and whose `distill` is the function, not the package of that name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _HOME:
            value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
            self.__dict__[name] = value
            return value
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):  # imports set the packages in a package
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

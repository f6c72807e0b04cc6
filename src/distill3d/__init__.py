"""distill3d: from a sentence to a 3D object, by score distillation from a frozen 2D diffusion model.

    import distill3d
    from distill3d.runs.objects import Config, generate

    result = generate(Config("a red mushroom"))          # the bundled prior, two CPU cores
    print(result.folder, result.mesh)                    # runs/a-red-mushroom-1a2b3c/mesh.glb

    prior = distill3d.load_prior("toybox")               # or a Stable Diffusion folder or hub id
    objective = distill3d.objectives.sdi()               # .loss(x, prior, conditioning, step=, total=, generator=)

`docs/conventions.md` states axes, units and ranges once.
"""

from distill3d import cameras, diffusion, objectives, scenes
from distill3d.distill import regularizers
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.types import Condition, Conditioning, Guidance, Prior, Rays, Rendering, Scene

__version__ = "0.1.0"

__all__ = [
    "Condition",
    "Conditioning",
    "Guidance",
    "Prior",
    "Rays",
    "Rendering",
    "Scene",
    "ViewPrompts",
    "__version__",
    "cameras",
    "diffusion",
    "load_prior",
    "objectives",
    "regularizers",
    "scenes",
]

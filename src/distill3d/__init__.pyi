from .cameras import CameraSampler
from .distill.loop import Progress, distill
from .distill.recipes import RECIPES, Recipe
from .objectives import METHODS, SDI, SDS, Objective, attach, sdi, sds
from .priors.loading import load_prior
from .priors.mixture import MixturePrior
from .prompts import ViewPrompts
from .runs.images import ImageConfig, generate_image
from .runs.objects import Config, Result, generate, load_scene, resume
from .scenes import Gaussians, HashField, ImageScene, MeshScene, VoxelField, VoxelOptions
from .types import Cameras, Condition, Conditioning, Guidance, Prior, Rendering, Scene

__version__: str

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

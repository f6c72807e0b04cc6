"""Scenes: parameters that can be rendered from a camera. Each has a dataclass of options with `build(device)`."""

from distill3d.scenes.background import ConstantBackground, LearnedBackground, RandomGray
from distill3d.scenes.field import FieldScene
from distill3d.scenes.gaussians import GaussianOptions, Gaussians
from distill3d.scenes.hashgrid.field import HashField, HashOptions
from distill3d.scenes.image import ImageScene
from distill3d.scenes.mesh import MeshOptions, MeshScene
from distill3d.scenes.voxels import VoxelField, VoxelOptions

__all__ = [
    "ConstantBackground",
    "FieldScene",
    "GaussianOptions",
    "Gaussians",
    "HashField",
    "HashOptions",
    "ImageScene",
    "LearnedBackground",
    "MeshOptions",
    "MeshScene",
    "RandomGray",
    "VoxelField",
    "VoxelOptions",
]

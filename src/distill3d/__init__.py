"""distill3d: from a prompt to a 3D object, by score distillation from a frozen 2D diffusion model.

    import distill3d as d3d

    result = d3d.generate("a red mushroom")              # the bundled prior, two CPU cores
    print(result.mesh)                                   # runs/a-red-mushroom-1a2b3c/mesh.glb

    prior = d3d.load_prior("toybox")                     # or a Stable Diffusion folder or hub id
    prompts = d3d.ViewPrompts("a red mushroom")
    scene = d3d.VoxelField(d3d.VoxelOptions())           # or any nn.Module with a `render` method
    d3d.distill(scene, prior, d3d.sdi(), prompts, steps=200)

docs/conventions.md states axes, units and ranges once. `__init__.pyi` lists the public names; each is imported when it
is first used, so that `distill3d --help` need not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"

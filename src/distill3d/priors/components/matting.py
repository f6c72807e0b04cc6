"""The coverage of the object in an image: from the color of the border, or by a small network."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.priors.components.folder import freeze, remember_files

FILE = "model.safetensors"
CHANNELS = (24, 48, 72, 72)  # of the network's levels, each at half the resolution of the one before


def border_matte(images: Float[Tensor, "b 3 h w"], low: float = 0.04, high: float = 0.14) -> Float[Tensor, "b 1 h w"]:
    """Coverage in [0, 1] of an object before a plain background, whose color is the median of the image's border.

    0 where no channel differs from the background by more than `low`, 1 above `high`. Parts of the object that have
    the color of the background count as background.
    """
    sides = images[..., 0, :], images[..., :, 0], images[..., :, -1]  # an object may stand on the lower border
    background = torch.cat(sides, dim=-1).median(dim=-1).values
    difference = (images - background[..., None, None]).abs().amax(1, keepdim=True)
    s = ((difference - low) / (high - low)).clamp(0, 1)
    return s * s * (3 - 2 * s)


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU(inplace=True)
        )


class MattingNetwork(nn.Module):
    """A U-Net of 0.4 M parameters from images in [0, 1] to coverage; sides must be multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        first, *rest = CHANNELS
        self.first = nn.Sequential(_Block(3, first), _Block(first, first))
        pairs = list(zip(CHANNELS, rest, strict=False))
        self.down = nn.ModuleList(nn.Sequential(_Block(a, b, 2), _Block(b, b)) for a, b in pairs)
        self.up = nn.ModuleList(_Block(a + b, a) for a, b in reversed(pairs))
        self.last = nn.Conv2d(first, 1, 3, padding=1)

    def logits(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Coverage before the sigmoid."""
        levels = [self.first(2 * images - 1)]
        for block in self.down:
            levels.append(block(levels[-1]))
        x = levels.pop()
        for block in self.up:
            x = block(torch.cat((F.interpolate(x, scale_factor=2.0), levels.pop()), dim=1))
        return self.last(x)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Coverage in [0, 1]."""
        return torch.sigmoid(self.logits(images))


def save_matting(network: MattingNetwork, folder: Path) -> None:
    """Writes the weights in half precision."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, folder / FILE)


def load_matting(folder: Path, device: torch.device) -> MattingNetwork | None:
    """The network of a folder, in float32; None if there is no such folder. ValueError for damaged weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.is_dir():
        return None
    network = MattingNetwork()
    try:
        network.load_state_dict(load_file(folder / FILE))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"weights in {folder} are damaged: {str(error).splitlines()[0]}") from error
    remember_files(network, [folder / FILE])
    return freeze(network, device, torch.float32)

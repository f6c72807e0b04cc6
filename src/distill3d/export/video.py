"""Pictures for people: turntables as mp4, contact sheets as PNG."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d import cameras
from distill3d.files import replacing
from distill3d.types import Scene

if TYPE_CHECKING:
    from PIL import Image


def turntable_frames(
    scene: Scene,
    frames: int = 72,
    size: int = 256,
    elevation: float = 15.0,
    distance: float = 2.8,
    fov: float = 40.0,
    background: float = 1.0,
) -> Iterator[Tensor]:
    """Yields pictures [3, size, size] all around a scene on the CPU, in order, over a gray level in [0, 1].

    The frames are made side by side, one thread each: rendering is many small operations, which one frame alone
    cannot spread over cores.
    """
    views = cameras.turntable(frames, elevation, distance, fov)
    threads = torch.get_num_threads()

    @torch.no_grad()
    def frame(i: int) -> Tensor:
        return scene.render(views[i : i + 1], size, torch.full((1, 3), background)).rgb[0]

    if threads == 1:
        yield from map(frame, range(frames))
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            waiting = deque(pool.submit(frame, i) for i in range(min(frames, 2 * threads)))
            for i in range(len(waiting), frames + len(waiting)):
                picture = waiting.popleft().result()
                if i < frames:
                    waiting.append(pool.submit(frame, i))
                yield picture
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def save_video(path: str | os.PathLike[str], frames: Iterable[Tensor], fps: int = 24) -> None:
    """Writes pictures [3, H, W] in [0, 1] (a tensor [N, 3, H, W] or any iterable) as an mp4, whole or not at all.

    H.264 where the codec is there, else MPEG-4 part 2; an odd row or column is repeated, for both want even sizes.

    Raises:
        ValueError: for no frames, or frames of different shapes.
    """
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with replacing(path) as draft, av.open(str(draft), "w") as container:
        stream, shape = None, None
        for frame in frames:
            if shape is None:
                shape = frame.shape
                stream = container.add_stream(codec, rate=fps)
                stream.height, stream.width = (n + n % 2 for n in shape[1:])
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
            if frame.shape != shape or shape[0] != 3:
                raise ValueError(f"frames must all be [3, H, W], got {tuple(frame.shape)} after {tuple(shape)}")
            padded = F.pad(frame[None].float(), (0, shape[2] % 2, 0, shape[1] % 2), mode="replicate")[0]
            picture = av.VideoFrame.from_ndarray(_bytes(padded).numpy(), format="rgb24")
            assert stream is not None
            container.mux(stream.encode(picture))
        if stream is None:
            raise ValueError("a video needs at least one frame, got none")
        container.mux(stream.encode())


def contact_sheet(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Pictures [N, 3, H, W] in [0, 1] side by side, row by row, `gap` white pixels between them."""
    from PIL import Image

    if images.ndim != 4 or images.shape[1] != 3 or not len(images) or columns < 1:
        raise ValueError(f"a sheet needs pictures [N, 3, H, W] and columns >= 1, got {tuple(images.shape)}, {columns}")
    n, _, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        at = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(Image.fromarray(_bytes(image).numpy()), at)
    return sheet


def save_image(path: str | os.PathLike[str], image: Image.Image | Tensor) -> None:
    """Writes a picture, PIL or [3, H, W] in [0, 1], in the format of the suffix, whole or not at all."""
    from PIL import Image

    picture = Image.fromarray(_bytes(image).numpy()) if isinstance(image, Tensor) else image
    with replacing(path) as draft:
        picture.save(draft)


def _bytes(image: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] as [H, W, 3] bytes on the CPU, rounded."""
    return (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()

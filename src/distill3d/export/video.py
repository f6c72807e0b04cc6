"""Images for people: turntables as mp4 and animated WebP, contact sheets as PNG."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from distill3d.cameras import BACKGROUND, DISTANCE, ELEVATION, FOV, turntable
from distill3d.files import replacing
from distill3d.types import Cameras, Scene

if TYPE_CHECKING:
    from PIL import Image

MOST_SIZE = 4096  # pixels per side of a rendered image
TURN_SIZE, STILL_SIZE, TURN_SECONDS = 128, 96, 5.0  # of small pictures for pages


def turntable_frames(
    scene: Scene,
    frames: int = 72,
    size: int = 256,
    elevation: float = ELEVATION,
    distance: float = DISTANCE,
    fov: float = FOV,
    background: float = BACKGROUND,
) -> Iterator[Float[Tensor, "3 size size"]]:
    """Renders images all around a scene, in order, on the scene's device; see `render_each`.

    Args:
        elevation, fov: degrees.
        distance: world units.
        background: gray level in [0, 1].

    Raises:
        ValueError: for a size out of range.
    """
    if not 1 <= size <= MOST_SIZE:
        raise ValueError(f"the size must be 1 to {MOST_SIZE} pixels per side, got {size}")
    return render_each(scene, turntable(frames, elevation, distance, fov), size, background)


def render_each(
    scene: Scene, cameras: Cameras, size: int, background: float = BACKGROUND
) -> Iterator[Float[Tensor, "3 size size"]]:
    """Renders an image for each camera, in order, on the scene's device and without gradients.

    On the CPU several images are rendered at once, one thread each: rendering is many small operations, which do not
    spread over cores.

    Args:
        background: gray level in [0, 1].
    """
    device = next((p.device for group in scene.parameter_groups() for p in group["params"]), torch.device("cpu"))
    views, gray = cameras.to(device), torch.full((1, 3), background, device=device)
    threads, count = torch.get_num_threads(), len(cameras)

    @torch.no_grad()
    def image(i: int) -> Tensor:
        return scene.render(views[i : i + 1], size, gray).rgb[0]

    if threads == 1 or device.type != "cpu":
        yield from map(image, range(count))
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            waiting = deque(pool.submit(image, i) for i in range(min(count, 2 * threads)))
            for i in range(len(waiting), count + len(waiting)):
                rendered = waiting.popleft().result()
                if i < count:
                    waiting.append(pool.submit(image, i))
                yield rendered
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def save_video(path: str | os.PathLike[str], frames: Iterable[Tensor], fps: int = 24) -> None:
    """Writes images [3, H, W] in [0, 1] (a tensor [N, 3, H, W] or any iterable) as an mp4 file, whole or not at all.

    Uses H.264 if the codec is installed, otherwise MPEG-4 part 2. Both need even sizes: the last row or column of an
    odd size is repeated.

    Raises:
        ValueError: for no frames, or frames of different shapes.
    """
    import av

    codec, options = "mpeg4", {"qscale": "3"}
    if "libx264" in av.codecs_available:
        codec, options = "libx264", {"crf": "18"}
    with replacing(path) as draft, _as_os_error(), av.open(str(draft), "w") as container:
        stream, shape = None, torch.Size()
        for frame in frames:
            if stream is None:
                shape = frame.shape
                stream = container.add_stream(codec, rate=fps, options=options)
                stream.height, stream.width = (n + n % 2 for n in shape[1:])
                stream.pix_fmt = "yuv420p"
            if frame.shape != shape or shape[0] != 3:
                raise ValueError(f"frames must all be [3, H, W], got {tuple(frame.shape)} after {tuple(shape)}")
            padded = F.pad(frame[None].float(), (0, shape[2] % 2, 0, shape[1] % 2), mode="replicate")[0]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_bytes(padded).numpy(), format="rgb24")))
        if stream is None:
            raise ValueError("a video needs at least one frame, got none")
        container.mux(stream.encode())


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Errors of the video library as those of the system."""
    from av.error import FFmpegError

    try:
        yield
    except FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


def read_video(path: str | os.PathLike[str], most: int) -> list[Image.Image]:
    """At most `most` evenly spaced frames of a video file, the first one included.

    Raises:
        ValueError: for a file that cannot be read as a video.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            if max(stream.width, stream.height) > MOST_SIZE:
                raise ValueError(
                    f"its frames have {stream.width} x {stream.height} pixels, more than {MOST_SIZE} a side"
                )
            total = stream.frames or sum(1 for _ in container.decode(stream))
            container.seek(0)
            wanted = {i * total // most for i in range(most)}
            found = [f.to_image() for i, f in enumerate(container.decode(stream)) if i in wanted]
    except (FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as a video: {error}") from error
    if not found:
        raise ValueError(f"{os.fspath(path)} cannot be read as a video: it has no frames")
    return found


def turning_webp(images: Sequence[Image.Image], seconds: float = TURN_SECONDS) -> bytes:
    """Square images as an endless animated WebP of at most `TURN_SIZE` pixels a side.

    Args:
        seconds: of one round.
    """
    first, *others = [_at_most(image, TURN_SIZE) for image in images]
    step, file = round(1000 * seconds / len(images)), io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=step, loop=0, quality=70, method=4)
    return file.getvalue()


def still_webp(image: Image.Image) -> bytes:
    """A square image as a WebP of at most `STILL_SIZE` pixels a side."""
    file = io.BytesIO()
    _at_most(image, STILL_SIZE).save(file, "WEBP", quality=80)
    return file.getvalue()


def _at_most(image: Image.Image, largest: int) -> Image.Image:
    from PIL import Image

    side = min(largest, image.width)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def as_image(image: Float[Tensor, "3 h w"]) -> Image.Image:
    """An image in [0, 1] as one of PIL."""
    from PIL import Image

    return Image.fromarray(_bytes(image).numpy())


def contact_sheet(images: Float[Tensor, "n c h w"], columns: int, gap: int = 2) -> Image.Image:
    """Images [N, 3, H, W] in [0, 1] side by side, row by row, with `gap` white pixels between them.

    Raises:
        ValueError: for no images, another shape, or less than one column.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] != 3 or not len(images) or columns < 1:
        raise ValueError(f"a sheet needs images [N, 3, H, W] and columns >= 1, got {tuple(images.shape)}, {columns}")
    n, _, height, width = images.shape
    columns = min(columns, n)
    size = (columns * (width + gap) - gap, -(-n // columns) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        at = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(Image.fromarray(_bytes(image).numpy()), at)
    return sheet


def save_image(path: str | os.PathLike[str], image: Image.Image | Float[Tensor, "3 h w"]) -> None:
    """Writes an image, PIL or a tensor in [0, 1], in the format of the suffix, whole or not at all."""
    if isinstance(image, Tensor):
        image = as_image(image)
    with replacing(path) as draft:
        image.save(draft)


def _bytes(image: Float[Tensor, "3 h w"]) -> UInt8[Tensor, "h w 3"]:
    """An image in [0, 1] as bytes on the CPU, rounded."""
    return (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()

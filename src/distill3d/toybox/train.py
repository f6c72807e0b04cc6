"""Retrains every part of the bundled prior from nothing: `python -m distill3d.toybox.train all --folder DIR`.

The parts, in order: data, clip (the text encoder comes from it), autoencoder, unet, judge (a second contrastive
model on pictures of its own, which the prior never meets), pack. Each continues where it was interrupted.

With `--start WEIGHTS`, a folder in the layout of the bundled prior, the part that is asked for (unet, clip or judge)
goes on from those weights, and what it stands on is taken from them; pack takes what was not trained from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill3d.toybox import networks
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, Claim, random_claim, sentence
from distill3d.toybox.data import Pictures, load_split, render_splits
from distill3d.toybox.fitting import Fit, train

FITS = {
    "clip": Fit(800, 1e-3),
    "judge": Fit(800, 1e-3),
    "eye": Fit(2500, 1e-3),
    "autoencoder": Fit(5000, 1e-3),
    "decoder": Fit(800, 8e-4, warmup=50),
    "unet": Fit(9000, 8e-4, decay=0.4, weight_decay=1e-2),
}
BATCH = {"clip": 128, "judge": 128, "autoencoder": 32, "decoder": 32, "unet": 32}
PROMPT_DROPOUT = 0.1  # share of unconditional rows, for classifier-free guidance
SNR_CAP = 5.0  # min-SNR weighting, arXiv 2303.09556


@contextmanager
def _mixed() -> Iterator[None]:
    """Products in bfloat16, attention as plain products: the fused kernel is several times slower backwards on CPUs."""
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _images(pictures: Pictures, index: Tensor) -> Tensor:
    return torch.from_numpy(pictures.images[index.numpy()]).movedim(-1, 1).float().div_(255)


def _claims(pictures: Pictures, index: Tensor, generator: torch.Generator) -> tuple[list[Claim], list[str]]:
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    rows = pictures.attributes[index.numpy()].tolist()
    claims = [random_claim(kind, color, accent, view, rng) for kind, color, accent, view in rows]
    return claims, [sentence(claim, rng) for claim in claims]


def _degraded(pictures: Pictures, index: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1], mirrored, shifted, part of them blurred and noisy: a judge must read imperfect ones too.

    A mirror changes no word: every toy has a front, but none a left that differs from its right by name.
    """
    images, b = _images(pictures, index), len(index)
    mirrored = torch.rand(b, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[
        :, :, 3 + shift[0] : 67 + shift[0], 3 + shift[1] : 67 + shift[1]
    ]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(b, 1, 1, 1, generator=generator) * (torch.rand(b, 1, 1, 1, generator=generator) < 0.4)
    noise = 0.08 * torch.rand(b, 1, 1, 1, generator=generator) * (torch.rand(b, 1, 1, 1, generator=generator) < 0.4)
    return 2 * (torch.lerp(images, blurred, share) + noise * torch.randn(images.shape, generator=generator)) - 1


def train_clip(name: str, folder: Path, fit: Fit, eye_fit: Fit, start: Any = None) -> Any:
    """Both towers by contrast, then the vision tower alone against the finished texts; from `start` the latter only.

    In the first part a text may fit several pictures of a batch, and all of those are its targets. The second asks
    what a judge is asked: which of all kinds and colors, which accent, which view.
    """
    torch.manual_seed(11 if name == "clip" else 22)
    tokenizer = networks.make_tokenizer(folder / "tokenizer")
    clip = networks.make_clip(tokenizer) if start is None else start
    pictures = load_split(folder / "data", "train" if name == "clip" else "judge")
    attributes = torch.from_numpy(pictures.attributes)

    def contrast(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(attributes), (BATCH[name],), generator=generator)
        claims, texts = _claims(pictures, index, generator)
        said = torch.tensor([[c.kind, c.color, c.accent, c.view] for c in claims])
        fits = ((said[:, None] == attributes[index][None]) | (said[:, None] < 0)).all(-1).float()  # [text, picture]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with _mixed():
            output = clip(input_ids=tokens, pixel_values=_degraded(pictures, index, generator))
        logits = output.logits_per_text.float()
        by_text = -(F.log_softmax(logits, 1) * fits / fits.sum(1, keepdim=True)).sum(1).mean()
        by_picture = -(F.log_softmax(logits, 0) * fits / fits.sum(0, keepdim=True).clamp_min(1)).sum(0).mean()
        return 0.5 * (by_text + by_picture)

    if start is None:
        train(name, clip, fit, contrast, folder)
    pairs, accents, views = _answers(clip, tokenizer)
    clip.text_model.requires_grad_(False)
    clip.text_projection.requires_grad_(False)
    clip.logit_scale.requires_grad_(False)
    scale = clip.logit_scale.exp()

    def examine(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(attributes), (BATCH[name],), generator=generator)
        kind, color, accent, view = attributes[index].T
        pixels = _degraded(pictures, index, generator)
        with _mixed():
            pooled = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        seen = scale * F.normalize(pooled.float(), dim=-1)
        pair = kind * len(COLOR_NAMES) + color
        which_accent = torch.einsum("bd,bod->bo", seen, accents[pair])
        which_view = torch.einsum("bd,bod->bo", seen, views[pair])
        losses = (
            F.cross_entropy(seen @ pairs.T, pair),
            F.cross_entropy(which_accent, accent),
            F.cross_entropy(which_view, view),
        )
        return losses[0] + 0.5 * losses[1] + losses[2]

    return train(f"{name}-eye", clip, eye_fit, examine, folder)


@torch.no_grad()
def _answers(clip: Any, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of the plain sentences: pairs [P, D], with each accent [P, 10, D], with each view [P, 4, D]."""

    def embed(claims: list[Claim]) -> Tensor:
        texts = [sentence(claim) for claim in claims]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        out = torch.cat([clip.text_model(input_ids=part).pooler_output for part in tokens.split(256)])
        return F.normalize(clip.text_projection(out), dim=-1)

    pairs = [(k, c) for k in range(len(KIND_NAMES)) for c in range(len(COLOR_NAMES))]
    accents = embed([Claim(k, c, accent=a) for k, c in pairs for a in range(len(COLOR_NAMES))])
    views = embed([Claim(k, c, view=v) for k, c in pairs for v in range(len(VIEW_WORDS))])
    return (
        embed([Claim(*p) for p in pairs]),
        accents.unflatten(0, (len(pairs), -1)),
        views.unflatten(0, (len(pairs), -1)),
    )


def _picture_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute difference of the pictures and of their gradients, plus a squared term that PSNR asks for."""
    difference = output - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + 0.5 * edges + 5 * difference.square().mean()


def train_autoencoder(folder: Path, fit: Fit, decoder_fit: Fit) -> Any:
    """Encoder and decoder together, then the latents are whitened, then the decoder alone."""
    torch.manual_seed(33)
    autoencoder = networks.make_autoencoder().to(memory_format=torch.channels_last)
    pictures = load_split(folder / "data", "train")

    def drawn(count: int, generator: torch.Generator) -> Tensor:
        return _images(pictures, torch.randint(len(pictures.images), (count,), generator=generator)) * 2 - 1

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        images = drawn(BATCH["autoencoder"], generator)
        images = images.contiguous(memory_format=torch.channels_last)
        with _mixed():
            latents = autoencoder.encode(images).latents.float()
            # Noise of a twentieth of the spread makes neighboring latents decode to neighboring pictures.
            noisy = latents + 0.05 * latents.detach().std() * torch.randn(latents.shape, generator=generator)
            output = autoencoder.decode(noisy).sample.float()
        return _picture_loss(output, images) + 1e-3 * (latents.square().mean() - 1).square()

    train("autoencoder", autoencoder, fit, loss_of, folder)
    with torch.no_grad():
        sample = torch.cat(
            [autoencoder.encode(_images(pictures, i) * 2 - 1).latents for i in torch.arange(4096).split(256)]
        )
    networks.normalize_latents(autoencoder, sample)
    autoencoder.encoder.requires_grad_(False)

    def decoder_loss(step: int, generator: torch.Generator) -> Tensor:
        images = drawn(BATCH["decoder"], generator)
        with _mixed():
            with torch.no_grad():
                latents = autoencoder.encode(images).latents.float()
                latents += 0.05 * torch.randn(latents.shape, generator=generator)
            output = autoencoder.decode(latents.contiguous(memory_format=torch.channels_last)).sample.float()
        return _picture_loss(output, images)

    return train("decoder", autoencoder, decoder_fit, decoder_loss, folder)


@torch.no_grad()
def encode_all(autoencoder: Any, pictures: Pictures) -> Tensor:
    """Latents of all pictures, half precision."""
    parts = torch.arange(len(pictures.images)).split(256)
    return torch.cat([autoencoder.encode(_images(pictures, i) * 2 - 1).latents.half() for i in parts])


def train_unet(folder: Path, fit: Fit, autoencoder: Any, clip: Any, start: Any = None, fast: bool = False) -> Any:
    """Noise prediction on latents of the training pictures, conditioned by the frozen text tower.

    `start` is a UNet to go on from; `fast` compiles the network, which takes minutes first.
    """
    torch.manual_seed(44)
    tokenizer = networks.make_tokenizer(folder / "tokenizer")
    pictures = load_split(folder / "data", "train")
    latents = encode_all(autoencoder, pictures)
    unet = (networks.make_unet() if start is None else start).to(memory_format=torch.channels_last)
    call = torch.compile(unet) if fast else unet
    alphas = networks.make_scheduler().alphas_cumprod
    weight = (alphas / (1 - alphas)).clamp_max(SNR_CAP) * (1 - alphas) / alphas

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        b = BATCH["unet"]
        index = torch.randint(len(latents), (b,), generator=generator)
        _, texts = _claims(pictures, index, generator)
        dropped = torch.rand(b, generator=generator) < PROMPT_DROPOUT
        texts = ["" if d else text for d, text in zip(dropped.tolist(), texts, strict=True)]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        t = (1000 * (torch.arange(b) + torch.rand(b, generator=generator)) / b).long()  # stratified
        noise = torch.randn(b, *latents.shape[1:], generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents[index].float() + (1 - a).sqrt() * noise
        with torch.no_grad():
            hidden = clip.text_model(input_ids=tokens).last_hidden_state
        with _mixed():
            output = call(noisy.contiguous(memory_format=torch.channels_last), t, encoder_hidden_states=hidden).sample
        return (weight[t] * (output.float() - noise).square().mean((1, 2, 3))).mean()

    return train("unet", unet, fit, loss_of, folder)


def pack(folder: Path, clip: Any, autoencoder: Any, unet: Any, judge: Any) -> Path:
    """Writes the parts in half precision, in Stable Diffusion format, to `folder`/toybox."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict(), strict=False)
    tokenizer = networks.make_tokenizer(folder / "tokenizer")
    build: Any = StableDiffusionPipeline  # the parts that are None may be
    pipeline = build(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=networks.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    target = folder / "toybox"
    shutil.rmtree(target, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(target)
    # Keys that diffusers writes: where a part came from, and one that it warns of when it reads it back.
    for part, keys in {"vae": ("_name_or_path", "block_out_channels"), "unet": ("_name_or_path",)}.items():
        file = target / part / "config.json"
        kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in keys}
        file.write_text(json.dumps(kept, indent=2))
    for name, model in (("evaluator_clip", clip), ("evaluator_judge", judge)):
        model.half().save_pretrained(target / name)
        tokenizer.save_pretrained(target / name)
    return target


def read_parts(weights: Path) -> dict[str, Any]:
    """The parts of a folder that `pack` wrote, in float32."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPModel

    def read(kind: Any, part: str) -> Any:
        return kind.from_pretrained(weights / part, local_files_only=True).float().eval()

    return {
        "clip": read(CLIPModel, "evaluator_clip"),
        "autoencoder": read(AutoencoderTiny, "vae"),
        "unet": read(UNet2DConditionModel, "unet"),
        "judge": read(CLIPModel, "evaluator_judge"),
    }


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["data", "clip", "judge", "autoencoder", "unet", "pack", "all"])
    parser.add_argument("--folder", type=Path, default=Path("toybox-training"), help="pictures and training state")
    parser.add_argument("--processes", type=int, default=2, help="rendering processes")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--compile", action="store_true", help="compile the UNet: its steps take a fifth less time")
    arguments = parser.parse_args()
    folder, part = arguments.folder, arguments.part
    if arguments.start and part not in ("clip", "judge", "unet", "pack"):
        parser.error(f"--start goes with clip, judge, unet or pack, not with {part}")
    if arguments.start and not (arguments.start / "evaluator_clip").is_dir():  # it is not in the wheel
        parser.error(f"{arguments.start} has no evaluator_clip: take the weights from a clone of the repository")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    fits = {k: Fit(**(vars(f) | dict(steps=max(1, round(f.steps * arguments.scale))))) for k, f in FITS.items()}
    if part in ("data", "all"):
        render_splits(folder / "data", arguments.processes)
    made = read_parts(arguments.start) if arguments.start else {}
    for name in _to_train(part, folder, bool(made)):  # what is already trained is only read
        start = made.get(name)
        if name in ("clip", "judge"):
            made[name] = train_clip(name, folder, fits[name], fits["eye"], start)
        elif name == "autoencoder":
            made[name] = train_autoencoder(folder, fits[name], fits["decoder"])
        elif name == "unet":
            made[name] = train_unet(folder, fits[name], made["autoencoder"], made["clip"], start, arguments.compile)
    if part in ("pack", "all"):
        print(pack(folder, made["clip"], made["autoencoder"], made["unet"], made["judge"]))


def _to_train(part: str, folder: Path, started: bool) -> tuple[str, ...]:
    """Which parts a command goes through, in order."""
    if part == "data":
        return ()
    if started:
        states = {"clip": "clip-eye.pt", "unet": "unet.pt", "judge": "judge-eye.pt"}
        return tuple(n for n, file in states.items() if (folder / file).exists()) if part == "pack" else (part,)
    if part in ("all", "pack"):
        return ("clip", "autoencoder", "unet", "judge")
    return ("clip", "autoencoder", "unet") if part == "unet" else (part,)


if __name__ == "__main__":
    main()

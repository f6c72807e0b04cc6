"""Trains the bundled prior from scratch: `python -m distill3d.toybox.train all --folder DIR`.

The parts, in order: data, clip (with the text encoder), autoencoder, unet, judge (a second contrastive model, trained
on other images than the prior), pack. Each resumes where it was interrupted. Another part, multiview, fine-tunes the
bundled UNet to a multi-view prior and packs it; critic trains the classifier that rejects bad objects, on the same
images.

`--start WEIGHTS` gives a folder like that of the bundled prior: unet, clip or judge is trained further from these
weights and takes the other networks that it needs from them; pack takes from them the networks that were not trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.toybox import critic, multiview, networks
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, Claim, random_claim, sentence
from distill3d.toybox.data import ImageSet, load_split, render_splits
from distill3d.toybox.fitting import Fit, mixed_precision, train

FITS = {
    "clip": Fit(800, 1e-3),
    "judge": Fit(800, 1e-3),
    "vision": Fit(2500, 1e-3),
    "autoencoder": Fit(5000, 1e-3),
    "decoder": Fit(800, 8e-4, warmup=50),
    "unet": Fit(9000, 8e-4, decay=0.4, weight_decay=1e-2),
    "multiview": Fit(4600, 6e-4, decay=0.5, ema=0.998, weight_decay=1e-2, save_every=100),
    "matting": Fit(900, 1.5e-3, warmup=50, decay=0.5, ema=0.995, save_every=50),
    "critic": Fit(3000, 1.5e-3, warmup=20, decay=0.6, ema=0.98, save_every=50),
}
BATCH = {"clip": 128, "judge": 128, "autoencoder": 32, "decoder": 32, "unet": 32}
PROMPT_DROPOUT = 0.1  # fraction of rows without a caption, for classifier-free guidance
SNR_CAP = 5.0  # min-SNR weighting, arXiv 2303.09556


def _images(data: ImageSet, index: Tensor) -> Tensor:
    return torch.from_numpy(data.images[index.numpy()]).movedim(-1, 1).float().div_(255)


def _claims(data: ImageSet, index: Tensor, generator: torch.Generator) -> tuple[list[Claim], list[str]]:
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    rows = data.attributes[index.numpy()].tolist()
    claims = [random_claim(kind, color, accent, view, rng) for kind, color, accent, view in rows]
    return claims, [sentence(claim, rng) for claim in claims]


def _augmented(data: ImageSet, index: Tensor, generator: torch.Generator) -> Tensor:
    """Images in [-1, 1] with random flips and a shift, some with blur and noise, as in imperfect samples.

    No caption distinguishes left from right, so flipped images keep their captions.
    """
    images, b = _images(data, index), len(index)
    flipped = torch.rand(b, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flipped, images.flip(-1), images)
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[
        :, :, 3 + shift[0] : 67 + shift[0], 3 + shift[1] : 67 + shift[1]
    ]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand(b, 1, 1, 1, generator=generator) * (torch.rand(b, 1, 1, 1, generator=generator) < 0.4)
    noise = 0.08 * torch.rand(b, 1, 1, 1, generator=generator) * (torch.rand(b, 1, 1, 1, generator=generator) < 0.4)
    return 2 * (torch.lerp(images, blurred, blur) + noise * torch.randn(images.shape, generator=generator)) - 1


def train_clip(name: str, folder: Path, fit: Fit, vision_fit: Fit, start: Any = None) -> Any:
    """Trains a CLIP model in two stages: contrastive, then its vision model alone as a classifier.

    In the contrastive stage, all images of a batch that a text describes are its targets. In the second stage, the text
    embeddings are fixed, and the vision model classifies kind and color, accent, and view. With `start`, only the
    second stage runs, from that model.
    """
    torch.manual_seed(11 if name == "clip" else 22)
    tokenizer = networks.make_tokenizer(folder / "tokenizer")
    clip = networks.make_clip(tokenizer) if start is None else start
    data = load_split(folder / "data", "train" if name == "clip" else "judge")
    attributes = torch.from_numpy(data.attributes)

    def contrastive_loss(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(attributes), (BATCH[name],), generator=generator)
        claims, texts = _claims(data, index, generator)
        stated = torch.tensor([[c.kind, c.color, c.accent, c.view] for c in claims])
        matches = (
            ((stated[:, None] == attributes[index][None]) | (stated[:, None] < 0)).all(-1).float()
        )  # [text, image]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with mixed_precision():
            output = clip(input_ids=tokens, pixel_values=_augmented(data, index, generator))
        logits = output.logits_per_text.float()
        by_text = -(F.log_softmax(logits, 1) * matches / matches.sum(1, keepdim=True)).sum(1).mean()
        by_image = -(F.log_softmax(logits, 0) * matches / matches.sum(0, keepdim=True).clamp_min(1)).sum(0).mean()
        return 0.5 * (by_text + by_image)

    if start is None:
        train(name, clip, fit, contrastive_loss, folder)
    pairs, accents, views = _class_embeddings(clip, tokenizer)
    clip.text_model.requires_grad_(False)
    clip.text_projection.requires_grad_(False)
    clip.logit_scale.requires_grad_(False)
    scale = clip.logit_scale.exp()

    def classification_loss(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(attributes), (BATCH[name],), generator=generator)
        kind, color, accent, view = attributes[index].T
        pixels = _augmented(data, index, generator)
        with mixed_precision():
            pooled = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        embedded = scale * F.normalize(pooled.float(), dim=-1)
        pair = kind * len(COLOR_NAMES) + color
        accent_logits = torch.einsum("bd,bod->bo", embedded, accents[pair])
        view_logits = torch.einsum("bd,bod->bo", embedded, views[pair])
        losses = (
            F.cross_entropy(embedded @ pairs.T, pair),
            F.cross_entropy(accent_logits, accent),
            F.cross_entropy(view_logits, view),
        )
        return losses[0] + 0.5 * losses[1] + losses[2]

    return train(f"{name}-eye", clip, vision_fit, classification_loss, folder)


@torch.no_grad()
def _class_embeddings(clip: Any, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of the plain captions: pairs [P, D], with each accent [P, 10, D], with each view [P, 4, D]."""

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


def _image_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 loss of the images and of their gradients, plus a squared error, which PSNR measures."""
    difference = output - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + 0.5 * edges + 5 * difference.square().mean()


def train_autoencoder(folder: Path, fit: Fit, decoder_fit: Fit) -> Any:
    """Trains encoder and decoder, whitens the latents, then trains the decoder alone."""
    torch.manual_seed(33)
    autoencoder = networks.make_autoencoder().to(memory_format=torch.channels_last)
    data = load_split(folder / "data", "train")

    def random_images(count: int, generator: torch.Generator) -> Tensor:
        return _images(data, torch.randint(len(data.images), (count,), generator=generator)) * 2 - 1

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        images = random_images(BATCH["autoencoder"], generator)
        images = images.contiguous(memory_format=torch.channels_last)
        with mixed_precision():
            latents = autoencoder.encode(images).latents.float()
            # Noise makes the decoder smooth: similar latents decode to similar images.
            noisy = latents + 0.05 * latents.detach().std() * torch.randn(latents.shape, generator=generator)
            output = autoencoder.decode(noisy).sample.float()
        return _image_loss(output, images) + 1e-3 * (latents.square().mean() - 1).square()

    train("autoencoder", autoencoder, fit, loss_of, folder)
    with torch.no_grad():
        sample = torch.cat(
            [autoencoder.encode(_images(data, i) * 2 - 1).latents for i in torch.arange(4096).split(256)]
        )
    networks.normalize_latents(autoencoder, sample)
    autoencoder.encoder.requires_grad_(False)

    def decoder_loss(step: int, generator: torch.Generator) -> Tensor:
        images = random_images(BATCH["decoder"], generator)
        with mixed_precision():
            with torch.no_grad():
                latents = autoencoder.encode(images).latents.float()
                latents += 0.05 * torch.randn(latents.shape, generator=generator)
            output = autoencoder.decode(latents.contiguous(memory_format=torch.channels_last)).sample.float()
        return _image_loss(output, images)

    return train("decoder", autoencoder, decoder_fit, decoder_loss, folder)


@torch.no_grad()
def encode_all(autoencoder: Any, data: ImageSet) -> Tensor:
    """Latents of all images, in half precision."""
    parts = torch.arange(len(data.images)).split(256)
    return torch.cat([autoencoder.encode(_images(data, i) * 2 - 1).latents.half() for i in parts])


def train_unet(
    folder: Path, fit: Fit, autoencoder: Any, clip: Any, start: Any = None, compile_unet: bool = False
) -> Any:
    """Trains noise prediction on the latents of the training images, conditioned on the frozen text encoder.

    `start` is a UNet to train further; `compile_unet` makes steps faster after minutes of compilation.
    """
    torch.manual_seed(44)
    tokenizer = networks.make_tokenizer(folder / "tokenizer")
    data = load_split(folder / "data", "train")
    latents = encode_all(autoencoder, data)
    unet = (networks.make_unet() if start is None else start).to(memory_format=torch.channels_last)
    call = torch.compile(unet) if compile_unet else unet
    alphas = networks.make_scheduler().alphas_cumprod
    weight = (alphas / (1 - alphas)).clamp_max(SNR_CAP) * (1 - alphas) / alphas

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        b = BATCH["unet"]
        index = torch.randint(len(latents), (b,), generator=generator)
        _, texts = _claims(data, index, generator)
        dropped = torch.rand(b, generator=generator) < PROMPT_DROPOUT
        texts = ["" if d else text for d, text in zip(dropped.tolist(), texts, strict=True)]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        t = (1000 * (torch.arange(b) + torch.rand(b, generator=generator)) / b).long()  # stratified
        noise = torch.randn(b, *latents.shape[1:], generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents[index].float() + (1 - a).sqrt() * noise
        with torch.no_grad():
            hidden = clip.text_model(input_ids=tokens).last_hidden_state
        with mixed_precision():
            output = call(noisy.contiguous(memory_format=torch.channels_last), t, encoder_hidden_states=hidden).sample
        return (weight[t] * (output.float() - noise).square().mean((1, 2, 3))).mean()

    return train("unet", unet, fit, loss_of, folder)


def pack(folder: Path, clip: Any, autoencoder: Any, unet: Any, judge: Any) -> Path:
    """Writes the networks to `folder`/toybox in the format of Stable Diffusion, in half precision."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict(), strict=False)
    tokenizer = networks.make_tokenizer(folder / "tokenizer")
    build: Any = StableDiffusionPipeline  # its annotations do not allow None
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
    # diffusers writes local paths, and a key that it warns of when it reads it.
    for part, keys in {"vae": ("_name_or_path", "block_out_channels"), "unet": ("_name_or_path",)}.items():
        file = target / part / "config.json"
        kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in keys}
        file.write_text(json.dumps(kept, indent=2, allow_nan=False))
    for name, model in (("evaluator_clip", clip), ("evaluator_judge", judge)):
        model.half().save_pretrained(target / name)
        tokenizer.save_pretrained(target / name)
    return target


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", choices=["data", "clip", "judge", "autoencoder", "unet", "pack", "multiview", "critic", "all"]
    )
    parser.add_argument("--folder", type=Path, default=Path("toybox-training"), help="images and training state")
    parser.add_argument("--processes", type=int, default=2, help="rendering processes")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the training steps of each network")
    parser.add_argument("--start", type=Path, help="folder of weights to start from")
    parser.add_argument("--compile", action="store_true", help="compile the UNet: its steps take 20 percent less time")
    arguments = parser.parse_args()
    folder, part = arguments.folder, arguments.part
    if arguments.start and part not in ("clip", "judge", "unet", "pack", "multiview"):
        parser.error(f"--start goes with clip, judge, unet, pack or multiview, not with {part}")
    weights = multiview.BUNDLED if part in ("multiview", "critic") else arguments.start
    if weights and not (weights / "evaluator_clip").is_dir():  # it is not in the wheel
        parser.error(f"{weights} has no evaluator_clip: take the weights from a clone of the repository")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    fits = {k: Fit(**(vars(f) | dict(steps=max(1, round(f.steps * arguments.scale))))) for k, f in FITS.items()}
    if part == "multiview":
        print(
            multiview.run(folder, fits[part], fits["matting"], arguments.start, arguments.processes, arguments.compile)
        )
        return
    if part == "critic":
        print(critic.run(folder, fits[part], arguments.processes))
        return
    if part in ("data", "all"):
        render_splits(folder / "data", arguments.processes)
    trained = networks.read_parts(arguments.start) if arguments.start else {}
    for name in _to_train(part, folder, bool(trained)):  # finished networks are only read from the folder
        start = trained.get(name)
        if name in ("clip", "judge"):
            trained[name] = train_clip(name, folder, fits[name], fits["vision"], start)
        elif name == "autoencoder":
            trained[name] = train_autoencoder(folder, fits[name], fits["decoder"])
        elif name == "unet":
            trained[name] = train_unet(
                folder, fits[name], trained["autoencoder"], trained["clip"], start, arguments.compile
            )
    if part in ("pack", "all"):
        print(pack(folder, trained["clip"], trained["autoencoder"], trained["unet"], trained["judge"]))


def _to_train(part: str, folder: Path, started: bool) -> tuple[str, ...]:
    """The networks that a command trains, in order."""
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

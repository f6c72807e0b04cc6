"""The model families that are known, and whether a folder holds a whole one of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distill3d.priors import deepfloyd as pixel
from distill3d.priors import flow, multiview, sdxl
from distill3d.priors import stable_diffusion as latent
from distill3d.priors.base import FrozenPrior
from distill3d.priors.components.folder import check_weights, config_name, read_json
from distill3d.priors.options import Setup


@dataclass(frozen=True)
class Family:
    """What a pipeline class of diffusers means here."""

    build: Callable[[Setup], FrozenPrior]
    parts: Mapping[str, tuple[str, ...]]  # the classes that are supported for each
    scheduler: str  # how its class name starts
    lora: str  # the class of diffusers that reads its LoRA files
    optional: tuple[str, ...] = ()


VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
DISCRETE, STRAIGHT = "", "FlowMatch"
FAMILIES = {
    "StableDiffusionPipeline": Family(multiview.build, latent.PARTS, DISCRETE, "StableDiffusionLoraLoaderMixin"),
    "StableDiffusionXLPipeline": Family(sdxl.build, sdxl.PARTS, DISCRETE, "StableDiffusionXLLoraLoaderMixin"),
    "IFPipeline": Family(pixel.build, pixel.PARTS, DISCRETE, "StableDiffusionLoraLoaderMixin"),
    "StableDiffusion3Pipeline": Family(
        flow.build_sd3, flow.SD3_PARTS, STRAIGHT, "SD3LoraLoaderMixin", flow.SD3_OPTIONAL
    ),
    "FluxPipeline": Family(flow.build_flux, flow.FLUX_PARTS, STRAIGHT, "FluxLoraLoaderMixin"),
}
# Pipelines that a user may well have, and why they are none of the above.
WHY_NOT = {
    "PixArt": "its texts carry a mask of their padding, which a prior does not pass on",
    "Sana": "its texts carry a mask of their padding, which a prior does not pass on",
    "MVDream": "its network has a class of its own; save it as docs/priors.md says of models of several views",
    "ImageDream": "it is told a picture beside the text",
    "StableDiffusionXLImg2Img": "a refiner knows low noise only; give the base model",
    "IFSuperResolution": "a later stage is told a picture; give the first stage",
    "Inpaint": "it is told a picture and a mask; give a text-to-image model",
    "ControlNet": "give the model without it, and the ControlNet's folder with --controlnet",
    "LatentConsistency": "it was distilled to a few steps and has no path that could be walked back",
}


def check_folder(folder: Path, weights: bool = True) -> Family:
    """The family of a folder; raises ValueError unless it holds a complete, undamaged model of a known one.

    Reads the headers of the weight files only, so that it costs nothing beside loading them; without `weights`
    they need not be there. Raises ImportError with the command to type if a vocabulary needs a package that is
    not installed.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json: give a folder saved with save_pretrained of diffusers")
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        reason = next((f" ({why})" for part, why in WHY_NOT.items() if part in str(kind)), "")
        raise ValueError(f"{folder} holds a {kind}{reason}: supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for part in (*family.parts, "scheduler"):
        entry = index.get(part)
        if part in family.optional and (entry is None or entry == [None, None]):
            continue
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None or not (folder / part).is_dir():
            raise ValueError(f"{folder} lacks its part {part!r}: download or save the model again")
        if part in family.parts and entry[1] not in family.parts[part]:
            raise ValueError(f"{folder}: {part} is a {entry[1]}, supported is {' or '.join(family.parts[part])}")
        config = folder / part / config_name(part)
        if not config.is_file():
            raise ValueError(f"{folder} lacks {part}/{config.name}: download or save the model again")
        read_json(config)
        if part.startswith("tokenizer"):
            _check_vocabulary(folder / part)
        if weights and part != "scheduler" and not part.startswith("tokenizer"):
            check_weights(folder / part)
    _check_scheduler(folder, index["scheduler"][1], family.scheduler)
    return family


def _check_vocabulary(folder: Path) -> None:
    # transformers makes a tokenizer of no words where these are missing.
    if not any(all((folder / file).is_file() for file in files) for files in VOCABULARIES):
        allowed = ", or ".join(" and ".join(files) for files in VOCABULARIES)
        raise ValueError(f"{folder} has no vocabulary ({allowed}): download or save the model again")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        try:
            for package in ("sentencepiece", "google.protobuf"):
                importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"{folder} needs sentencepiece and protobuf: type  pip install 'distill3d[t5]'"
            ) from error


def _check_scheduler(folder: Path, name: str, start: str) -> None:
    # EDM's schedulers scale what the network sees; those of flow matching and of tables do not mix.
    if name.startswith("EDM") or not name.startswith(start) or (start == DISCRETE and name.startswith(STRAIGHT)):
        wanted = "one for flow matching (FlowMatch...)" if start else "one with a table of betas (DDIM, PNDM, Euler...)"
        raise ValueError(f"{folder}: scheduler is a {name}, supported is {wanted}")

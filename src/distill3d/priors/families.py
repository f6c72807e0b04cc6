"""The supported model families, and whether a folder contains a complete model of one of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distill3d.priors import deepfloyd, flow, mvdream, stable_diffusion
from distill3d.priors.base import FrozenPrior
from distill3d.priors.components.folder import LIBRARIES, check_settings, check_weights, config_name, read_json
from distill3d.priors.options import PriorBuilder


@dataclass(frozen=True)
class Family:
    """How a pipeline class of diffusers becomes a prior."""

    build: Callable[[PriorBuilder], FrozenPrior]
    components: Mapping[str, tuple[str, ...]]  # the supported classes of each
    lora: str  # the class of diffusers that reads its LoRA files
    flow_matching: bool = False  # whether its scheduler is one for flow matching, rather than one with a table of betas
    optional: tuple[str, ...] = ()  # components that may be missing


FAMILIES = {
    "StableDiffusionPipeline": Family(
        stable_diffusion.build_stable_diffusion, stable_diffusion.COMPONENTS, "StableDiffusionLoraLoaderMixin"
    ),
    "StableDiffusionXLPipeline": Family(
        stable_diffusion.build_sdxl, stable_diffusion.SDXL_COMPONENTS, "StableDiffusionXLLoraLoaderMixin"
    ),
    "MVDreamPipeline": Family(
        mvdream.build, mvdream.COMPONENTS, "StableDiffusionLoraLoaderMixin", optional=(mvdream.CAMERA,)
    ),
    "IFPipeline": Family(deepfloyd.build, deepfloyd.COMPONENTS, "StableDiffusionLoraLoaderMixin"),
    "StableDiffusion3Pipeline": Family(
        flow.build_sd3, flow.SD3_COMPONENTS, "SD3LoraLoaderMixin", flow_matching=True, optional=flow.SD3_OPTIONAL
    ),
    "FluxPipeline": Family(flow.build_flux, flow.FLUX_COMPONENTS, "FluxLoraLoaderMixin", flow_matching=True),
}
# Parts of pipeline names that users may well have, and why they are not supported.
UNSUPPORTED = {
    "PixArt": "its networks need a mask of the text's padding, which priors do not pass on",
    "Sana": "its networks need a mask of the text's padding, which priors do not pass on",
    "ImageDream": "it needs an image besides the text",
    "StableDiffusionXLImg2Img": "a refiner is trained on low noise levels only; use the base model",
    "IFSuperResolution": "a later stage needs an image; use the first stage",
    "Inpaint": "it needs an image and a mask; use a text-to-image model",
    "ControlNet": "use the model without it, and pass the ControlNet's folder as --controlnet",
    "LatentConsistency": "it is distilled to a few steps, so its sampling path cannot be inverted",
}
FEW_STEPS = ("LCM", "TCD")  # schedulers of models that were distilled to a few steps
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


def check_folder(folder: Path, weights: bool = True) -> Family:
    """The family of a folder; raises ValueError unless it contains a complete, undamaged model of a supported one.

    Reads only the headers of the weight files, which takes no time compared to loading them; without `weights` they
    need not be there. Raises ImportError with the command to type if a vocabulary needs a missing package.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json: use a folder saved with save_pretrained of diffusers")
    index = read_json(folder / "model_index.json")
    pipeline = "MVDreamPipeline" if mvdream.is_mvdream(index) else index.get("_class_name")
    if pipeline not in FAMILIES:
        reason = next((f" ({why})" for name, why in UNSUPPORTED.items() if name in str(pipeline)), "")
        raise ValueError(f"{folder} contains a {pipeline}{reason}: supported are {', '.join(FAMILIES)}")
    family = FAMILIES[pipeline]
    for component in (*family.components, "scheduler"):
        entry = index.get(component)
        if component in family.optional and (entry is None or entry == [None, None]):
            continue
        missing = ValueError(f"{folder} has no {component!r}: download or save the model again")
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise missing
        if not (folder / component).is_dir():
            raise missing
        own = pipeline == "MVDreamPipeline" and component in (mvdream.CAMERA, "unet")  # read here, never imported
        if not own and entry[0] not in LIBRARIES:
            raise ValueError(f"{folder}: {component} is of {entry[0]!r}; supported is {' or '.join(LIBRARIES)}")
        supported = family.components.get(component)
        if supported and entry[1] not in supported:
            raise ValueError(f"{folder}: {component} is a {entry[1]}, supported is {' or '.join(supported)}")
        config = folder / component / config_name(component)
        if not config.is_file():
            raise ValueError(f"{folder} has no {component}/{config.name}: download or save the model again")
        check_settings(config.parent)
        if component.startswith("tokenizer"):
            _check_vocabulary(folder / component)
        elif weights and component != "scheduler":
            check_weights(folder / component)
    _check_scheduler(folder, index["scheduler"][1], family.flow_matching)
    return family


def _check_vocabulary(folder: Path) -> None:
    # Without these files transformers makes a tokenizer with an empty vocabulary.
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


def _check_scheduler(folder: Path, name: str, flow_matching: bool) -> None:
    if name.startswith(FEW_STEPS):
        raise ValueError(f"{folder}: scheduler is a {name}: {UNSUPPORTED['LatentConsistency']}")
    # The schedulers of EDM also scale the input of the network, which priors do not.
    if name.startswith("EDM") or name.startswith("FlowMatch") != flow_matching or not name.endswith("Scheduler"):
        kinds = ("one with a table of betas (DDIM, PNDM, Euler...)", "one for flow matching (FlowMatch...)")
        raise ValueError(f"{folder}: scheduler is a {name}, supported is {kinds[flow_matching]}")

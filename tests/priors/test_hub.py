"""Names, the local cache of the hub, and the download size. No network: the answers of the hub are put in its place."""

import errno
import shutil
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from distill3d.priors import load_prior
from distill3d.priors.components import hub

NAMES = "toybox, toybox-mv, sd15, sd21, sd21-v, mvdream, mvdream15, sdxl, if, sd35, flux"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def fails(name, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        hub.resolve(name, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and put(hub_id, folder): a snapshot in it, laid out as huggingface_hub does."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def put(hub_id, folder):
        home = tmp_path / f"models--{hub_id.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(REVISION)
        for file in folder.rglob("*"):
            if file.is_file():
                link = home / "snapshots" / REVISION / file.relative_to(folder)
                blob = home / "blobs" / str(abs(hash(str(link))))
                link.parent.mkdir(parents=True, exist_ok=True)
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(file, blob)
                link.symlink_to(blob)

    return put


@pytest.fixture
def hub_answers(monkeypatch):
    """hub_answers(answer): sets its answer about a repository, an exception or {file: size}."""

    def say(answer):
        def model_info(self, repo_id, **options):
            if isinstance(answer, Exception):
                raise answer
            files = [SimpleNamespace(rfilename=name, size=size) for name, size in answer.items()]
            return SimpleNamespace(siblings=files)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    return say


def test_short_names_are_hub_ids_that_were_not_withdrawn():
    assert set(hub.BUNDLED) | set(hub.SHORT_NAMES) == set(NAMES.split(", "))
    for hub_id in hub.SHORT_NAMES.values():
        assert hub.HUB_ID.fullmatch(hub_id) and hub_id not in hub.WITHDRAWN
    assert set(hub.WITHDRAWN.values()) <= set(hub.SHORT_NAMES)


def test_unknown_and_withdrawn_names(cache):
    fails("sdx", "unknown prior 'sdx': use " + NAMES + ", an existing")
    fails("./nothing/here", "unknown prior")
    fails("stabilityai/stable-diffusion-2-1-base", "was withdrawn from the hub: use sd21")


@pytest.mark.parametrize("name", ["sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_a_snapshot_in_the_cache_is_loaded_offline(cache, monkeypatch, kl_folder, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.cached(name) is None
    fails(name, "is not in the local cache, and offline mode is set: connect once to download it, or use a folder")
    cache(hub.SHORT_NAMES["sd15"], kl_folder)
    assert hub.cached(name) == hub.resolve(name)
    prior = load_prior(name)
    assert prior.name == name and prior.sample_shape == (4, 8, 8)
    ours, theirs = (
        p.predict(torch.ones(1, 4, 8, 8), torch.tensor([0.5]), p.embed(["cat"])) for p in (prior, load_prior(kl_folder))
    )
    assert torch.equal(ours, theirs)


def test_an_unreachable_hub_does_not_hide_what_is_in_the_cache(cache, monkeypatch, kl_folder):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    fails("somebody/toy", "is not in the local cache, and the hub cannot be reached")
    cache("somebody/toy", kl_folder)
    assert hub.resolve("somebody/toy") == hub.cached("somebody/toy")


def test_one_network_in_the_cache_is_found_too(cache, monkeypatch, kl_folder):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    cache("madebyollin/taesd", kl_folder / "vae")
    assert hub.resolve("madebyollin/taesd", "autoencoder") == hub.cached("madebyollin/taesd")


def test_a_short_name_is_no_folder_that_happens_to_lie_here(cache, monkeypatch, kl_folder, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kl_folder, tmp_path / "if")
    fails("if", "DeepFloyd/IF-I-XL-v1.0 is not in the local cache")
    assert hub.resolve("./if").is_dir()


def test_a_full_disk_is_not_a_missing_network(cache, hub_answers):
    hub_answers(OSError(errno.ENOSPC, "No space left on device"))
    fails(
        "sdxl",
        "cannot be saved in the local cache: No space left on device; free space there, or choose another folder",
    )


def test_a_withdrawn_model_that_is_still_in_the_cache_is_used(cache, kl_folder):
    cache("runwayml/stable-diffusion-v1-5", kl_folder)
    assert hub.resolve("runwayml/stable-diffusion-v1-5").name == REVISION


def test_answers_of_the_hub_are_distinguished(cache, hub_answers):
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    hub_answers(errors.GatedRepoError("gated", response=response))
    fails("sd35", "stable-diffusion-3.5-medium is gated: accept its terms on the hub, then type  hf auth login")
    hub_answers(errors.RepositoryNotFoundError("gone", response=response))
    fails("nobody/nothing", "neither a local folder nor a repository on the hub")
    hub_answers(KeyError("a bug"))
    with pytest.raises(KeyError):
        hub.resolve("nobody/nothing")


def test_nothing_is_downloaded_before_its_size_is_printed(cache, hub_answers, monkeypatch, capsys, kl_folder):
    weights, large = "diffusion_pytorch_model", 3_400_000_000
    hub_answers(
        {
            "model_index.json": 500,
            "unet/config.json": 1500,
            f"unet/{weights}.safetensors": large,
            f"unet/{weights}.bin": large,
            f"vae/{weights}.safetensors": 334_000_000,
        }
    )
    asked = {}

    def download(hub_id, allow_patterns):
        asked.update(files=allow_patterns, printed=capsys.readouterr().err)
        return str(kl_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("somebody/large") == kl_folder
    assert asked["printed"] == "downloading somebody/large: 3.7 GB\n"
    assert not [f for f in asked["files"] if f.endswith(".bin")] and len(asked["files"]) == 4


FILES = [
    "model_index.json",
    "README.md",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer_3/spiece.model",
    "safety_checker/model.safetensors",
]


def test_one_copy_of_the_weights_is_wanted():
    full, half, bare = (
        hub.wanted_files(FILES),
        hub.wanted_files(FILES, half=True),
        hub.wanted_files(FILES, weights=False),
    )
    for wanted in (full, half):
        assert {
            "model_index.json",
            "tokenizer/merges.txt",
            "tokenizer_3/spiece.model",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder_3/model-00002-of-00002.safetensors",
            "text_encoder_3/model.safetensors.index.json",
        } <= set(wanted)
        assert not [f for f in wanted if "safety" in f or "pruned" in f or "non_ema" in f or f.endswith(".bin")]
    assert {f for f in full if f.startswith("unet/d")} == {"unet/diffusion_pytorch_model.safetensors"}
    assert {f for f in half if f.startswith("unet/d")} == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert not [f for f in bare if f.endswith(".safetensors")] and "tokenizer/vocab.json" in bare
    only = ["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert hub.wanted_files(only) == only  # no choice
    both = [f"text_encoder/model{v}{n}" for v in ("", ".fp16") for n in ("-1-of-2.safetensors", "-2-of-2.safetensors")]
    both += ["text_encoder/model.safetensors.index.json", "text_encoder/model.safetensors.index.fp16.json"]
    assert hub.wanted_files(both, half=True) == sorted(f for f in both if ".fp16" in f)
    assert hub.wanted_files(both) == sorted(f for f in both if ".fp16" not in f)
    assert "diffusion_pytorch_model.safetensors" in hub.wanted_files(
        ["config.json", "diffusion_pytorch_model.safetensors"]
    )

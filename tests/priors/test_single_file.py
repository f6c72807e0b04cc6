"""A whole model in one file, as Stable Diffusion's authors name its weights."""

import gc
import re
import warnings
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill3d.priors import load_prior
from distill3d.priors.components import hub
from distill3d.priors.options import PriorOptions

RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
WHOLE = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
]
VAE = [
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("resnets", "block"),
    ("down_blocks", "down"),
]


def unet_name(name, layers=1):
    """What the authors call a weight of a UNet with one layer in each block."""
    for ours, theirs in WHOLE:
        name = name.replace(ours, theirs, 1) if name.startswith(ours) else name

    def down(m):
        return f"input_blocks.{1 + int(m[1]) * (layers + 1) + int(m[3])}.{'01'[m[2] == 'attentions']}"

    def up(m):
        return f"output_blocks.{int(m[1]) * (layers + 1) + int(m[3])}.{'01'[m[2] == 'attentions']}"

    name = re.sub(
        r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 + 2 * int(m[1])}.0.op", name
    )
    name = re.sub(r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{1 + 2 * int(m[1])}.2", name)
    name = re.sub(r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)", down, name)
    name = re.sub(r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)", up, name)
    if re.search(r"_blocks\.\d+\.0\.|middle_block\.[02]\.", name):
        for ours, theirs in RESNET:
            name = name.replace(ours, theirs)
    return f"model.diffusion_model.{name}"


def vae_name(name):
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{1 - int(m[1])}", name)
    for ours, theirs in VAE:
        name = name.replace(ours, theirs)
    return f"first_stage_model.{name}"


def clip_name(name):
    return f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"


@pytest.fixture(scope="module")
def checkpoint(kl_folder, tmp_path_factory):
    """The model of kl_folder as one file."""
    from distill3d.priors.components.folder import ModelFolder

    folder, tensors = ModelFolder(kl_folder), {}
    for part, rename in (("unet", unet_name), ("vae", vae_name), ("text_encoder", clip_name)):
        tensors |= {rename(name): value.contiguous() for name, value in folder.model(part).state_dict().items()}
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(tensors, path)
    return path


def test_it_is_the_model_that_the_folder_holds(checkpoint, kl_folder):
    prior, whole = load_prior(checkpoint, options=PriorOptions(config=str(kl_folder))), load_prior(kl_folder)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ["a red cube", ""]
    torch.testing.assert_close(prior.embed(texts).hidden, whole.embed(texts).hidden)
    torch.testing.assert_close(prior.predict(x, t, prior.embed(texts)), whole.predict(x, t, whole.embed(texts)))
    torch.testing.assert_close(prior.encode(images), whole.encode(images))


def test_text_encoders_are_read_when_there_is_something_to_read_and_can_be_dropped(checkpoint, kl_folder, tmp_path):
    token = tmp_path / "pet.safetensors"
    save_file({"emb_params": torch.ones(1, 16)}, token)
    options = PriorOptions(config=str(kl_folder), token=(str(token),))
    prior = load_prior(checkpoint, options=options)
    assert "text_encoder" not in prior.modules()
    first = prior.embed(["a <pet> in one file"])
    encoder = weakref.ref(prior.modules()["text_encoder"])
    prior.prepare(["a <pet> in one file"])
    gc.collect()
    assert encoder() is None  # its memory is free
    second = prior.embed(["another <pet>"])  # and it is read again
    again = load_prior(checkpoint, options=options)
    torch.testing.assert_close(again.embed(["a <pet> in one file"]).hidden, first.hidden, rtol=0, atol=0)
    torch.testing.assert_close(again.embed(["another <pet>"]).hidden, second.hidden, rtol=0, atol=0)
    assert "text_encoder" not in again.modules()  # embeddings were kept on disk


@pytest.mark.parametrize(
    ("names", "metadata", "kind", "zero"),
    [
        (["v_pred"], {}, "v", False),
        (["v_pred", "ztsnr"], {}, "v", True),
        ([], {"modelspec.prediction_type": "v"}, "v", False),
        ([], {"modelspec.prediction_type": "epsilon"}, "eps", False),
        ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v", True),
        ([], {"modelspec.title": "x"}, "eps", False),
    ],
)
def test_a_file_that_names_its_prediction_and_schedule_is_believed(
    names, metadata, kind, zero, checkpoint, kl_folder, tmp_path
):
    marked = tmp_path / "marked.safetensors"
    save_file(load_file(checkpoint) | {name: torch.tensor([]) for name in names}, marked, metadata)
    prior = load_prior(marked, options=PriorOptions(config=str(kl_folder)))
    assert prior.kind == kind
    assert (float(prior.schedule.alpha(torch.tensor(1.0))) < 1e-3) == zero


@pytest.mark.parametrize(
    "name", ["scaled_fp8", "model.x.scale_weight", "model.x.weight_scale", "model.x.weight.absmax"]
)
def test_quantized_weights_are_refused_by_name(name, fails, checkpoint, kl_folder, tmp_path):
    scaled = tmp_path / "scaled.safetensors"
    save_file(load_file(checkpoint) | {name: torch.ones(1)}, scaled)
    fails(scaled, f"quantized weights with scales .{name}.*convert it to 16 bits", config=str(kl_folder))


@pytest.mark.parametrize(("said", "name"), [(None, "sd21-v"), ("v", "sd21-v"), ("epsilon", "sd21")])
def test_which_stable_diffusion_2_it_is_is_never_guessed_in_silence(said, name, fails, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    tensors = {key: torch.zeros(4, 1024), "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}
    save_file(tensors, tmp_path / "two.safetensors", {"modelspec.prediction_type": said} if said else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fails(tmp_path / "two.safetensors", f"{hub.SHORT_NAMES[name]} is not in the local cache")
    assert [str(w.message).count("768 pixels is assumed") for w in caught] == ([1] if said is None else [])


def test_mistakes_are_named(fails, checkpoint, kl_folder, toys, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(checkpoint, "stable-diffusion-v1-5/stable-diffusion-v1-5 is not in the local cache, and offline mode is set")
    fails(checkpoint, "unknown configuration 'nowhere'", config="nowhere")
    fails(
        checkpoint,
        "does not fit the configuration in .* pass one of its family as --set prior_options.config=FOLDER",
        config=str(toys("sdxl").folder),
    )
    other = tmp_path / "other.safetensors"
    save_file({"something": torch.zeros(3)}, other)
    fails(other, "is not a known text-to-image model: pass --set prior_options.config=FOLDER")
    fails(other, "does not fit the configuration in .*: Failed to load UNet2DConditionModel", config=str(kl_folder))
    fails(tmp_path / "none.safetensors", "there is no file .*none.safetensors")
    other.write_bytes(checkpoint.read_bytes()[:1000])
    fails(other, "is damaged")
    (tmp_path / "model.ckpt").touch()
    fails(tmp_path / "model.ckpt", "neither a folder nor a .safetensors file; other formats can run code")

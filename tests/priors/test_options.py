"""What a user may change of a prior: each option against what it promises."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill3d.distill.loop import ObjectRun
from distill3d.distill.recipes import DISTILL
from distill3d.distill.supervision import condition_views
from distill3d.objectives import sdi
from distill3d.priors import load_prior
from distill3d.priors.components import packing
from distill3d.priors.options import PriorOptions
from distill3d.priors.student import Student
from distill3d.prompts import ViewPrompts
from distill3d.types import Conditioning


def generator():
    return torch.Generator().manual_seed(0)


def noise(*shape):
    return torch.randn(*shape, generator=generator())


def predict(prior, size=8):
    return prior.predict(noise(2, 4, size, size), torch.tensor([0.8, 0.3]), prior.embed(["a cat", ""]))


def load(folder, **options):
    return load_prior(folder, options=PriorOptions(**options))


def lora_file(path, network, part, rank=2, alpha=None):
    """LoRA for the queries of a network as diffusers saves it, and what it adds to each weight at scale 1."""
    tensors, added = {}, {}
    for name, module in network.named_modules():
        if name.endswith("to_q"):
            a, b = noise(rank, module.in_features), noise(module.out_features, rank)
            tensors |= {f"{part}.{name}.lora_A.weight": a, f"{part}.{name}.lora_B.weight": b}
            if alpha is not None:
                tensors[f"{part}.{name}.alpha"] = torch.tensor(float(alpha))
            added[f"{name}.weight"] = b @ a
    save_file(tensors, path)
    assert added
    return path, added


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_lora_is_added_to_the_weights(kl_folder, tmp_path, scale):
    pytest.importorskip("peft")
    plain = load(kl_folder)
    file, added = lora_file(tmp_path / "style.safetensors", plain.network, "unet")
    before = torch.get_rng_state()
    prior = load(kl_folder, lora=(f"{file}:{scale}" if scale != 1 else str(file),))
    assert torch.equal(torch.get_rng_state(), before)
    names, others = dict(plain.network.named_parameters()), dict(prior.network.named_parameters())
    assert names.keys() == others.keys()
    for name, value in names.items():
        torch.testing.assert_close(others[name], value + scale * added.get(name, 0.0))
    assert torch.equal(predict(prior), predict(plain)) == (scale == 0)


@pytest.mark.parametrize(("name", "part"), [("sdxl", "unet"), ("sd3", "transformer"), ("flux-dev", "transformer")])
def test_lora_on_other_families(toys, tmp_path, name, part):
    pytest.importorskip("peft")
    toy = toys(name)
    plain = load(toy.folder, image_size=toy.size)
    file, added = lora_file(tmp_path / "style.safetensors", plain.network, part)
    prior = load(toy.folder, image_size=toy.size, lora=(str(file),))
    weights = dict(plain.network.named_parameters())
    for key, value in added.items():
        torch.testing.assert_close(dict(prior.network.named_parameters())[key], weights[key] + value)
    assert (predict(prior) - predict(plain)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "part", "other"), [("sd", "unet", "attn2.to_q"), ("sd3", "transformer", "0.attn.to_q")]
)
@pytest.mark.parametrize("named", [False, True])
def test_a_merged_lora_is_the_active_adapter(toys, kl_folder, tmp_path, name, part, other, named):
    """Files of `save_lora_adapter`, which do not name the component, and of a pipeline; alpha is not the rank."""
    peft = pytest.importorskip("peft")
    folder, size = (kl_folder, None) if name == "sd" else (toys(name).folder, toys(name).size)
    plain = load(folder, image_size=size)
    network = plain.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], alpha_pattern={other: 3}))
    for i, (key, value) in enumerate(network.named_parameters()):
        if "lora_B" in key:
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
    with torch.no_grad():
        active = predict(plain)
    network.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if named:
        with safe_open(file, "pt") as opened:
            config = json.loads(opened.metadata()["lora_adapter_metadata"])
        tensors = {f"{part}.{key}": value for key, value in load_file(file).items()}
        text = json.dumps({f"{part}.{key}": value for key, value in config.items()})
        save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": text})
    else:
        assert not any(key.startswith(f"{part}.") for key in load_file(file))
    merged = load(folder, image_size=size, lora=(str(file),))
    assert merged.network.state_dict().keys() == before.keys()
    with torch.no_grad():
        torch.testing.assert_close(predict(merged), active)
        assert (active - predict(load(folder, image_size=size))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "metadata",
    [
        "no json",
        "[1]",
        "7",
        '{"r": 1000000000}',
        '{"r": "x"}',
        '{"alpha_pattern": 3}',
        '{"r": 2, "alpha_pattern": {"(": 3}}',
    ],
)
def test_damaged_metadata_of_a_lora_is_refused(fails, kl_folder, tmp_path, metadata):
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    tensors = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": metadata})
    fails(kl_folder, "do not fit: ", lora=(str(file),))


def test_mistaken_lora_is_named(fails, kl_folder, toys, tmp_path):
    pytest.importorskip("peft")
    fails(kl_folder, "LoRA weights: there is no file .*none.safetensors", lora=(str(tmp_path / "none.safetensors"),))
    (tmp_path / "style.bin").touch()
    fails(kl_folder, r"is not a \.safetensors file", lora=(str(tmp_path / "style.bin"),))
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    fails(toys("sd3").folder, "do not fit: there are none for a transformer", lora=(str(file),))
    query = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = {f"{query}.lora_A.weight": torch.zeros(2, 99), f"{query}.lora_B.weight": torch.zeros(99, 2)}
    save_file(wide, tmp_path / "wide.safetensors")
    fails(kl_folder, "do not fit", lora=(str(tmp_path / "wide.safetensors"),))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_x.dora_scale", "DoRA"),
        ("unet.x.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.lora_mid.weight", "LoCon"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.diff", "full difference"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused_by_name(name, kind, fails, kl_folder, tmp_path):
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    save_file(load_file(file) | {name: torch.ones(1)}, file)
    fails(kl_folder, f"is an adapter of kind {kind}.*use a plain LoRA", lora=(str(file),))


def test_lora_for_text_encoders_is_told(kl_folder, tmp_path):
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    save_file(load_file(file) | {"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, file)
    with pytest.warns(UserWarning, match="the LoRA weights for text encoders are ignored"):
        load(kl_folder, lora=(str(file),))


def test_a_scale_that_is_no_number_is_refused(fails, kl_folder, tmp_path):
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    fails(kl_folder, "scale of LoRA weights must be a finite number", lora=(f"{file}:nan",))


def test_a_lora_is_in_the_packed_weights_too(kl_folder, tmp_path, monkeypatch):
    """What is merged into the weights is not in the file that they are mapped from."""
    pytest.importorskip("peft")
    monkeypatch.setattr(packing, "LARGE", 1000)
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    prior = load(kl_folder, lora=(str(file),))
    assert not any(isinstance(module, packing.PackedConv2d) for module in prior.network.modules())


def test_a_lora_that_overflows_says_what_helps(fails, kl_folder, tmp_path):
    pytest.importorskip("peft")
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    message = r"style.safetensors at scale 3e\+38 make weights that are not finite: .*to_q.weight; use a smaller scale"
    fails(kl_folder, message, lora=(f"{file}:3e38",))


def spoil(file, value=torch.nan):
    """Makes one number of a file not finite; returns the tensor's name."""
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "lora", "token", "controlnet"])
def test_a_number_in_a_file_that_is_not_finite_is_refused_with_file_and_tensor(
    part, fails, kl_folder, controlnet, tmp_path
):
    folder, options = shutil.copytree(kl_folder, tmp_path / "model"), {}
    if part == "lora":
        file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
        options = {"lora": (str(file),)}
    elif part == "token":
        file = tmp_path / "word.safetensors"
        save_file({"word": noise(2, 16)}, file)
        options = {"token": (str(file),)}
    elif part == "controlnet":
        (file,) = shutil.copytree(controlnet, tmp_path / "net").glob("*.safetensors")
        options = {"controlnet": str(file.parent)}
    else:
        (file,) = (folder / part).glob("*.safetensors")
    name = spoil(file, torch.inf if part == "vae" else torch.nan)
    message = f"{re.escape(str(file))}: the tensor {re.escape(name)} has values that are not finite"
    if part in ("text_encoder", "token"):  # read with the first text
        with pytest.raises(ValueError, match=message):
            load(folder, **options).embed(["a word"])
    else:
        fails(folder, message, **options)


def test_weights_and_texts_beyond_a_precision_say_which_precision_helps(fails, kl_folder, tmp_path):
    folder = shutil.copytree(kl_folder, tmp_path / "model")
    (file,) = (folder / "unet").glob("*.safetensors")
    spoil(file, 1e6)
    load(folder)
    with pytest.raises(ValueError, match=r"not finite in torch.float16: .*; try --dtype bfloat16"):
        load_prior(folder, dtype="float16")
    save_file({"word": torch.full((1, 16), 3e38)}, tmp_path / "word.safetensors")  # its mean overflows in float32
    with pytest.raises(ValueError, match=r"text encoder gives numbers that are not finite for 'a word'"):
        load(kl_folder, token=(str(tmp_path / "word.safetensors"),)).embed(["a word"])


@pytest.mark.parametrize("size", [None, [8, 12], "8", 0])
def test_a_model_without_a_square_size_asks_for_one(size, fails, kl_folder, tmp_path):
    folder = shutil.copytree(kl_folder, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": size}))
    fails(folder, "has sample_size .* pass --image-size")
    assert load(folder, image_size=16).image_size == 16


@pytest.mark.parametrize("variant", ["bf16", "fp16", "non_ema"])
def test_a_folder_with_one_variant_alone_is_read(variant, kl_folder, tmp_path):
    folder = shutil.copytree(kl_folder, tmp_path / "model")
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    ours, theirs = load(folder), load(kl_folder)
    torch.testing.assert_close(ours.predict(x, t, ours.embed(["a"])), theirs.predict(x, t, theirs.embed(["a"])))


def test_models_distilled_to_few_steps_are_refused(fails, kl_folder, tmp_path):
    folder = shutil.copytree(kl_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    fails(folder, "scheduler is a LCMScheduler: it is distilled to a few steps")


def test_lora_without_peft_says_what_to_type(kl_folder, tmp_path, monkeypatch):
    file, _ = lora_file(tmp_path / "style.safetensors", load(kl_folder).network, "unet")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA weights need peft: type  pip install 'distill3d\[student\]'"):
        load(kl_folder, lora=(str(file),))


def tiny_vae(folder, channels=4):
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=channels,
        scaling_factor=1.3,
    )
    vae.save_pretrained(folder)
    return vae


def test_another_autoencoder(kl_folder, tmp_path):
    vae, images = tiny_vae(tmp_path / "tiny"), noise(1, 3, 16, 16).sigmoid()
    prior = load(kl_folder, vae=str(tmp_path / "tiny"))
    with torch.no_grad():
        torch.testing.assert_close(prior.encode(images), 1.3 * vae.eval().encode(images * 2 - 1).latents)
    torch.testing.assert_close(predict(prior), predict(load(kl_folder)))
    assert load(kl_folder, vae=str(kl_folder)).modules()["vae"].config.latent_channels == 4  # a whole model's


def test_mistaken_autoencoders_are_named(fails, kl_folder, toys, tmp_path, monkeypatch):
    from huggingface_hub import constants

    tiny_vae(tmp_path / "wide", channels=16)
    fails(kl_folder, "the network maps 4 channels to 4, the autoencoder has 16", vae=str(tmp_path / "wide"))
    fails(kl_folder, "contains a UNet2DConditionModel: an autoencoder must be one of", vae=str(kl_folder / "unet"))
    shutil.copytree(tmp_path / "wide", tmp_path / "torn")
    (tmp_path / "torn" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    fails(kl_folder, "torn/diffusion_pytorch_model.safetensors is damaged", vae=str(tmp_path / "torn"))
    fails(kl_folder, "has no config.json: use a folder of an autoencoder", vae=str(tmp_path))
    fails(kl_folder, "unknown autoencoder 'taes': use taesd, an existing folder", vae="taes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(kl_folder, "madebyollin/taesd is not in the local cache", vae="taesd")
    fails(toys("sd3").folder, "madebyollin/taesd3 is not in the local cache", vae="taesd")


def gradient(prior, images):
    images = images.clone().requires_grad_()
    (prior.encode(images) * noise(len(images), *prior.sample_shape)).sum().backward()
    return images.grad


def test_slicing_and_checkpointing_change_memory_and_nothing_else(kl_folder):
    plain, images = load(kl_folder), noise(3, 3, 16, 16).sigmoid()
    x, g = plain.encode(images), gradient(plain, images)
    for options in ({"slicing": True}, {"checkpointing": True}):
        prior = load(kl_folder, **options)
        torch.testing.assert_close(prior.encode(images), x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(prior.decode(x), plain.decode(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient(prior, images), g, rtol=1e-4, atol=1e-5)


def test_checkpointing_keeps_less_for_the_gradient(kl_folder):
    images = noise(1, 3, 16, 16).sigmoid().requires_grad_()

    def kept(prior):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            prior.encode(images)
        return sum(sizes)

    assert kept(load(kl_folder, checkpointing=True)) < 0.5 * kept(load(kl_folder))


def test_tiling_sees_a_large_image_in_parts(kl_folder):
    """The toy autoencoder's tiles are 16 pixels: one of 48 is cut up, and differs, but little away from seams."""
    plain, tiled = load(kl_folder, image_size=48), load(kl_folder, image_size=48, tiling=True)
    images = noise(1, 3, 48, 48).sigmoid()
    a, b = plain.encode(images), tiled.encode(images)
    assert a.shape == b.shape == (1, 4, 24, 24) and not torch.equal(a, b)
    assert gradient(tiled, images).abs().max() > 0


def test_the_image_size(fails, kl_folder, toys):
    prior = load(kl_folder, image_size=32)
    assert prior.image_size == 32 and prior.sample_shape == (4, 16, 16)
    assert predict(prior, 16).shape == (2, 4, 16, 16)
    fails(kl_folder, "the image size of toy must be a multiple of 4, got 30", image_size=30)
    assert load(toys("sdxl").folder, image_size=32).unet_options(prior.embed(["cat"]))["added_cond_kwargs"][
        "time_ids"
    ].tolist() == [[32, 32, 0, 0, 32, 32]]
    fails(toys("sd3").folder, "the image size of toy can be at most 32, got 64", image_size=64)
    flux = load(toys("flux-dev").folder, image_size=32)  # its shift grows with the number of tokens
    small = load(toys("flux-dev").folder, image_size=16)
    assert flux.schedule.shift > small.schedule.shift > 1


def test_distilled_guidance_reaches_the_network(toys):
    folder = toys("flux-dev").folder
    low, high = (load(folder, image_size=16, distilled_guidance=g) for g in (1.0, 5.0))
    assert (predict(low) - predict(high)).abs().max() > 1e-4


def test_a_controlnet_is_what_diffusers_pipeline_makes_of_it(kl_folder, controlnet):
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(kl_folder, subfolder="unet")
    network = ControlNetModel.from_pretrained(controlnet)
    prior = load(kl_folder, controlnet=str(controlnet), control_scale=0.7)
    x, t, image = noise(2, 4, 8, 8), torch.tensor([0.8, 0.3]), noise(2, 3, 16, 16).sigmoid()
    conditioning = Conditioning(prior.embed(["a cat", ""]), prior.embed(["", ""])).with_control(image)
    text = conditioning.positive
    with torch.no_grad():
        down, middle = network(x, 1000 * t, text.hidden, image, conditioning_scale=0.7, return_dict=False)
        wanted = unet(
            x, 1000 * t, text.hidden, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
    torch.testing.assert_close(prior.predict(x, t, text), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - predict(load(kl_folder))).abs().max() > 1e-3
    out = sdi(inversion_steps=3).guidance(x, prior, conditioning, step=0, total=10, generator=generator())
    assert out.gradient.isfinite().all()
    with pytest.raises(ValueError, match=r"has a ControlNet: add an image for it with Conditioning.with_control"):
        predict(prior)


def test_a_picture_of_another_size_is_resized_for_the_controlnet(kl_folder, controlnet):
    prior = load(kl_folder, controlnet=str(controlnet))
    large = noise(2, 3, 40, 40).sigmoid()
    small = torch.nn.functional.interpolate(large, (16, 16), mode="bilinear", antialias=True)
    text = prior.embed(["a cat", ""])
    x, t = noise(2, 4, 8, 8), torch.tensor([0.8, 0.3])
    ours, theirs = (
        prior.predict(x, t, Conditioning(text, text).with_control(image).positive) for image in (large, small)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_controlnet_of_sdxl_gets_the_conditions_of_its_unet(toys, tmp_path):
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    toy = toys("sdxl")
    network = ControlNetModel.from_unet(toy.pipeline.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    for p in (*network.controlnet_down_blocks.parameters(), *network.controlnet_mid_block.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    network.save_pretrained(tmp_path / "net")
    prior = load(toy.folder, controlnet=str(tmp_path / "net"))
    x, t, image = noise(2, 4, 8, 8), torch.tensor([0.8, 0.3]), noise(2, 3, 16, 16).sigmoid()
    text = Conditioning(prior.embed(["a cat", ""]), prior.embed(["", ""])).with_control(image).positive
    with torch.no_grad():
        down, middle = network(x, 1000 * t, text.hidden, image, return_dict=False, **prior.unet_options(text))
        wanted = toy.pipeline.unet(
            x,
            1000 * t,
            text.hidden,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            **prior.unet_options(text),
        ).sample
    torch.testing.assert_close(prior.predict(x, t, text), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - predict(load(toy.folder))).abs().max() > 1e-3


@pytest.mark.parametrize("control", ["depth", "normal"])
def test_a_controlnet_gets_the_rendered_map(kl_folder, controlnet, control):
    prior = load(kl_folder, controlnet=str(controlnet), control=control)
    run = ObjectRun(DISTILL, ViewPrompts("a cube", perp_neg=True), prior)
    cameras = DISTILL.cameras.sample(DISTILL.views, run.generator)
    rendering = run.render(0, cameras)
    conditioning = condition_views(run.prompts, prior, rendering, cameras)
    maps = conditioning.positive.control
    assert maps.shape == (DISTILL.views, 3, 16, 16) and torch.equal(maps, conditioning.negative.control)
    assert torch.equal(conditioning.perp.control, maps.repeat_interleave(2, 0))
    seen = rendering.opacity[:, 0] > 0.5
    assert seen.any() and maps.std() > 0.01
    x = prior.encode(rendering.rgb)
    out = run.objective.guidance(x, prior, conditioning, step=0, total=10, generator=generator())
    assert out.gradient.isfinite().all()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_mistaken_controlnets_are_named(fails, kl_folder, toys, controlnet, tmp_path, part):
    fails(kl_folder, "contains a .*: a ControlNet must be a ControlNetModel", controlnet=str(kl_folder / part))
    fails(kl_folder, "has no config.json: use a folder of a ControlNet", controlnet=str(tmp_path))
    fails(toys("sdxl").folder, "is for another model: its .* is .*, that of the UNet", controlnet=str(controlnet))
    fails(toys("sd3").folder, "does not support --controlnet", controlnet=str(controlnet))


def test_an_offloaded_network_never_lies_on_the_device_as_a_whole(kl_folder, monkeypatch):
    """A model too large for the device must not be put there first; "meta" stands for a device without memory."""
    from diffusers import UNet2DConditionModel

    sent = []
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_group_offload", lambda self, to, home, **_: sent.append((to, home))
    )
    prior = load_prior(kl_folder, "meta", options=PriorOptions(offload=True))
    assert sent == [(torch.device("meta"), torch.device("cpu"))]
    assert {p.device.type for p in prior.network.parameters()} == {"cpu"}
    assert {p.device.type for p in prior.modules()["vae"].parameters()} == {"meta"}
    with pytest.raises(ValueError, match="cannot be trained with --offload"):
        Student(prior, generator())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch, of its own compiler
def test_a_compiled_network_predicts_the_same(kl_folder):
    prior, plain = load(kl_folder, compile=True), load(kl_folder)
    assert prior.network._compiled_call_impl is not None and plain.network._compiled_call_impl is None
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute
        assert torch.equal(predict(prior), predict(plain))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"control": "canny"}, "control must be depth or normal, got 'canny'"),
        ({"image_size": 3}, "at least 8 pixels, got 3"),
        ({"distilled_guidance": float("nan")}, "distilled guidance must be a finite number"),
    ],
)
def test_settings_out_of_range_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        PriorOptions(**options)

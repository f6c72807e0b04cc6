"""The layouts of MVDream's public weights, written from a random network of diffusers: the same predictions."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill3d.cameras import orbit
from distill3d.priors import load_prior
from distill3d.priors.stable_diffusion import MultiViewPrior

LAYERS = 2  # residual blocks in each block
RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
FILE = "diffusion_pytorch_model.safetensors"
SHARED = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2]}
SHARED |= {"num_res_blocks": LAYERS, "transformer_depth": 1, "context_dim": 16, "camera_dim": 16}
# Name of the layout: class, settings of its own, and the same settings in diffusers' terms.
LAYOUTS = {
    "own": (
        "MultiViewUNetModel",
        SHARED | {"num_head_channels": 8, "attention_resolutions": [1, 2], "ip_dim": 0},
        {"attention_head_dim": (4, 8), "use_linear_projection": True},
    ),
    "wrapped": (
        "MultiViewUNetWrapperModel",
        SHARED | {"num_heads": 4, "attention_resolutions": [1]},
        {"attention_head_dim": 4},
    ),
    "separate camera": ("UNet2DConditionModel", None, {"attention_head_dim": 4}),
}


def own_name(name, attention):
    """The name of a weight in MVDream's own code; attention says which blocks have it, from the outermost."""
    block = LAYERS + 1  # residual blocks and one change of resolution

    def down(m):
        b, part, j, rest = int(m[1]), m[2], int(m[3]), m[4]
        if part == "downsamplers":
            return f"input_blocks.{(b + 1) * block}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{1 + b * block + j}.{int(part == 'attentions')}.{rest}"

    def up(m):
        b, part, j, rest = int(m[1]), m[2], int(m[3]), m[4]
        if part == "upsamplers":
            return f"output_blocks.{b * block + LAYERS}.{1 + attention[::-1][b]}.{rest}"
        return f"output_blocks.{b * block + j}.{int(part == 'attentions')}.{rest}"

    if ".resnets." in name:
        for theirs, own in RESNET:
            name = name.replace(f".{theirs}.", f".{own}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    name = re.sub(r"^down_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", down, name)
    name = re.sub(r"^up_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", up, name)
    for theirs, own in (
        ("mid_block.attentions.0", "middle_block.1"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("class_embedding.linear_1", "camera_embed.0"),
        ("class_embedding.linear_2", "camera_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, views_folder, tmp_path_factory):
    """(folder in this library's layout, folder in a foreign one) of one random network."""
    from diffusers import UNet2DConditionModel

    name, config, settings = LAYOUTS[request.param]
    attention = [r in (config or SHARED).get("attention_resolutions", [2]) for r in (1, 2)]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=LAYERS,
        cross_attention_dim=16,
        down_block_types=tuple("CrossAttn" * a + "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttn" * a + "UpBlock2D" for a in attention[::-1]),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
        **settings,
    )
    root = tmp_path_factory.mktemp("layout")
    ours, theirs = root / "ours", root / "theirs"
    shutil.copytree(views_folder, ours)
    unet.save_pretrained(ours / "unet")
    edit(ours / "unet" / "config.json", views=4)
    shutil.copytree(ours, theirs)
    weights = load_file(theirs / "unet" / FILE)
    if config is None:
        plain = UNet2DConditionModel.from_config({**unet.config, "class_embed_type": None})
        (theirs / "unet" / "config.json").write_text(plain.to_json_string())
        camera = {n.removeprefix("class_embedding."): w for n, w in weights.items() if n.startswith("class_embedding")}
        weights = {n: w for n, w in weights.items() if not n.startswith("class_embedding")}
        (theirs / "camera_proj").mkdir()
        save_file(camera, theirs / "camera_proj" / FILE)
        (theirs / "camera_proj" / "config.json").write_text(json.dumps({"in_channels": 16, "camera_embed_dim": 128}))
        edit(theirs / "model_index.json", camera_proj=["mvdream.camera_proj", "CameraMatrixEmbedding"])
        pipeline = "MVDreamPipeline"
    else:
        prefix = "unet." * ("Wrapper" in name)
        weights = {prefix + own_name(n, attention): w for n, w in weights.items()}
        (theirs / "unet" / "config.json").write_text(json.dumps({"_class_name": name, **config}))
        edit(theirs / "model_index.json", unet=["mv_unet", name])
        pipeline = "MVDreamStableDiffusionPipeline" if prefix else "MVDreamPipeline"
    save_file(weights, theirs / "unet" / FILE)
    edit(theirs / "model_index.json", _class_name=pipeline)
    return ours, theirs


def test_foreign_layouts_are_the_same_network(pair):
    ours, theirs = (load_prior(folder, dtype="float64") for folder in pair)
    assert isinstance(theirs, MultiViewPrior) and theirs.views == 4 and not theirs.camera_guidance
    assert theirs.sample_shape == ours.sample_shape and theirs.image_size == ours.image_size
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(8, 4, 8, 8, generator=generator, dtype=torch.float64), torch.full((8,), 0.6)
    cameras = orbit(torch.arange(8) * 90.0, 20.0, 2.5, 40.0).camera_to_world
    got, wanted = (p.predict(x, t, replace(p.embed(["a cat"] * 8), camera=cameras)) for p in (theirs, ours))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_missing_or_pickled_is_one_line(pair, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(pair[1], theirs)
    weights = load_file(theirs / "unet" / FILE)
    gone = next(name for name in weights if "conv" in name or "out." in name)

    def fails(match):
        with pytest.raises(ValueError, match=match) as caught:
            load_prior(theirs)
        assert "\n" not in str(caught.value)

    save_file({name: w for name, w in weights.items() if name != gone}, theirs / "unet" / FILE)
    fails("weights in .*unet do not match its config.json: .*Missing key")
    save_file(weights, theirs / "unet" / FILE)
    if (theirs / "camera_proj").is_dir():
        (theirs / "camera_proj" / FILE).rename(theirs / "camera_proj" / "diffusion_pytorch_model.bin")
        fails(r"camera_proj has only pickled weights \(diffusion_pytorch_model.bin\), .*: convert them with")
    else:
        edit(theirs / "unet" / "config.json", ip_dim=16)
        fails("ImageDream's, which needs an image besides the text: use mvdream")
        edit(theirs / "unet" / "config.json", ip_dim=0, camera_dim=12)
        fails("projection_class_embeddings_input_dim 16, got 'projection' and 12")
        edit(theirs / "unet" / "config.json", model_channels=None)
        fails("unet/config.json lacks model_channels")

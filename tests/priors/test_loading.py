import json
import shutil
import sys
from types import ModuleType

import pytest
import torch

from distill3d.priors import load_prior


@pytest.fixture
def folder(kl_folder, tmp_path):
    return shutil.copytree(kl_folder, tmp_path / "model")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_whole_folder_loads(folder):
    prior = load_prior(str(folder))
    assert prior.name == "model" and prior.sample_shape == (4, 8, 8) and prior.image_size == 16


def test_unknown_name(fails):
    fails("toybx", "unknown prior 'toybx': use toybox, toybox-mv, sd15")
    fails("./no/such/folder", "unknown prior")
    fails("x" * 5000, "unknown prior")


def test_folder_without_index_and_file_instead_of_folder(fails, tmp_path):
    fails(tmp_path, "has no model_index.json")
    (tmp_path / "model.ckpt").touch()
    fails(tmp_path / "model.ckpt", "is neither a folder nor a .safetensors file")


def test_unsupported_classes(fails, folder):
    edit(folder / "model_index.json", _class_name="KandinskyPipeline")
    fails(folder, "contains a KandinskyPipeline: supported are StableDiffusionPipeline, StableDiffusionXLPipeline")
    edit(folder / "model_index.json", _class_name="PixArtSigmaPipeline")
    fails(folder, r"contains a PixArtSigmaPipeline \(its networks need a mask of the text\'s padding")
    edit(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    fails(folder, r"use a text-to-image model\): supported are")
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline", vae=["diffusers", "VQModel"])
    fails(folder, "vae is a VQModel, supported is AutoencoderKL or AutoencoderTiny")


def test_unsupported_settings(fails, folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    fails(folder, "prediction_type 'flow_prediction'")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon", beta_schedule="sigmoid")
    fails(folder, "beta_schedule 'sigmoid'")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part(fails, folder, part):
    shutil.rmtree(folder / part)
    fails(folder, f"has no '{part}': download or save the model again")


def test_a_tokenizer_without_words(fails, folder):
    """transformers makes something of a folder without vocabulary, and it reads every text alike."""
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    fails(
        folder, "tokenizer has no vocabulary .tokenizer.json, or vocab.json and merges.txt, or spiece.model.: download"
    )


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_vocabulary_that_needs_another_package_says_which(toys, tmp_path, monkeypatch, package):
    """DeepFloyd IF brings its words as sentencepiece's file alone."""
    for name in ("google", "google.protobuf", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None if name == package else ModuleType(name))
    folder = shutil.copytree(toys("if").folder, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "spiece.model")
    with pytest.raises(
        ImportError, match=r"tokenizer needs sentencepiece and protobuf: type  pip install 'distill3d\[t5\]'"
    ):
        load_prior(folder)


def test_a_tokenizer_of_another_model(folder):
    from transformers import CLIPTokenizer

    words = [f"word{i}" for i in range(200)] + ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder / "tokenizer")
    prior = load_prior(folder)
    with pytest.raises(
        ValueError, match=r"the tokenizer has 202 tokens, CLIPTextModel only .*: the components belong to"
    ):
        prior.embed(["a cat"])


def test_missing_and_damaged_config(fails, folder):
    config = folder / "vae" / "config.json"
    config.write_text("{")
    fails(folder, "config.json is damaged")
    config.unlink()
    fails(folder, "has no vae/config.json")


def test_weights_missing_pickled_or_truncated(fails, folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    for broken in (data[:-100], data[:5], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        weights.write_bytes(broken)
        fails(folder, "weights file .*diffusion_pytorch_model.safetensors is damaged: ")
    weights.unlink()
    fails(folder, "has no weights")
    (folder / "unet" / "diffusion_pytorch_model.bin").touch()
    fails(folder, "has only pickled weights")


def test_weights_in_half_precision_and_in_several_files(fails, kl_folder, folder):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(kl_folder)
    shutil.rmtree(folder)
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    shards = sorted((folder / "unet").glob("*.fp16-*.safetensors"))
    assert len(shards) > 1 and list((folder / "text_encoder").glob("*.fp16-*.safetensors"))
    halves, whole = load_prior(folder), load_prior(kl_folder)
    x, t = torch.ones(1, 4, 8, 8), torch.tensor([0.5])
    outputs = [prior.predict(x, t, prior.embed(["a cat"])) for prior in (halves, whole)]
    torch.testing.assert_close(*outputs)  # the files are float32, whatever they are called
    shards[0].unlink()
    fails(folder, "lacks 1 of .* weight files")


def test_weights_as_the_published_models_name_them(kl_folder, folder):
    """Stable Diffusion's folders were written by older versions of the libraries."""
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder" / "model.safetensors"
    named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(named | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, file, {"format": "pt"})
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()}
    assert any(".query." in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    old, new, images = load_prior(folder), load_prior(kl_folder), torch.ones(1, 3, 16, 16)
    torch.testing.assert_close(old.embed(["a published text"]).hidden, new.embed(["a published text"]).hidden)
    torch.testing.assert_close(old.encode(images), new.encode(images))


def test_weights_of_another_model(fails, folder):
    """A tensor that the file lacks must not be filled in at random."""
    edit(folder / "unet" / "config.json", layers_per_block=2)
    fails(folder, "unet")
    edit(folder / "unet" / "config.json", layers_per_block=1)
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=3)
    prior = load_prior(folder)  # text encoders are loaded when there is something to read
    with pytest.raises(ValueError, match=r"do not match its config\.json"):
        prior.embed(["cat"])


def test_components_that_do_not_fit_each_other(fails, folder):
    edit(folder / "unet" / "config.json", addition_embed_type="text")
    fails(folder, "unet|more conditions than a text")


def test_hub_id_without_network(fails, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fails("nobody/nothing-here", "not in the local cache, and offline mode is set")

"""A model of unknown origin runs no code, and fetches none: what would is refused by name."""

import json
import shutil
import sys

import pytest

from distill3d.evaluation.evaluator import Evaluator
from distill3d.priors import load_prior
from distill3d.priors.components.adapters import load_autoencoder


@pytest.fixture
def folder(kl_folder, tmp_path):
    return shutil.copytree(kl_folder, tmp_path / "model")


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A module that tells whether it was imported."""
    (tmp_path / "evil_library.py").write_text("UNet2DConditionModel = CLIPTextModel = DDIMScheduler = object\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "evil_library"
    assert "evil_library" not in sys.modules


def edit(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_components_are_of_diffusers_and_transformers(component, fails, folder, marker):
    index = json.loads((folder / "model_index.json").read_text())
    edit(folder / "model_index.json", **{component: [marker, index[component][1]]})
    fails(folder, f"{component} is of 'evil_library'; supported is diffusers or transformers")
    edit(folder / "model_index.json", **{component: [["x"], index[component][1]]})
    fails(folder, f"{component} is of ")
    edit(folder / "model_index.json", **{component: [index[component][0], "DiffusionPipeline"]})
    fails(folder, f"{component} is a DiffusionPipeline")
    edit(folder / "model_index.json", **{component: [index[component][0], 7]})
    fails(folder, f"has no '{component}'")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil_library.CLIPTextModel"}}),
        ("text_encoder/config.json", {"text_config": {"auto_map": {"AutoModel": "evil_library.CLIPTextModel"}}}),
        ("text_encoder/config.json", {"trust_remote_code": True}),
        ("text_encoder/config.json", {"attn_implementation": "kernels-community/flash-attn"}),
        ("text_encoder/config.json", {"_attn_implementation": "someone/evil"}),
        ("text_encoder/config.json", {"_attn_implementation_internal": {"text_config": "someone/evil"}}),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "gptq"}}),
        ("text_encoder/adapter_config.json", {"base_model_name_or_path": "someone/evil"}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil_library.T", None]}}),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("vae/config.json", {"auto_map": {"x": "evil_library.x"}}),
    ],
)
def test_settings_that_name_code_are_refused(file, change, fails, folder, marker):
    edit(folder / file, **change)
    name = "auto_map" if "text_config" in change else next(iter(change))
    fails(folder, f"{file} sets {name}, which can run code")


def test_settings_that_older_versions_save_are_none_of_these(folder):
    edit(folder / "text_encoder" / "config.json", _attn_implementation="sdpa", auto_map=None, trust_remote_code=False)
    assert len(load_prior(folder).embed(["a cat"])) == 1


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("text_encoder/config.json", {"initializer_factor": []}),
        ("tokenizer/tokenizer.json", {"padding": 3}),
        ("unet/config.json", {"block_out_channels": "x"}),
        ("scheduler/scheduler_config.json", {"beta_start": []}),
    ],
)
def test_a_setting_of_a_wrong_type_is_refused_in_one_line(file, change, folder):
    edit(folder / file, **change)
    with pytest.raises(ValueError, match=r"cannot load|cannot be used") as caught:
        load_prior(folder).embed(["a cat"])
    assert "\n" not in str(caught.value)


def test_what_is_loaded_beside_the_model_is_checked_too(folder):
    edit(folder / "vae" / "config.json", quantization_config={"quant_method": "gptq"})
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(ValueError, match="sets quantization_config, which can run code"):
        load_autoencoder(folder / "vae")
    with pytest.raises(ValueError, match="sets auto_map, which can run code"):
        Evaluator(folder)

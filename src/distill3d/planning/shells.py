"""Priors of true size without weights: their networks hold tensors that have a shape and no values.

A prior is built by the program's own builders from configurations alone, so its options act as they do in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill3d.diffusion.schedule import Kind
from distill3d.planning.measure import Stage
from distill3d.planning.meter import Meter
from distill3d.planning.models import Settings, configurations
from distill3d.priors import mvdream
from distill3d.priors.base import DeviceConfig, FrozenPrior, resolve_dtype
from distill3d.priors.components import hub
from distill3d.priors.components.autoencoder import LOW_PRECISION, Autoencoder, Codec
from distill3d.priors.components.folder import ModelFolder, libraries, quiet, read_json
from distill3d.priors.components.text_cache import TextCache
from distill3d.priors.components.text_encoders import TextEncoders
from distill3d.priors.families import FAMILIES, check_folder
from distill3d.priors.options import PriorBuilder, PriorClass, PriorOptions
from distill3d.types import Schedule

WORDS = 8  # tokens of a text; encoders pad


class Tokenizer:
    """Stands for the tokenizer of a text encoder with so many words."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __init__(self, vocab_size: int, model_max_length: int):
        self.vocab_size, self.model_max_length = vocab_size, model_max_length

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        """Every text has the same tokens."""
        return SimpleNamespace(input_ids=[2] * WORDS if text else [])


@dataclass(frozen=True)
class Shells(ModelFolder):
    """The components of a model without weights. `files` are its configurations; None reads them from `path`."""

    files: dict[str, Settings] | None = None
    fake: FakeTensorMode = field(default_factory=FakeTensorMode)

    @property
    def index(self) -> Settings:
        """See `ModelFolder`; the network of MVDream's own layouts is one of diffusers here."""
        index = super().index if self.files is None else self.files[""]
        return {**index, "unet": ["diffusers", "UNet2DConditionModel"]} if mvdream.is_mvdream(index) else index

    def config(self, component: str) -> Settings:
        """See `ModelFolder`."""
        if self.files is not None:
            return self.files[component]
        own = mvdream.is_mvdream(super().index)
        return mvdream.MVDreamFolder(self.path).config(component) if own else super().config(component)

    def model(self, component: str) -> nn.Module:
        """The network of a component."""
        library, name = self.index[component]
        return self.shell(library, name, self.config(component), self.dtype)

    def tokenizer(self, component: str) -> Tokenizer:
        """Stands for the tokenizer of a component."""
        settings = self.config(component.replace("tokenizer", "text_encoder"))
        return Tokenizer(min(1000, settings["vocab_size"]), settings.get("max_position_embeddings", 512))

    def shell(self, library: str, name: str, settings: Settings, dtype: torch.dtype) -> nn.Module:
        """A network of this class and configuration, in its final precision."""
        diffusers, transformers = libraries()
        with torch.device("meta"), quiet():
            if library == "transformers":
                kind = getattr(transformers, name)
                network: nn.Module = kind(kind.config_class(**settings))
            else:
                network = getattr(diffusers, name).from_config(settings)
        hollow: dict[int, torch.Tensor] = {}  # weights that are shared stay so
        tables: list[dict[str, Any]] = [
            table for module in network.modules() for table in (module._parameters, module._buffers)
        ]
        entries = [(table, key, old) for table in tables for key, old in table.items()]
        with self.fake:
            for table, key, old in entries:
                if old is not None and id(old) not in hollow:
                    new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                    hollow[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
                table[key] = None if old is None else hollow[id(old)]
        vars(network)["_apply"] = lambda *_, **__: network  # it has its place and its precision already
        vars(network)["__deepcopy__"] = _refuse_student
        return network.eval()


@dataclass(frozen=True)
class ShellBuilder(PriorBuilder):
    """Builds a prior from `Shells`, with stand-ins where its networks are called."""

    stage: Stage = field(kw_only=True)

    @property
    def shells(self) -> Shells:
        """The components."""
        assert isinstance(self.folder, Shells)
        return self.folder

    def network(self, component: str) -> Any:
        """The network; merged LoRA weights would change nothing."""
        return self.folder.model(component)

    def autoencoder(self, tiny: str) -> Autoencoder:
        """The model's autoencoder, or that of the option `vae`."""
        o, shells = self.options, self.shells
        inside = torch.float32 if self.config.dtype in LOW_PRECISION else self.config.dtype
        library, name = "diffusers", shells.index["vae"][1]
        settings = shells.config("vae")
        if o.vae == "taesd":
            name, settings = "AutoencoderTiny", {"latent_channels": settings.get("latent_channels", 4)}
        elif o.vae is not None:
            path = Path(o.vae).expanduser()
            path = path / "vae" if (path / "vae").is_dir() else path
            if not (path / "config.json").is_file():
                raise ValueError(f"a plan downloads nothing: --vae must be taesd or a folder, got {o.vae!r}")
            settings = read_json(path / "config.json")
            name = str(settings.get("_class_name"))
        vae = shells.shell(library, name, settings, inside)
        return Autoencoder(vae, self.config.device, self.config.dtype, o.slicing, o.tiling, o.checkpointing)

    def controlnet(self, unet: Any) -> nn.Module:
        """Raises ValueError: its configuration is not here."""
        raise ValueError("a plan does not know ControlNets: leave out --controlnet, and add its weights yourself")

    def add_tokens(self, encoders: object) -> None:
        """A few more vectors change nothing."""

    def assemble(
        self,
        prior_class: type[PriorClass],
        network: Any,
        codec: Codec,
        load: Callable[[], TextEncoders],
        schedule: Schedule,
        kind: Kind,
        size: int,
    ) -> PriorClass:
        """As `PriorBuilder.assemble`, with stand-ins for the networks, whose weights are held."""
        stage = self.stage
        key = (self.name, str(self.config.dtype), size, self.options.checkpointing, self.options.vae)
        texts = _Texts(load, self.config.device, stage, key)
        held = largest_layer(network) if self.config.offload else size_of(network)
        if self.options.packed:  # a reordered copy of the weights of its convolutions
            held += sum(one.weight.nbytes for one in network.modules() if type(one) is nn.Conv2d)
        stage.meter.hold("weights of the network", held)
        stage.meter.hold("weights of the autoencoder", sum(map(size_of, codec.modules().values())))
        forward = network.forward
        # Joined views change the attention: their number is part of the key.
        network.forward = lambda *args, **options: stage.call(
            "network", (*key, getattr(prior, "views", 1)), forward, args, options
        )
        plain = DeviceConfig(self.config.device, self.config.dtype)
        prior = prior_class(network, _Codec(codec, stage, key), texts, schedule, kind, size, plain, self.name)
        return prior


class _Codec:
    """Stands for an autoencoder."""

    def __init__(self, codec: Codec, stage: Stage, key: tuple[object, ...]):
        self.codec, self.stage, self.key = codec, stage, key
        self.channels, self.factor, self.modules = codec.channels, codec.factor, codec.modules

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """See `Codec.encode`."""
        return self.stage.call("encoder", (*self.key, "encode"), self.codec.encode, (images,), {})

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """See `Codec.decode`."""
        return self.stage.call("decoder", (*self.key, "decode"), self.codec.decode, (x,), {})


class _Texts(TextCache):
    """Holds the weights of the text encoders while they are loaded."""

    def __init__(self, load: Callable[[], TextEncoders], device: torch.device, stage: Stage, key: tuple[object, ...]):
        super().__init__(load, device)
        self.stage, self.key, self.held = stage, key, 0

    def encoders(self) -> TextEncoders:
        """See `TextCache`."""
        if not self.held:
            with self.stage.meter.pause():
                found = super().encoders()
            for name, module in found.modules.items():
                forward = module.forward
                module.forward = lambda *args, _name=name, _forward=forward, **options: self.stage.call(
                    "text encoders", (*self.key, _name), _forward, args, options
                )
            self.held = sum(map(size_of, found.modules.values()))
            self.stage.meter.hold("text encoders", self.held)
        return super().encoders()

    def free_encoders(self) -> None:
        """See `TextCache`."""
        super().free_encoders()
        self.stage.meter.hold("text encoders", -self.held)
        self.held = 0


def load_shell(name: str, dtype: str, options: PriorOptions, stage: Stage) -> FrozenPrior:
    """The prior of this name, as `load_prior` would load it, on the CPU and without weights.

    Raises:
        ValueError: for a model whose configuration is neither known nor on this machine.
    """
    config = DeviceConfig(torch.device("cpu"), resolve_dtype(dtype), options.offload)
    files = configurations(name)
    if files is None or name in hub.BUNDLED:
        folder = Shells(_local(name), config.dtype, fake=stage.fake)
        family = check_folder(folder.path, weights=False)
    else:
        folder = Shells(Path(name), config.dtype, files=files, fake=stage.fake)
        family = FAMILIES[folder.index["_class_name"]]
    if family.build is mvdream.build:
        family = FAMILIES["StableDiffusionPipeline"]
    builder = ShellBuilder(folder, config, options, family.lora, None, name, stage=stage)
    with Meter():  # answers the question whether weights are finite
        return family.build(builder)


def _refuse_student(memo: object) -> nn.Module:
    raise ValueError("a plan does not cover methods that train a copy of the network (a student), such as vsd and esd")


def size_of(module: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def largest_layer(module: nn.Module) -> int:
    """Bytes of the largest layer: what --offload keeps on the card at once."""
    return max(sum(x.numel() * x.element_size() for x in one.parameters(recurse=False)) for one in module.modules())


def _local(name: str) -> Path:
    if name in hub.BUNDLED:
        return hub.resolve(name)
    if hub.is_path(name):
        path = Path(name).expanduser()
        if path.is_file():
            raise ValueError(f"a plan reads configurations, and {name} is a file with weights: pass the base model")
        return path
    found = hub.cached(name) if hub.HUB_ID.fullmatch(name) else None
    if found is None:
        raise ValueError(
            f"a plan downloads nothing and has no configuration of {name!r}: use "
            f"{', '.join((*hub.NAMES, 'sd35-large'))}, or a folder in diffusers format"
        )
    return found

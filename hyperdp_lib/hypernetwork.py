"""Noisy sum -> LoRA adapter: the public network that turns one private release into model parameters.

It reads the noisy mean (sum over noisy count) and two numbers that say how far to trust it: the noise on that mean and
the noisy count. One network therefore serves every epsilon, every neighbouring relation and every set size it was
trained for. Everything here is post-processing of the release and costs no privacy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from hyperdp_lib.adapter import Adapter, LoraGeometry, lora_geometry
from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import COUNT_COORDINATE, Encoder, EncoderConfig

WEIGHTS = Path(__file__).parent / "weights"
NON_COMMERCIAL = ("photographs", "photographs-latent")  # in the repository, not in the package
PRIORS_FILE = "priors.safetensors"  # of means of public data sets, see hyperdp_lib.prior
# Every Linear layer of the transformer's blocks but the time embedding; `norm1.linear` makes the modulation, so
# LoRA there acts like conditioning.
TARGET_MODULES = (
    r"transformer_blocks\.\d+\.(attn1\.to_[qkv]|attn1\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2|norm1\.linear)"
)
# Public training simulates at least this much noise on a mean (standard deviation of a coordinate), and at most so
# many images in a set. Beyond that a decoder would be asked for what it never saw.
LEAST_NOISE = 5e-4
LARGEST_SET = 8192


@dataclass(frozen=True)
class HyperNetworkConfig:
    """Shape of the hypernetwork (public): residual trunk, then one linear head per factor of every adapted layer."""

    r: int = 4
    lora_alpha: int = 4
    target_modules: str = TARGET_MODULES
    hidden: int = 256
    head_width: int = 96
    num_blocks: int = 2

    def lora_config(self):
        """The PEFT configuration of the adapters it makes."""
        from peft import LoraConfig

        return LoraConfig(r=self.r, lora_alpha=self.lora_alpha, target_modules=self.target_modules)


class HyperNetwork(nn.Module):
    """Frozen encoder, and the network from a noisy sum of its embeddings to adapters.

    Parameters
    ----------
    encoder : the public encoder whose sums it reads.
    base_model : the model to adapt; only its geometry is read.
    config : see ``HyperNetworkConfig``.
    """

    encoder: Any  # an `Encoder`, or what is called and used like one

    def __init__(self, encoder: Any, base_model: nn.Module, config: HyperNetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = HyperNetworkConfig() if config is None else config
        self.encoder = encoder.requires_grad_(False).eval()
        self.lora_config = config.lora_config()
        self.geometry: LoraGeometry = lora_geometry(base_model, self.lora_config)
        self.trunk_in = nn.Linear(encoder.config.dimension + 1, config.hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(config.hidden), nn.Linear(config.hidden, config.hidden), nn.GELU(),
                nn.Linear(config.hidden, config.hidden),
            )
            for _ in range(config.num_blocks)
        )  # fmt: skip
        self.trunk_out = nn.Sequential(
            nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, config.head_width),
            nn.GELU(),
            nn.LayerNorm(config.head_width),
        )
        sizes_a = [torch.Size(m.a_shape).numel() for m in self.geometry.modules]
        sizes_b = [torch.Size(m.b_shape).numel() for m in self.geometry.modules]
        self.head_a = nn.Linear(config.head_width, sum(sizes_a))
        self.head_b = nn.Linear(config.head_width, sum(sizes_b))
        self._sizes = (sizes_a, sizes_b)
        self.base_model_sha256: str | None = None  # set once the base model is final
        self.priors: Mapping[str, Tensor] = {}  # of `prior.Prior`; empty if the weights have none
        self._initialise()

    def _initialise(self) -> None:
        """No change at the start: B = 0. A has a random bias as large as PEFT's own start, and small weights."""
        with torch.no_grad():
            self.head_b.weight.zero_()
            self.head_b.bias.zero_()
            self.head_a.weight.normal_(std=0.02 / self.config.head_width**0.5)
            fan_in = [m.a_shape[1:] for m in self.geometry.modules]
            bias = [
                torch.empty(m.a_shape).uniform_(-1, 1) / torch.Size(f).numel() ** 0.5
                for m, f in zip(self.geometry.modules, fan_in, strict=True)
            ]
            self.head_a.bias.copy_(torch.cat([b.flatten() for b in bias]))

    def train(self, mode: bool = True) -> HyperNetwork:
        """The encoder stays in evaluation mode: it is frozen."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, noisy_sum: Tensor, noise_std: Tensor | float, names: tuple[str, ...] | None = None) -> Adapter:
        """Adapters of T data sets from their noisy sums.

        Parameters
        ----------
        noisy_sum : (T, k); coordinate 0 is the encoder's count coordinate times the noisy count.
        noise_std : standard deviation of the noise on each coordinate of the sum, a number or (T,); public.
        names : one a data set, e.g. the class names.
        """
        std = torch.as_tensor(noise_std, dtype=noisy_sum.dtype, device=noisy_sum.device).expand(len(noisy_sum))
        return self.generate(self.features(noisy_sum, std), names)

    def features(self, noisy_sum: Tensor, noise_std: Tensor) -> Tensor:
        """What the trunk reads of noisy sums (T, k) and the standard deviations of their noise (T,)."""
        return torch.cat(summary(noisy_sum, noise_std, self.encoder.config.count_coordinate), 1)

    def generate(self, features: Tensor, names: tuple[str, ...] | None = None) -> Adapter:
        """Adapters of T data sets from what the trunk reads."""
        h = self.trunk_in(features)
        for block in self.blocks:
            h = h + block(h)
        h = self.trunk_out(h)
        parts_a = self.head_a(h).split(self._sizes[0], 1)
        parts_b = self.head_b(h).split(self._sizes[1], 1)
        factors = {
            m.name: (a.reshape(-1, *m.a_shape), b.reshape(-1, *m.b_shape))
            for m, a, b in zip(self.geometry.modules, parts_a, parts_b, strict=True)
        }
        names = tuple(str(i) for i in range(len(features))) if names is None else tuple(names)
        return Adapter(self.lora_config, self.geometry, factors, names)

    def codes(self, images: Tensor) -> Tensor:
        """What public training keeps of images (N, C, H, W): their embeddings (N, k)."""
        return self.encoder(images)

    def simulate(self, codes: Tensor, sizes: Tensor, noise_std: Tensor, generator: torch.Generator) -> Tensor:
        """What the trunk reads of simulated noisy sums; arguments as in `simulate_sums`."""
        return self.features(*simulate_sums(codes, sizes, noise_std, generator))

    def using(self, coordinates: int) -> HyperNetwork:
        """Itself, for sums of so many coordinates besides the count; see `nested` for one that has a choice."""
        present = self.encoder.config.dimension - 1
        if coordinates != present:
            raise InputError(f"this hypernetwork reads sums of {present} coordinates, not {coordinates}.")
        return self

    def fitting(self, noise_std: float, declared_per_class: float) -> HyperNetwork:
        """Itself, whatever the noise on a sum and the declared size of a class."""
        return self

    def decoder_state(self) -> dict[str, Tensor]:
        """Weights without the encoder's."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("encoder.")}


def noisy_count(noisy_sum: Tensor, noise_std: Tensor | float, count_coordinate: float = COUNT_COORDINATE) -> Tensor:
    """Counts (T,) of noisy sums (T, k), at least their own noise level, (T,) or one number, and at least one."""
    noise = torch.as_tensor(noise_std, dtype=noisy_sum.dtype, device=noisy_sum.device)
    floor = (noise / count_coordinate).clamp_min(1.0)
    return torch.maximum(noisy_sum[:, 0] / count_coordinate, floor)


def summary(
    noisy_sum: Tensor, noise_std: Tensor, count_coordinate: float = COUNT_COORDINATE
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy mean (T, k - 1) scaled to unit size, log noise on it (T, 1), log noisy count (T, 1).

    The count is kept at least at its own noise level (and at least one), so that a sum which is all noise gives a
    bounded mean, and the mean is pulled back into the ball in which every true mean lies. Less noise on the mean, and
    more images, than public training knows are told as the least and the most that it knows.
    """
    count = noisy_count(noisy_sum, noise_std, count_coordinate)
    mean = noisy_sum[:, 1:] / count[:, None]
    noise = (noise_std / count).clamp_min(LEAST_NOISE)
    told = count.clamp_max(LARGEST_SET)
    length = mean.norm(dim=1, keepdim=True).clamp_min(1e-6)
    mean = mean * (1.5 / length).clamp_max(1.0)
    return 8.0 * mean, (noise.log() + 4.0)[:, None] / 2.0, (told.log() - 4.0)[:, None] / 2.0


def simulate_sums(codes: Tensor, sizes: Tensor, noise_std: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy sums (T, k) of sets of the given sizes (T,), from embeddings (T, S, k) of up to S of their images.

    A set larger than S has the mean of its S images: the difference is below the noise that matters.
    """
    chosen = torch.arange(codes.shape[1])[None] < sizes[:, None]
    mean = (codes * chosen[:, :, None]).sum(1) / chosen.sum(1, keepdim=True)
    sums = mean * sizes[:, None]
    return sums + noise_std[:, None] * torch.randn(sums.shape, generator=g), noise_std


def save_pretrained(folder: Path, base_model: nn.Module, hypernetwork: HyperNetwork, manifest: dict) -> None:
    """Write base model (diffusers folder), encoder and hypernetwork (safetensors, half precision) and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    halved: Any = copy.deepcopy(base_model).half()
    halved.save_pretrained(folder / "base")
    for name, state in (("encoder", hypernetwork.encoder.state_dict()), ("hypernetwork", hypernetwork.decoder_state())):
        write_half(folder / f"{name}.safetensors", state)
    shapes = {"encoder": asdict(hypernetwork.encoder.config), "hypernetwork": asdict(hypernetwork.config)}
    (folder / "manifest.json").write_text(json.dumps({**shapes, **manifest}, indent=2) + "\n")


def write_half(path: Path, state: Mapping[str, Tensor]) -> None:
    """Weights in half precision, as safetensors."""
    half = {key: value.detach().cpu().half().contiguous() for key, value in state.items()}
    path.write_bytes(to_safetensors(half))


def read_half(path: Path) -> dict[str, Tensor]:
    """Inverse of `write_half`, in float32."""
    return {key: value.float() for key, value in load_file(str(path)).items()}


def resolve(name_or_path: str | Path, weights: str = "hypernetwork.safetensors") -> Path:
    """The folder of shipped weights called ``name``, or the given folder itself, if it holds the file ``weights``."""
    for folder in (WEIGHTS / str(name_or_path), Path(name_or_path), Path(name_or_path) / "weights"):  # of a training
        if (folder / "manifest.json").is_file() and (folder / weights).is_file():
            return folder
    if str(name_or_path) in NON_COMMERCIAL:
        raise InputError(
            f"the weights {str(name_or_path)!r} are for non-commercial research only (ImageNet's terms) and not in the "
            f"package: take hyperdp_lib/weights/{name_or_path} from the source repository and give that folder."
        )
    shipped = ", ".join(sorted(p.parent.name for p in WEIGHTS.glob(f"*/{weights}"))) or "none"
    raise InputError(
        f"no {weights.removesuffix('.safetensors')} {str(name_or_path)!r}: shipped are {shipped}, "
        "or give a folder of trained weights."
    )


def geometry(name_or_path: str | Path) -> tuple[int, int]:
    """Side in pixels and number of channels of the images that these weights are for, without loading them.

    >>> geometry("glyphs")
    (16, 1)
    """
    folder = foundation(resolve(name_or_path))
    try:
        config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
        return int(config["sample_size"]), int(config["in_channels"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"the models in {str(folder)!r} are damaged ({type(error).__name__}): train again") from error


def stretches(name_or_path: str | Path) -> bool:
    """Whether images are read for these weights with their contrast stretched, see `hyperdp_lib.data.stretched`.

    >>> stretches("glyphs")
    False
    """
    manifest = json.loads((foundation(resolve(name_or_path)) / "manifest.json").read_text(encoding="utf-8"))
    return bool((manifest.get("public_source") or {}).get("stretch", False))


def shipped() -> tuple[str, ...]:
    """Names of the shipped weights that have a base model of their own, in alphabetical order."""
    folders = sorted(path.parent for path in WEIGHTS.glob("*/hypernetwork.safetensors"))
    return tuple(folder.name for folder in folders if (folder / "base").is_dir())


def foundation(folder: Path) -> Path:
    """The folder with the base model and the feature network that weights were made for: their own, or another's."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return WEIGHTS / manifest["builds_on"] if "builds_on" in manifest else folder


def features_file(name_or_path: str | Path = "glyphs") -> Path:
    """Where the feature network is that scores samples of these weights; see `evaluation.FeatureNetwork`."""
    return foundation(resolve(name_or_path)) / "features.safetensors"


def load_pretrained(name_or_path: str | Path = "glyphs", device: str = "cpu") -> tuple[nn.Module, HyperNetwork]:
    """Base model and hypernetwork, frozen, float32, in evaluation mode.

    >>> base_model, hypernetwork = load_pretrained("glyphs")  # doctest: +SKIP
    """
    from hyperdp_lib.diffusion import load_base_model

    folder = resolve(name_or_path)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        base_model = load_base_model(foundation(folder) / "base")
        hypernetwork = _load(folder, base_model, manifest)
        if (folder / PRIORS_FILE).is_file():
            hypernetwork.priors = load_file(str(folder / PRIORS_FILE))
    except (SafetensorError, OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the models in {str(folder)!r} are damaged ({type(error).__name__}): train again") from error
    hypernetwork.base_model_sha256 = tensors_sha256(base_model.state_dict())
    return base_model.to(device), hypernetwork.to(device).eval().requires_grad_(False)


def _load(folder: Path, base_model: nn.Module, manifest: dict) -> HyperNetwork:
    if manifest.get("kind") == "nested":
        from hyperdp_lib.nested import load_nested

        return load_nested(folder, base_model, manifest)
    encoder = Encoder(EncoderConfig(**manifest["encoder"]))
    encoder.load_state_dict(read_half(folder / "encoder.safetensors"))
    hypernetwork = HyperNetwork(encoder, base_model, HyperNetworkConfig(**manifest["hypernetwork"]))
    state = read_half(folder / "hypernetwork.safetensors")
    hypernetwork.load_state_dict(state | {f"encoder.{k}": v for k, v in encoder.state_dict().items()})
    return hypernetwork

"""Mixture of public adapters: the noisy sum chooses among K LoRA adapters that were trained on public tasks.

The rival that asks whether an adapter must be *generated*: here the noisy embedding, its noise level and its count
(`hypernetwork.summary`) only decide how much of each of K fixed adapters to take (in the spirit of adapter soups and
of mixtures of LoRA experts). A gate gives weights w_1 .. w_K that sum to one, and the adapter of a data set is

    Delta W = sum_k w_k B_k A_k,

mixed as products, not as factors: the A_k are stacked and the B_k are stacked times w_k, so that the mixture is an
ordinary LoRA adapter of rank K r and exactly that sum. The hard choice takes the one adapter of the largest weight,
of rank r. Gate and adapters are trained end to end on public tasks with simulated noise; the base model is the shipped
one and stays as it is. The gate starts from clusters of public embeddings: near a centre, its adapter.

The release is the method's: one noisy sum. Nothing is trained on private images.

``python -m hyperdp_lib.baselines.adapter_mixture --out FOLDER`` trains it.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion
from hyperdp_lib.adapter import Adapter, lora_geometry
from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.baselines import decoders
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import Encoder, embed
from hyperdp_lib.hypernetwork import (
    TARGET_MODULES,
    HyperNetwork,
    load_pretrained,
    read_half,
    resolve,
    summary,
    write_half,
)
from hyperdp_lib.training import PRESETS, StageConfig, adapted_loss

STAGE = StageConfig(steps=1200, tasks=64, images=8, learning_rate=3e-3, ema=0.998)


@dataclass(frozen=True)
class AdapterMixtureConfig:
    """Public choices of a release.

    Parameters
    ----------
    hard : bool
        Take the one adapter of the largest weight instead of the mixture.
    """

    hard: bool = False


@dataclass(frozen=True)
class MixtureShape:
    """Number K and rank r of the adapters, the layers they adapt, and the gate's hidden width (public)."""

    num_adapters: int = 32
    r: int = 4
    target_modules: str = TARGET_MODULES
    hidden: int = 128

    def lora_config(self, members: int) -> Any:
        """PEFT configuration of ``members`` adapters in one: their ranks add up, and the scaling stays 1."""
        from peft import LoraConfig

        rank = members * self.r
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=self.target_modules)


class AdapterMixture(nn.Module):
    """K adapters of one base model, and the gate from noisy sums to weights over them.

    Parameters
    ----------
    base_model : torch.nn.Module
        The model to adapt; copied, and frozen.
    dimension : int
        k, the length of a noisy sum.
    shape : MixtureShape
    """

    def __init__(self, base_model: nn.Module, dimension: int, shape: MixtureShape | None = None) -> None:
        super().__init__()
        self.dimension = dimension
        self.shape = shape = MixtureShape() if shape is None else shape
        self.base_model = copy.deepcopy(base_model).eval().requires_grad_(False)
        count = shape.num_adapters
        if count < 1 or shape.r < 1:
            raise InputError(f"num_adapters and r must be at least 1, got {count} and {shape.r}.")
        self._lora = {m: shape.lora_config(m) for m in {1, count}}
        self._geometry = {m: lora_geometry(base_model, config) for m, config in self._lora.items()}
        one = self._geometry[1].modules
        if any(module.kind != "linear" for module in one):
            raise InputError("a mixture of adapters is made for linear layers: choose other target_modules.")
        # A as PEFT draws it and B = 0: no change at the start
        drawn = [torch.empty(count, *m.a_shape).uniform_(-1, 1) / m.a_shape[1] ** 0.5 for m in one]
        self.a = nn.ParameterList(drawn)
        self.b = nn.ParameterList(torch.zeros(count, *m.b_shape) for m in one)
        self.gate = nn.Linear(dimension + 1, count)
        last = nn.Linear(shape.hidden, count)
        for layer in (self.gate, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.correction = nn.Sequential(
            nn.Linear(dimension + 1, shape.hidden), nn.GELU(), nn.LayerNorm(shape.hidden), last
        )
        self.encoder_sha256: str | None = None  # of the encoder whose sums it was trained on, once it is

    @torch.no_grad()
    def start_from(self, public_means: Tensor, sharpness: float = 0.1, seed: int = 0) -> None:
        """Set the gate to softmin of the squared distance to K cluster centres of public mean embeddings (P, k - 1)."""
        from sklearn.cluster import KMeans

        # as `summary` scales them
        points = 8.0 * public_means.double().numpy()
        found = KMeans(self.shape.num_adapters, n_init=1, random_state=seed).fit(points)
        centres = torch.from_numpy(found.cluster_centers_).float()
        self.gate.weight.zero_()
        self.gate.weight[:, : centres.shape[1]] = 2 * sharpness * centres
        self.gate.bias.copy_(-sharpness * centres.square().sum(1))

    def weights(self, noisy_sum: Tensor, noise_std: Tensor | float) -> Tensor:
        """Weights (T, K), at least 0 and of sum 1 in each row, from noisy sums (T, k) and noise levels (T,) or one."""
        std = torch.as_tensor(noise_std, dtype=noisy_sum.dtype, device=noisy_sum.device).expand(len(noisy_sum))
        features = torch.cat(summary(noisy_sum, std), 1)
        return (self.gate(features) + self.correction(features)).softmax(1)

    def mix(self, weights: Tensor, names: Sequence[str] | None = None) -> Adapter:
        """Adapters of rank K r whose products are ``sum_k weights[t, k] B_k A_k``, exactly; weights (T, K)."""
        members, count = weights.shape
        factors = {}
        for module, a, b in zip(self._geometry[1].modules, self.a, self.b, strict=True):
            weighted = weights[:, :, None, None] * b  # (T, K, out, r)
            factors[module.name] = (
                a.flatten(0, 1).expand(members, -1, -1),
                weighted.transpose(1, 2).flatten(2),  # (T, out, K r), in the order of A's rows
            )
        return Adapter(self._lora[count], self._geometry[count], factors, _names(names, members))

    def decoder_state(self) -> dict[str, Tensor]:
        """Weights without the base model's."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("base_model.")}

    @contextmanager
    def merged(self, weights: Tensor) -> Iterator[nn.Module]:
        """While inside, the base model computes as under ``mix(weights)``, by full matrices W + Delta W.

        For training: K r is no longer small, and then this is twice as fast. Forwards only on batches of T M examples,
        sorted by data set.
        """
        layers, changed = dict(self.base_model.named_modules()), []
        try:
            for module, a, b in zip(self._geometry[1].modules, self.a, self.b, strict=True):
                layer: Any = layers[module.name]
                products = (b @ a).flatten(1)  # (K, out in)
                full = layer.weight + (weights @ products).unflatten(1, layer.weight.shape)  # (T, out, in)
                layer.forward = functools.partial(_per_set_linear, full, layer.bias)
                changed.append(layer)
            yield self.base_model
        finally:
            for layer in changed:
                del layer.forward

    def choose(self, weights: Tensor, names: Sequence[str] | None = None) -> Adapter:
        """Adapters of rank r: for each row of the weights (T, K) the one of the largest."""
        best = weights.argmax(1)
        factors = {
            module.name: (a[best], b[best])
            for module, a, b in zip(self._geometry[1].modules, self.a, self.b, strict=True)
        }
        return Adapter(self._lora[1], self._geometry[1], factors, _names(names, len(weights)))


def _per_set_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Linear layer with weights (T, out, in) for the T equal shares of the first axis of x."""
    result = x.reshape(len(weight), -1, x.shape[-1]) @ weight.mT
    return (result if bias is None else result + bias).view(*x.shape[:-1], -1)


def _names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(count)) if names is None else tuple(names)


@dataclass(frozen=True, eq=False)
class MixedAdapters:
    """Adapters mixed for the private classes, and all that is needed to sample from them.

    Attributes
    ----------
    adapter : Adapter
        T = number of classes.
    model : torch.nn.Module
        The base model.
    weights : Tensor
        ``(T, K)``, how much of each public adapter; as public as the noisy sum they come from.
    noisy_sum : ndarray
        ``(T, k)``.
    class_names : tuple of str
    config : AdapterMixtureConfig
    seconds : float
        Wall-clock time of the release.
    trained_parameters, noise_dimension, num_releases : int
        0 (nothing is trained on private images), T k, 1.
    """

    adapter: Adapter
    model: nn.Module
    weights: Tensor
    noisy_sum: np.ndarray
    class_names: tuple[str, ...]
    config: AdapterMixtureConfig
    seconds: float
    trained_parameters: int = 0
    noise_dimension: int = 0
    num_releases: int = 1

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        labels = decoders.shares(num_images, self.class_names)
        drawn = diffusion.sample(
            self.model, self.adapter, num_images, generator=generator, num_steps=num_steps, batch_size=batch_size
        )
        return drawn, labels


@torch.no_grad()
def release_adapter_mixture(
    private_images: Tensor,
    private_labels: Tensor | None,
    hypernetwork: HyperNetwork,
    decoder: AdapterMixture,
    config: AdapterMixtureConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    progress: bool = False,
) -> tuple[MixedAdapters, Certificate]:
    """One noisy sum of the private images' embeddings, and a mixture of public adapters for each class.

    Arguments and errors are those of `decoders.release_noisy_sum`; ``decoder`` is public, see `load_adapter_mixture`;
    nothing takes long enough for ``progress``.
    """
    decoders.check_encoder(hypernetwork, decoder.dimension, decoder.encoder_sha256)
    started = time.perf_counter()
    noisy_sum, noise_std, statement = decoders.release_noisy_sum(
        private_images,
        private_labels,
        hypernetwork,
        method="adapter_mixture",
        epsilon=epsilon,
        num_private_declared=num_private_declared,
        delta=delta,
        neighboring_relation=neighboring_relation,
        class_names=class_names,
        seed=seed,
        hypernetwork_sha256=tensors_sha256(decoder.decoder_state()),
        base_model_sha256=tensors_sha256(decoder.base_model.state_dict()),
    )
    device = decoder.gate.weight.device
    weights = decoder.weights(torch.from_numpy(noisy_sum).to(device, torch.float32), noise_std)
    adapter = (decoder.choose if config.hard else decoder.mix)(weights, class_names)
    seconds = time.perf_counter() - started
    made = MixedAdapters(
        adapter, decoder.base_model, weights, noisy_sum, tuple(class_names), config, seconds,
        noise_dimension=noisy_sum.size,
    )  # fmt: skip
    return made, statement


def load_adapter_mixture(
    name_or_path: str | Path = "glyphs-mixture", base_model: nn.Module | None = None, device: str = "cpu"
) -> AdapterMixture:
    """The trained mixture, frozen, float32, in evaluation mode; shipped by name, or from a folder.

    ``base_model`` is what it was trained for, by default that of the weights ``glyphs``.
    """
    folder = resolve(name_or_path, "mixture.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("decoder") != "adapter_mixture":
        raise InputError(f"{str(name_or_path)!r} holds no mixture of adapters: give a folder this module made.")
    base_model = diffusion.load_base_model(resolve("glyphs") / "base") if base_model is None else base_model
    if tensors_sha256(base_model.state_dict()) != manifest["base_model_sha256"]:
        raise InputError(f"the adapters in {str(name_or_path)!r} were trained for another base model.")
    state = read_half(folder / "mixture.safetensors")
    mixture = AdapterMixture(base_model, state["gate.weight"].shape[1] - 1, MixtureShape(**manifest["shape"]))
    mixture.load_state_dict(state | {f"base_model.{k}": v for k, v in base_model.state_dict().items()})
    mixture.encoder_sha256 = manifest["encoder_sha256"]
    return mixture.to(device).eval().requires_grad_(False)


def task_loss(mixture: AdapterMixture, hard: bool = False) -> decoders.TaskLoss:
    """Denoising loss of query images under the mixture for their own task."""

    def loss(queries: Tensor, noisy_sums: Tensor, noise_std: Tensor, g: torch.Generator) -> Tensor:
        weights = mixture.weights(noisy_sums, noise_std)
        if hard:
            return adapted_loss(mixture.base_model, mixture.choose(weights), queries, g)
        with mixture.merged(weights) as base_model:
            return diffusion.denoising_loss(base_model, queries.flatten(0, 1), g).mean()

    return loss


def public_means(tasks: Any, encoder: Encoder, num_tasks: int, seed: int = 0) -> Tensor:
    """Mean embeddings (num_tasks, k - 1) of public tasks of 20 images, without the count coordinate."""
    g = torch.Generator().manual_seed(seed)
    means = [
        embed(encoder, tasks.sample_tasks(min(50, num_tasks - i), 20, g).flatten(0, 1)).unflatten(0, (-1, 20)).mean(1)
        for i in range(0, num_tasks, 50)
    ]
    return torch.cat(means)[:, 1:]


def train_adapter_mixture(out: Path, *, smoke: bool = False, stage: StageConfig = STAGE) -> Path:
    """Public training for the shipped base model; resumes; writes weights, manifest and card to ``out``."""
    preset = decoders.smoke_preset() if smoke else PRESETS["glyphs"]
    stage = preset.joint_stage if smoke else stage
    base_model, hypernetwork = load_pretrained("glyphs")
    torch.manual_seed(preset.seed + 6)
    shape = MixtureShape(num_adapters=4) if smoke else MixtureShape()
    mixture = AdapterMixture(base_model, hypernetwork.encoder.config.dimension, shape)
    source = preset.public_data.tasks()
    if not (out / "checkpoints" / "adapter_mixture.pt").exists():
        means = public_means(source, hypernetwork.encoder, 40 if smoke else 2000, preset.seed + 6000)
        mixture.start_from(means, seed=preset.seed)
    held_out = decoders.HeldOut.draw(preset, hypernetwork.encoder, preset.public_data.tasks("held_out"))
    loop = decoders.train_decoder(
        "adapter_mixture",
        [(mixture.a, 1.0), (mixture.b, 1.0), (mixture.gate, 0.3), (mixture.correction, 0.3)],
        task_loss(mixture),
        hypernetwork.encoder,
        source,
        out / "checkpoints",
        stage=stage,
        preset=preset,
        held_out=held_out,
    )
    write_half(out / "mixture.safetensors", mixture.decoder_state())
    hard = held_out.loss(task_loss(mixture, hard=True))
    decoders.write_manifest(
        out,
        loop,
        name="glyphs-mixture",
        module="adapter_mixture",
        title=f"Mixture of {shape.num_adapters} public adapters",
        idea="A gate reads the noisy sum of embeddings and weighs LoRA adapters that were trained on public tasks",
        shape=shape,
        public_data=source.describe(),
        references={"adapter_mixture, hard choice": round(hard, 5), **held_out.references(base_model, hypernetwork)},
        hashes={
            "encoder_sha256": tensors_sha256(hypernetwork.encoder.state_dict()),
            "base_model_sha256": tensors_sha256(base_model.state_dict()),
        },
    )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on training, the mixture."""
    return decoders.command("adapter_mixture", train_adapter_mixture, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

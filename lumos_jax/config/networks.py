"""Settings of the networks: the frozen encoder and autoencoder, the diffusion transformer and its process."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, ClassVar, Literal

from lumos_jax.config.fields import Dtype, Rule, at_least

TEXT_KINDS = ("t5", "clip_text")  # of encoder.kind
_OUTPUTS = {"vit": ("cls", "patch", "all", "pooled"), "t5": ("all",), "clip_text": ("all", "pooled")}


def custom_size(size: str) -> tuple[int, int, int] | None:
    """Width, depth and heads of a size written out, as "128x4x4"; None of names. A patch size behind it is left out."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", size.partition("/")[0])
    return tuple(map(int, found.groups())) if found else None


def size_of(*names: str, patched: bool = False) -> Rule:
    """One of these names, or a size written out; `patched`: perhaps with the side of patches behind it."""

    def allows(size: str) -> bool:
        name, _, patch = size.partition("/")
        width, depth, heads = custom_size(size) or (4, 1, 1)
        if name not in names and custom_size(size) is None:
            return False
        if name != size and not (patched and patch.isdecimal() and int(patch)):
            return False
        return min(width, depth, heads) >= 1 and width % heads == width % 4 == 0  # sin-cos positions

    text = f"one of {', '.join(names)}, or WIDTHxDEPTHxHEADS as 128x4x4, the width a multiple of heads and of 4"
    return Rule(allows, f"{text}; with patches of other than 16 pixels, as B/8" if patched else text)


_WEIGHTS = Rule(
    lambda weights: re.fullmatch(r"random:\d+|(?!random:).+", weights) is not None,
    "a directory, a file, a hub id, or random:<seed> with a whole number",
)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The frozen encoder, of images (vit) or of captions (t5, clip_text), whose features are the condition."""

    group: ClassVar[str] = "config.encoder"  # for messages
    kind: Annotated[Literal["vit", "t5", "clip_text"], "t5: the encoder of T5 v1.1 or Flan-T5"] = "vit"
    weights: Annotated[
        str,
        _WEIGHTS,
        "directory; .safetensors, .npz, .pth file; hub id; random:<seed>; or scenes, scenes-clip, scenes-moco, which come with",
        "the package (docs/encoders.md)",
    ] = "facebook/dino-vitb16"
    output: Annotated[
        Literal["cls", "patch", "all", "pooled"],
        "vit: any; pooled is what its projection head makes of [CLS] (CLIP, MoCo-v3); t5: all; clip_text: all, pooled",
    ] = "cls"
    normalize: Annotated[
        Literal["none", "unit", "standard", "white"],
        "vit: unit: each token to length 1 (Lumos); standard: each token to mean 0 and variance 1 over its features (RCG);",
        "white: see lumos_jax/encoders/whitening.py, of weights that hold its statistics, as exported encoders do",
    ] = "unit"
    interpolation: Annotated[
        Literal["bilinear", "bicubic"], "vit: bilinear as Lumos, bicubic as CLIP and DINOv2 were trained"
    ] = "bilinear"
    image_size: Annotated[
        int, at_least(1), "vit: pixels to which the shorter side is resized (antialiased), and of the center crop"
    ] = 224
    max_tokens: Annotated[
        int, at_least(1), "t5, clip_text: token ids a caption, padding included; clip_text's weights have 77 at most"
    ] = 120
    tokenizer: Annotated[
        str,
        't5, clip_text: directory, hub id, or "scenes", which comes with the package; empty: the files beside the weights',
    ] = ""
    size: Annotated[str, size_of("Ti", "S", "B", "L", patched=True), "of random weights"] = "B"

    @property
    def patch_size(self) -> int:
        """Side of the patches of random weights."""
        return int(self.size.partition("/")[2] or 16)

    def check(self) -> dict[str, bool]:
        random, text = self.weights.startswith("random:"), self.kind in TEXT_KINDS
        wrong = {
            f"output={self.output} ({' or '.join(_OUTPUTS[self.kind])} allowed)": self.output not in _OUTPUTS[self.kind],
            f"tokenizer={self.tokenizer!r} (images have none)": not text and self.tokenizer,
            "tokenizer='' (random weights have none beside them; \"scenes\" comes with us)":
                text and random and not self.tokenizer,
        }  # fmt: skip
        named = "; ".join(f"{self.group}.{field}" for field, is_wrong in wrong.items() if is_wrong)
        return {
            f"{self.group}.kind={self.kind} with weights={self.weights} does not go with {named}": bool(named),
            f"{self.group}.image_size={self.image_size} is not divisible by the patches of encoder.size={self.size}":
                random and not text and self.image_size % self.patch_size > 0,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AlignEncoder(Encoder):
    """The frozen image encoder that hidden tokens are aligned with: fields as of config.encoder."""

    group: ClassVar[str] = "config.align.encoder"
    # No fields here: patch tokens of a ViT are what alignment takes.
    kind: ClassVar[str] = "vit"
    output: ClassVar[str] = "patch"
    max_tokens: ClassVar[int] = 0
    tokenizer: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True)
class Align:
    """Representation alignment (REPA): in training, hidden tokens of the transformer are pulled, through an MLP, towards the
    patch tokens that a frozen image encoder gives for the clean image; see lumos_jax/models/alignment.py."""

    weight: Annotated[float, at_least(0), "of the negative cosine similarity in the loss; 0: off; REPA's is 0.5"] = 0.0
    block: Annotated[int, at_least(1), "the block whose output is aligned, counted from 1; REPA's is 8 of XL's 28"] = 8
    encoder: AlignEncoder = AlignEncoder()


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The frozen map between pixels and latents."""

    weights: Annotated[
        str,
        _WEIGHTS,
        "Stable Diffusion's: directory (diffusers layout), .safetensors file, hub id or random:<seed>;",
        "identity: pixels in [-1, 1] are the latents",
    ] = "stabilityai/sd-vae-ft-mse"
    scaling_factor: Annotated[float, "multiplies the latents so that their variance is near one"] = 0.18215

    @property
    def kind(self) -> str:
        return "identity" if self.weights == "identity" else "kl"


@dataclasses.dataclass(frozen=True)
class Model:
    """The diffusion transformer."""

    size: Annotated[str, size_of("S", "B", "L", "XL"), "the DiT paper's table"] = "XL"
    patch_size: Annotated[int, at_least(1), "latent pixels a side of a token"] = 2
    final: Annotated[
        Literal["auto", "table", "adaln"],
        "where the last modulation is from: table: a learned table and the timestep (PixArt, Lumos); adaln: SiLU and a Linear",
        "(DiT); auto: adaln for priors without cross-attention, table for the rest; what starts from the former sets adaln",
    ] = "auto"
    activation: Annotated[
        Literal["gelu_tanh", "gelu"], "of the MLPs: gelu_tanh as DiT and Lumos, gelu (exact) as RCG"
    ] = "gelu_tanh"
    dtype: Annotated[Dtype, "compute dtype, of the frozen networks too; parameters that train are float32"] = "bfloat16"
    remat: Annotated[
        Literal["none", "dots", "qkv", "mlp", "full"],
        "what the backward pass recomputes: nothing; dots: all but matmuls and cuDNN's attention; qkv: all but the MLPs'",
        "matmuls, queries, keys and values; mlp: all but the MLPs' matmuls; everything",
    ] = "none"


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The corruption process, what the network predicts, and its loss."""

    schedule: Annotated[Literal["linear", "cosine", "flow"], "flow: straight lines, flow matching"] = "linear"
    steps: ClassVar[int] = 1000  # discrete timesteps; the network's time is scaled to it for flow
    prediction: Annotated[Literal["noise", "x0", "v", "flow"], "what the network predicts"] = "noise"
    loss: Annotated[
        Literal["hybrid", "simple"],
        "hybrid: MSE + VLB with the mean detached; the network's second half of channels interpolates the log variance;",
        "simple: the MSE alone, eq. (1)",
    ] = "hybrid"
    min_snr_gamma: Annotated[float, at_least(0), "min-SNR weighting; 0: none; 5 is its paper's value"] = 0.0
    timesteps: Annotated[Literal["uniform", "logit_normal"], "distribution of timesteps in training"] = "uniform"
    logit_mean: Annotated[float, "logit_normal: mean; the standard deviation is 1"] = 0.0

    @property
    def learned_variance(self) -> bool:
        return self.loss == "hybrid"

    def check(self) -> dict[str, bool]:
        flow = self.schedule == "flow"
        return {
            f"config.diffusion.schedule={self.schedule} does not go with prediction={self.prediction}: flow goes with flow; "
            "linear and cosine go with noise, x0 and v": flow != (self.prediction == "flow"),
            "config.diffusion.loss=hybrid is for schedules linear and cosine": flow and self.loss == "hybrid",
            "config.diffusion.min_snr_gamma is for schedules linear and cosine": flow and self.min_snr_gamma > 0,
        }

"""Settings of a run: groups of typed fields with their rules; `io` reads and writes them, `migration` reads earlier layouts."""

from lumos_jax.config.data import Captions, Clips, Data, Scenes, Tfds
from lumos_jax.config.fields import flatten_settings, replace, validate
from lumos_jax.config.networks import TEXT_KINDS, Align, Autoencoder, Diffusion, Encoder, Model, custom_size
from lumos_jax.config.settings import Settings, Task
from lumos_jax.config.training import Checkpoint, Eval, Finetune, Log, Mesh, Optimizer, Train

__all__ = [
    "TEXT_KINDS", "Align", "Autoencoder", "Captions", "Checkpoint", "Clips", "Data", "Diffusion", "Encoder", "Eval", "Finetune",
    "Log", "Mesh", "Model", "Optimizer", "Scenes", "Settings", "Task", "Tfds", "Train", "custom_size",
    "flatten_settings", "replace", "validate",
]  # fmt: skip

# ruff: noqa: RUF009
"""All settings of a run, and the rules between its groups. Every field has its rule and its meaning beside it, in its group."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from lumos_jax.config.data import Data
from lumos_jax.config.fields import between, flatten_settings
from lumos_jax.config.networks import Align, Autoencoder, Diffusion, Encoder, Model
from lumos_jax.config.training import Checkpoint, Eval, Finetune, Log, Mesh, Optimizer, Train


@dataclasses.dataclass(frozen=True)
class Task:
    """Which task, how its condition is dropped, and the settings of its own, in a class that the task derives from this one."""

    name: Annotated[str, "a module of lumos_jax/tasks, or the import path of another"] = "i2i"
    condition_dropout: Annotated[
        float, between(0, 1), "probability of the null condition, for classifier-free guidance"
    ] = 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run; `config.json` in the run's directory holds them."""

    data: Data = Data()
    encoder: Encoder = Encoder()
    autoencoder: Autoencoder = Autoencoder()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    align: Align = Align()
    task: Task = Task()
    optimizer: Optimizer = Optimizer()
    finetune: Finetune = Finetune()
    train: Train = Train()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    eval: Eval = Eval()
    init_from: Annotated[
        str, "weights to start from: a run's directory (its EMA), an imported prior's, or a released file or hub id"
    ] = ""

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass, over all devices, in training and in evaluation."""
        return self.train.batch_size // self.optimizer.accumulate

    def check(self) -> dict[str, bool]:
        flow, solves = self.diffusion.schedule == "flow", self.eval.sampler in ("euler", "heun")
        needed = max(self.eval.sheet[0], self.eval.num_examples, self.eval.num_scored)
        return self._allowed_changes() | {
            f"config.eval.sampler={self.eval.sampler} does not solve diffusion.schedule={self.diffusion.schedule}: "
            "euler and heun are for flow; ddpm, ddim and dpm++ for linear and cosine": flow != solves,
            f"config.eval.steps={self.eval.steps} exceeds the {self.diffusion.steps} timesteps of diffusion":
                not flow and self.eval.steps > self.diffusion.steps,
            f"config.data.holdout={self.data.holdout} must be at least {needed} (eval.num_examples, num_scored and sheet); "
            "set config.eval.every=0 to train without a held-out set": self.eval.every > 0 and self.data.holdout < needed,
            f"config.train.batch_size={self.train.batch_size} is not divisible by optimizer.accumulate="
            f"{self.optimizer.accumulate}": self.train.batch_size % self.optimizer.accumulate > 0,
            f"config.optimizer.warmup_steps={self.optimizer.warmup_steps} leaves no step of train.steps={self.train.steps} to "
            "decay": self.optimizer.decay == "cosine" and self.optimizer.warmup_steps >= self.train.steps,
            f"config.mesh.context={self.mesh.context}: frames of clips are sharded over it, and the records of "
            f"config.task.name={self.task.name} with config.data.sample_type={self.data.sample_type} have none; leave it at 1":
                self.mesh.context > 1 and self.data.sample_type != "clip",
        }  # fmt: skip

    def _allowed_changes(self) -> dict[str, bool]:
        known, wrong = flatten_settings(dataclasses.asdict(self)), {}
        for name in self.checkpoint.allow_change:
            here = f"config.checkpoint.allow_change names {name!r}"
            wrong[f"{here}, which is no field"] = name not in known and not name.endswith(".fingerprint")
            wrong[f"{here}: what trains may change with init_from only"] = name.startswith(("finetune.", "align."))
            held = name == "optimizer.state_dtype"
            wrong[f"{here}: a checkpoint holds that dtype; change it with init_from only"] = held
        return wrong

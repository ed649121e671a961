"""What every task's config starts from: all settings (docs/settings.md) with their defaults."""

from lumos_jax.config import io as config_io


def base():
    """A ConfigDict with every field; assigning an unknown one is an error."""
    return config_io.default_config()


def set_task(config, name):
    """Chooses the task, with the defaults of its settings."""
    config.task = config_io.default_config(name).task


def shipped_encoder(config):
    """Sets the self-supervised ViT that comes with the package, for pictures of data.image_size; features whitened."""
    side = config.data.image_size
    config.encoder = base().encoder
    config.encoder.weights = "scenes"
    config.encoder.normalize = "white"
    config.encoder.image_size = side


def shorten(config):
    """Makes it a run of a dozen steps on 256 scenes at 16 px."""
    config.data.image_size = 16
    config.data.scenes.num_scenes = 256
    config.encoder.image_size = 16
    config.optimizer.name = "adamw"  # compiles sooner
    config.optimizer.warmup_steps = 2
    config.train.batch_size = 16
    config.train.steps = 12
    config.checkpoint.every = 4
    config.log.every = 2
    config.eval.every = 6
    config.eval.num_examples = 32


def pick(size, builders):
    """The config that `configs/<task>.py:<size>` names.

    Args:
      size: what stands behind the colon.
      builders: {name: function without arguments -> ConfigDict}.
    """
    if size not in builders:
        known = ", ".join(f":{name}" if name else "(nothing)" for name in builders)
        raise ValueError(f"there is no size {size!r}; after the file's name write one of: {known}")
    return builders[size]()


def vary(name, builders, variants):
    """The config that `configs/ablations/<study>.py:<size>,<variant>` names; the paper's size needs no name.

    Args:
      name: what stands behind the colon.
      builders: as for `pick`.
      variants: {name: function that changes a ConfigDict, given the size's name}.
    """
    parts = name.split(",") if name else []
    chosen = [part for part in parts if part in variants]
    if len(chosen) != 1:
        raise ValueError(
            f"after the file's name write :VARIANT or :SIZE,VARIANT; the variants are {', '.join(variants)}"
        )
    size = ",".join(part for part in parts if part not in variants)
    config = pick(size, builders)
    variants[chosen[0]](config, size)
    return config

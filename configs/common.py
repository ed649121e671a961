"""What every task's config starts from: all fields of lumos_jax/config.py with their defaults."""

from lumos_jax import config_io


def base():
    """A ConfigDict with every field; assigning an unknown one is an error."""
    return config_io.default_config()


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

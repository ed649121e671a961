"""Settings of a run: `settings` has the fields, `rules` what they obey, `io` reads and writes them."""

from lumos_jax.config.settings import *  # noqa: F403
from lumos_jax.config.settings import TEXT_KINDS as TEXT_KINDS

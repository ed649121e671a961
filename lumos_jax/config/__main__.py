"""Prints docs/settings.md: python -m lumos_jax.config > docs/settings.md"""

from lumos_jax.config import documentation

print(documentation.text(), end="")

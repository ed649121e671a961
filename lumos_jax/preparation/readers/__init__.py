"""Readers of the forms in which collections are downloaded: every file here registers its kinds in `base.READERS`."""

from lumos_jax.preparation.readers import folders, tables, tars
from lumos_jax.preparation.readers.base import READERS, Candidate, DamagedInput, Input

__all__ = ["READERS", "Candidate", "DamagedInput", "Input", "folders", "tables", "tars"]

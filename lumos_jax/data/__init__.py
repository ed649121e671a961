"""Images in a known order: sources, order, decoding, batches. Knows no trainer and no network."""

from lumos_jax.data.corrupt import CorruptMeter, TooManyCorruptRecords
from lumos_jax.data.loaders import describe_row, make_loader
from lumos_jax.data.order import holdout_records
from lumos_jax.data.pipeline import load_image, make_record_iterator, make_train_iterator, read_batch
from lumos_jax.data.shards import write_arrayrecord
from lumos_jax.data.sources import MixtureSource, Source, make_source
from lumos_jax.scenes.truth import scenes_of, truth_of

__all__ = [
    "CorruptMeter",
    "MixtureSource",
    "Source",
    "TooManyCorruptRecords",
    "describe_row",
    "holdout_records",
    "load_image",
    "make_loader",
    "make_record_iterator",
    "make_source",
    "make_train_iterator",
    "read_batch",
    "scenes_of",
    "truth_of",
    "write_arrayrecord",
]

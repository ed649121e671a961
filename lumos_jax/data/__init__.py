"""Records in a known order: sources, sample types, order, decoding, batches. Knows no trainer and no network.

Importing it loads neither JAX nor Grain nor the libraries of single sources: those wait until they are used.
"""

from lumos_jax.data import records, sources
from lumos_jax.data.base import SOURCES, CorruptRecord, Source, make_source, same_fingerprint
from lumos_jax.data.order import holdout_records
from lumos_jax.data.pipeline import load_image, make_record_iterator, make_train_iterator, read_batch
from lumos_jax.data.records import describe_row, make_loader
from lumos_jax.data.records.base import SAMPLE_TYPES, CorruptMeter, TooManyCorruptRecords
from lumos_jax.data.shards import write_arrayrecord
from lumos_jax.data.sources.scenes import scenes_of, truth_of

__all__ = [
    "SAMPLE_TYPES", "SOURCES", "CorruptMeter", "CorruptRecord", "Source", "TooManyCorruptRecords", "describe_row",
    "holdout_records", "load_image", "make_loader", "make_record_iterator", "make_source", "make_train_iterator", "read_batch",
    "records", "same_fingerprint", "scenes_of", "sources", "truth_of", "write_arrayrecord",
]  # fmt: skip

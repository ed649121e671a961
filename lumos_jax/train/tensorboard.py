"""TensorBoard events (scalars and images) without TensorFlow.

Records and their checksums are TensorBoard's own (`tensorboard.summary.writer.record_writer`). Its `EventFileWriter` would
import TensorFlow where that is installed, which takes seconds, and memory of a GPU. The methods have the names of clu's
`MetricWriter`, which cannot be inherited from either: importing `clu.metric_writers` imports TensorFlow.
"""

from __future__ import annotations

import io
import os
import pathlib
import socket
import time
from collections.abc import Mapping

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter


class EventWriter:
    """Writes one event file in `directory`; buffered until `flush`."""

    def __init__(self, directory: str | os.PathLike, start: int = 0):
        """`start`: the last step that counts. TensorBoard drops points of later steps that a former process wrote."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard finds event files by this name and reads them in its order.
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(open(directory / name, "xb"))  # noqa: SIM115 (closed by close())
        self._write(file_version="brain.Event:2")
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=start + 1, session_log=session)

    def _write(self, **fields) -> None:
        self.records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one point per name."""
        values = [summary_pb2.Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=values))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes one image (H, W, 3) uint8 per name, as PNG."""
        values = []
        for name, pixels in images.items():
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            height, width, _ = pixels.shape
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
            )
            values.append(summary_pb2.Summary.Value(tag=name, image=image))
        self._write(step=step, summary=summary_pb2.Summary(value=values))

    def flush(self) -> None:
        self.records.flush()

    def close(self) -> None:
        self.records.close()

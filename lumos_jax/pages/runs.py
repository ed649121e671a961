"""A trained run behind a page: loaded and compiled once, in the background; it samples as a command line says.

The page builds the arguments of `lumos_jax.sample` and passes them to its parser, so that the page's samples are those of the
command line that it shows.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import queue
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from lumos_jax import data, sample
from lumos_jax.checkpoints import CheckpointError
from lumos_jax.tasks.sampling import Sampled
from lumos_jax.train import sampler

PROBLEMS = (ValueError, OSError, CheckpointError)  # that have a message for users
THUMBNAILS = 4
PREVIEW_SECONDS = 0.5  # at least, between two previews: decoding takes time from sampling
MAX_PIXELS = 64 << 20  # of an upload
STATUS_SECONDS = 0.1
CLOSE_SECONDS = 10.0
_DEVICE = threading.Lock()  # one program at a time: loading, compiling, sampling


class Stopped(Exception):
    """Someone stopped the sampling."""


@dataclasses.dataclass
class Update:
    """What a page shows while and after it samples.

    Attributes:
      status: a line for people.
      preview: what the network predicts of the samples now, uint8 (B, [F,] H, W, 3).
      sampled, files: the samples, and the files as `lumos_jax.sample` writes them.
    """

    status: str
    preview: np.ndarray | None = None
    sampled: Sampled | None = None
    files: Sequence[str] = ()


class Run:
    """A run. `load` makes `sampler`; until then `status` says how far it is.

    Attributes:
      workdir, settings: of the run; kind: its Sampling class.
      thumbnails: of held-out records, uint8 (n, S, S, 3), n may be 0. caption: of the first one, where records have captions.
      ready: set when `load` has ended. closed: to be set when the program ends.
    """

    def __init__(self, workdir: str):
        """Raises ValueError: no such run, or one that samples nothing."""
        self.workdir = workdir
        self.settings, self.kind = sampler.load_settings(workdir)
        self.name = pathlib.Path(workdir).resolve().name
        self.sampler: sampler.Sampler | None = None
        self.status = f"{self.name} waits to be loaded"
        self.thumbnails: Sequence[np.ndarray] = ()
        self.caption = ""
        self.first: tuple[str, Update] | None = None
        self.ready, self.closed = threading.Event(), threading.Event()

    def load(self, default: Callable[[], tuple[Sequence[str], str]]) -> None:
        """Loads the weights and held-out records, and samples what `default` says, which compiles the program.

        default: called after that; returns arguments as of `stream` and the ending of --out. Problems are left in `status`.
        """
        try:
            with _DEVICE:
                if self.closed.is_set():
                    return
                self.status = f"loading {self.name}"
                self.sampler = sampler.load(self.workdir, self.settings)
            self._read_held_out()
            self.status = f"compiling {self.name}"
            arguments, ending = default()
            out = f"{tempfile.mkdtemp()}/samples{ending}"
            for update in self.stream([*arguments, f"--out={out}"], threading.Event()):
                self.status = update.status
            self.first = self.command([*arguments, f"--out=samples{ending}"]), update
        except (Stopped, *PROBLEMS) as error:
            self.status = f"{self.workdir} {'cannot be loaded' if self.sampler is None else 'is loaded'}: {error}"
            if self.sampler is None and "coder.weights=" in str(error):  # the page has no flags for them
                self.status += (
                    f"; change that path in {pathlib.Path(self.workdir, 'config.json')}, and open the page again"
                )
        self.ready.set()

    def _read_held_out(self) -> None:
        """By-products: a run whose data is elsewhere has none."""
        used = self.settings.data
        try:
            source = data.make_source(used)
            records = data.holdout_records(used, source)[:THUMBNAILS]
            batch = data.read_batch(used, source, records) if len(records) else {"weight": np.zeros(0)}
        except (ValueError, OSError) as error:
            self.status = f"no held-out records: {error}"
            return
        images = batch["frames"][:, 0] if "frames" in batch else batch.get("input", batch.get("image", ()))
        self.thumbnails = images
        self.caption = str(batch["caption"][0]) if "caption" in batch and batch["weight"][0] else ""

    def command(self, arguments: Sequence[str]) -> str:
        """The command line that gives the same samples."""
        where = f"--workdir={self.workdir}", f"--checkpoint={self.sampler.step}"
        return shlex.join(["python", "-m", "lumos_jax.sample", *where, *arguments])

    def stream(self, arguments: Sequence[str], stop: threading.Event) -> Iterator[Update]:
        """Samples in a thread as these arguments of `lumos_jax.sample` say, and yields updates; the last one has the samples.

        Raises:
          ValueError: a mistake in the arguments.
          Stopped: `stop` was set.
        """
        updates: queue.SimpleQueue[Update | Exception] = queue.SimpleQueue()
        unheard = threading.Event()  # nobody reads the updates any more
        stops = stop, unheard, self.closed
        threading.Thread(target=self._work, args=(arguments, stops, updates), daemon=True).start()
        try:
            while True:
                update = updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.sampled is not None:
                    return
        finally:
            unheard.set()

    def _work(self, arguments: Sequence[str], stops: Sequence[threading.Event], updates: queue.SimpleQueue) -> None:
        try:
            if self.sampler is None:
                raise ValueError(self.status)
            updates.put(Update("waiting for the device"))
            args, settings = sample.parse([f"--workdir={self.workdir}", *arguments])
            with _DEVICE:
                show = functools.partial(_show, stops, updates, [])
                loaded = dataclasses.replace(self.sampler.with_flags(args, settings), on_step=show)
                updates.put(Update("compiling, if this shape is new"))
                began = time.monotonic()
                sampled = loaded.run(args)
                files = loaded.sampling.save(*sampled, args.out)
            seconds = time.monotonic() - began
            updates.put(Update(f"done in {seconds:.1f} s", sampled=sampled, files=files))
        except Exception as error:  # noqa: BLE001 (raised where the updates are read)
            updates.put(error)


def close(runs: Sequence[Run]) -> None:
    """Ends what they sample or load, at the next step; waits for that, but not for a long compilation."""
    for run in runs:
        run.closed.set()
    if _DEVICE.acquire(timeout=CLOSE_SECONDS):
        _DEVICE.release()


def _show(
    stops: Sequence[threading.Event], updates: queue.SimpleQueue, times: list[float], progress: sampler.Progress
) -> None:
    """Reports a step. times: when the first step ended, which may have compiled, and when a
    preview and a status were last shown."""
    if any(stop.is_set() for stop in stops):
        raise Stopped
    now, preview = time.monotonic(), None
    if not times:
        times += [now, now, 0.0]
    elif now - times[1] >= PREVIEW_SECONDS:
        preview, times[1] = progress.preview(), now
    if preview is None and now - times[2] < STATUS_SECONDS:
        return
    times[2] = now
    status = f"step {progress.done} of {progress.total}"
    if progress.done > 1:
        left = (now - times[0]) / (progress.done - 1) * (progress.total - progress.done)
        status += f", {tqdm.format_interval(left)} left"
    updates.put(Update(status, preview))

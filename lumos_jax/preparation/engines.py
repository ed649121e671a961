"""Runs numbered tasks: in this process, as one of several processes, or by Apache Beam on any of its runners.

A task is a function of (out, number) that a worker imports; only numbers pass through the engine (Create | Reshuffle | Map),
since Dataflow's job file may have 10 MB. A task that is done is skipped, so that the same command continues after any failure.

    --workers=N                       N processes on this machine, without Beam; those that are killed are replaced
    --processes=N --process=I         tasks I, I + N, ... here, without Beam: Slurm arrays, indexed Jobs
    --runner=DirectRunner             Beam on this machine with --workers processes; it ends when one is killed
    --runner=DaskRunner               a Dask cluster: --dask_client_address=HOST:PORT, or --workers processes started here
    --runner=DataflowRunner|FlinkRunner|SparkRunner, with Beam's own flags
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lumos_jax import progress
from lumos_jax.config.fields import refuse

Task = Callable[[str, int], None]
Run = Callable[[Callable[..., Any], Iterable[tuple]], list[Any]]  # calls a function with each tuple of arguments
RUNNERS = ("DirectRunner", "DaskRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
_POLL = 1.0  # seconds between looks at what is finished, at least
_POLL_SHARE = 0.05  # of the time that may go into looking: a bucket with many files takes seconds to list
_BROKEN = 16  # times that workers may be killed before a task is done
_DASK_RETRIES = 16  # of a task whose worker died; the task itself counts its attempts


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where tasks run. beam: flags that Beam's runner reads. processes, process: how many there are, and which one this is."""

    workers: int = 1
    runner: str = ""
    beam: tuple[str, ...] = ()
    processes: int = 1
    process: int = 0

    def __post_init__(self):
        refuse({
            f"--workers={self.workers} must be at least 1": self.workers < 1,
            f"--processes={self.processes} must be at least 1": self.processes < 1,
            f"--process={self.process} must be from 0 to {self.processes - 1}, as --processes={self.processes}":
                not 0 <= self.process < self.processes,
            f"--runner={self.runner} is not one of {', '.join(RUNNERS)}": bool(self.runner) and self.runner not in RUNNERS,
            f"--runner={self.runner} distributes tasks itself: leave out --processes and --process":
                bool(self.runner) and self.processes > 1,
            f"unexpected argument {''.join(self.beam[:1])!r}: Beam's flags go with --runner":
                bool(self.beam) and not self.runner,
        })  # fmt: skip


def run(
    task: Task, out: str, numbers: Sequence[int], execution: Execution, finished: Callable[[], int], title: str
) -> None:
    """Runs `task(out, number)` for the numbers, those of this process.

    finished: tells how many tasks are done, all processes together, for the progress bar.
    Raises what a task raises.
    """
    own = numbers[execution.process :: execution.processes]
    if not own:
        return
    if not execution.runner:
        call = functools.partial(task, out)
        done = map(call, own) if execution.workers == 1 else _pool(call, own, execution.workers)
        for _ in progress.bar(done, title, total=len(own), unit="task"):
            pass
        return
    with _progress(title, len(numbers), finished), flags(execution) as given:
        _beam(task, out, own, given)


def _pool(call: Callable[[int], None], numbers: Sequence[int], workers: int) -> Iterator[None]:
    """Yields once for each task that is done. A killed worker breaks the pool: a new one goes on with what is left."""
    left, broken = list(reversed(numbers)), 0
    while left:
        under_way: dict[futures.Future, int] = {}
        try:
            with futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                while left or under_way:
                    while left and len(under_way) < 2 * workers:
                        number = left.pop()
                        under_way[pool.submit(call, number)] = number
                    for future in futures.wait(under_way, return_when=futures.FIRST_COMPLETED).done:
                        future.result()
                        del under_way[future]
                        broken = 0
                        yield
        except BrokenProcessPool as error:
            left += sorted(under_way.values(), reverse=True)
            broken += 1
            if broken == _BROKEN:
                raise OSError(f"workers were killed {broken} times in a row without finishing a task") from error


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Run]:
    """Runs the steps of a stage in that many processes; results come in the order of the arguments. 1: in this process.
    Raises OSError: a process was killed."""
    if workers <= 1:
        yield lambda function, arguments: [function(*some) for some in arguments]
        return
    try:
        with futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, arguments: list(pool.map(function, *zip(*arguments, strict=True)))
    except BrokenProcessPool as error:
        raise OSError("a worker was killed, as where memory is short: run again with fewer --workers") from error


@contextlib.contextmanager
def flags(execution: Execution) -> Iterator[list[str]]:
    """Beam's flags; a Dask cluster on this machine lives meanwhile."""
    runner = execution.runner
    name = "apache_beam.runners.dask.dask_runner.DaskRunner" if runner == "DaskRunner" else runner
    given = [f"--runner={name}", *execution.beam]
    if runner == "DirectRunner":
        quiet = "--default_sdk_harness_log_level=ERROR"
        yield [*given, quiet, "--direct_running_mode=multi_processing", f"--direct_num_workers={execution.workers}"]
    elif runner == "DaskRunner" and not any(flag.startswith("--dask_client_address") for flag in execution.beam):
        import dask
        from distributed import LocalCluster, default_client

        dask.config.set({"distributed.scheduler.allowed-failures": _DASK_RETRIES})
        options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None, "silence_logs": logging.ERROR}
        with LocalCluster(n_workers=execution.workers, **options) as cluster:
            yield [*given, f"--dask_client_address={cluster.scheduler_address}"]
            with contextlib.suppress(ValueError):  # there is none where the pipeline did not begin
                default_client().close()  # Beam's own, which would look for the cluster again
    else:
        yield given


def _beam(task: Task, out: str, numbers: Sequence[int], flags: Sequence[str]) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    threading.excepthook = _end_without_worker
    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        _ = (
            pipeline
            | "tasks" >> beam.Create(list(numbers))
            | beam.Reshuffle()
            | "run" >> beam.Map(functools.partial(task, out))
        )


def _end_without_worker(failed: threading.ExceptHookArgs) -> None:
    """Ends this process where DirectRunner would wait for ever: a thread of it has seen a worker process die."""
    if "Worker subprocess exited" not in str(failed.exc_value):
        threading.__excepthook__(failed)
        return
    print("error: a worker process was killed; the same command continues", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def _progress(title: str, total: int, finished: Callable[[], int]) -> Iterator[None]:
    """A bar with the time that is left, from what is done; nothing where stderr is no terminal."""
    stop = threading.Event()
    with progress.bar(description=title, total=total, unit="task") as bar:
        if bar.disable:
            yield
            return
        bar.initial = bar.n = min(finished(), total)

        def look() -> None:
            pause = _POLL
            while not stop.wait(pause):
                began = time.monotonic()
                bar.update(min(finished(), total) - bar.n)
                pause = max(_POLL, (time.monotonic() - began) / _POLL_SHARE)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            bar.update(min(finished(), total) - bar.n)

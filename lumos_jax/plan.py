"""Plans a run: python -m lumos_jax.plan --config=configs/i2i.py --target=v5e:16x16

Memory and speed on machines that are not here: compiles the config's train step and sampler ahead of time for each --target
(v5e:4x4, v5p:4x4x4, v6e:4x4, h100:8 ...) and prints memory a chip, model FLOPs, the compiler's estimate of a step's time,
collectives, and the time of the whole run. No accelerator, data or weights are needed; TPUs need the package libtpu
(pip install '.[plan]'). --search tries batches, remat policies, mesh splits and precisions, prints those that no other
beats in both speed and memory, and writes the winner as a config file for lumos_jax.main.

Any field can be set on the command line, as --config.train.batch_size=512; docs/settings.md documents them all.
"""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent import futures

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: programs are only compiled

from absl import flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from lumos_jax import cli, config
from lumos_jax.config import io as config_io
from lumos_jax.planning import ahead, parse_target, report, search
from lumos_jax.planning.chips import Target
from lumos_jax.planning.figures import compile_sampler, estimate

_CONFIG = cli.config_flag()
_TARGET = flags.DEFINE_multi_string("target", None, "CHIP:SHAPE, as v5e:16x16 or h100:8; may be given several times.")
_FEATURES = flags.DEFINE_enum(
    "features", "both", ["online", "cached", "both"],
    "online: the frozen encoders run within the step; cached: a cache holds their features; both: one table each.",
)  # fmt: skip
_SAMPLER = flags.DEFINE_bool("sampler", True, "Whether to compile the sampler as well.")
_SEARCH = flags.DEFINE_bool("search", False, "Whether to look for better settings; takes minutes.")
_OUT = flags.DEFINE_string("out", None, "--search: the config file to write; default: plan_CHIP_SHAPE.py, here.")

DOES_NOT_FIT = 3
UNOPENED = "not opened by plan"  # in place of config.data.path, where the config leaves it to the command line


def main() -> int:
    """Plan as the flags say. Returns DOES_NOT_FIT if something does not, and --search found nothing that does."""
    logging.set_verbosity(logging.ERROR)
    with cli.errors():
        given = _CONFIG.value
        given.data.path = given.data.path or UNOPENED
        settings = config_io.resolve(given)
        targets = [parse_target(text) for text in _TARGET.value]
        if _OUT.value and not (_SEARCH.value and len(targets) == 1 and _OUT.value.endswith(".py")):
            raise ValueError(f"--out={_OUT.value} names a .py file, and goes with --search and one --target")
        fits = [_plan(settings, target, ahead.devices_of(target)) for target in targets]
    return 0 if all(fits) else DOES_NOT_FIT


def _variants(settings: config.Settings) -> list[bool]:
    """Cached or not, in the order of the tables."""
    if settings.data.source == "cached":
        return [True]
    if _FEATURES.value != "both":
        return [_FEATURES.value == "cached"]
    return [False, True]


def _plan(settings: config.Settings, target: Target, devices) -> bool:
    """Prints the tables of one target; returns whether the run fits as configured or as the search found."""
    variants, fits = _variants(settings), []
    wall, processor = time.perf_counter(), time.process_time()
    with futures.ThreadPoolExecutor(2) as pool:  # a compiler keeps about one core busy
        jobs = {cached: pool.submit(estimate, settings, target, devices, cached=cached) for cached in variants}
        sampler = (
            pool.submit(compile_sampler, settings, target, devices, cached=variants[0]) if _SAMPLER.value else None
        )
        for cached, job in jobs.items():
            try:
                figures = job.result()
            except ValueError as error:
                if not (cached and len(variants) == 2):
                    raise
                print(f"{target}: no cached features: {error}\n", flush=True)
                continue
            if sampler is not None and cached == variants[0]:
                figures = dataclasses.replace(figures, sampler=sampler.result())
            lines = report.rows(figures)
            if not figures.fits:
                lines += [("try", tip) for tip in search.suggest(figures, devices)]
            heading = f"{target}, {'on cached features' if cached else 'on records, encoded in the step'}"
            print(report.table(heading, lines) + "\n", flush=True)
            fits.append(figures.fits)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{target}: compiled in {wall:.0f} s, {processor:.0f} s of processor time\n", flush=True)
    return _search(settings, target, devices, variants[-1]) if _SEARCH.value else all(fits)


def _search(settings: config.Settings, target: Target, devices, cached: bool) -> bool:
    print(f"{target}, search with {'cached features' if cached else 'records'}", flush=True)
    found = search.search(settings, target, devices, cached, lambda line: tqdm.write(f"  {line}"))
    best = search.winner(found, settings)
    if best is None:
        print("nothing that was tried fits: take more chips")
        return False
    print("not beaten in both speed and memory:")
    for figures in search.pareto(found):
        print(f"  {search.line(figures)}")
    path = _OUT.value or f"plan_{target.chip.name}_{target.layout}.py"
    flag = flags.FLAGS["config"]
    overrides = {k: v for k, v in config_flags.get_override_values(flag).items() if k not in search.FIELDS}
    search.write_config(path, config_flags.get_config_filename(flag), overrides, best)
    print(f"winner, at the config's own batch where one fits: {search.line(best)}")
    print(f"written to {path}: python -m lumos_jax.main --config={path} --workdir=RUN")
    return True


if __name__ == "__main__":
    cli.run(main, __doc__, required=("config", "target"))

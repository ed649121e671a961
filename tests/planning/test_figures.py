"""A run planned for the eight devices that the tests have: the same code as for machines that are not there."""

import dataclasses

import jax
import pytest

from configs import i2i
from lumos_jax.config import io as config_io
from lumos_jax.planning import chips, measured, report, search
from lumos_jax.planning.ahead import Compiled, Memory
from lumos_jax.planning.chips import Chip, Target
from lumos_jax.planning.figures import compile_sampler, estimate
from lumos_jax.planning.job import make_job
from lumos_jax.planning.program import Kernel, Overlapped, Program

MACHINE = Target(Chip("here", "cpu", 2**30, 1e12, 1e11, 1e10, 1, 1e9), (8,))


def settings(**mesh):
    made = i2i.test()
    made.update({"mesh": mesh})
    return config_io.resolve(made)


@pytest.fixture(scope="module")
def planned():
    """configs/i2i.py:test on cached features, parameters split over four of eight devices."""
    run = {"settings": settings(fsdp=4), "target": MACHINE, "devices": jax.devices(), "cached": True}
    return dataclasses.replace(estimate(**run), sampler=compile_sampler(**run))


def test_the_step_that_trains_is_what_is_compiled(planned):
    resident = planned.job.resident_bytes()
    assert resident["optimizer"] == 2 * resident["parameters"] + 8  # two moments, two counters
    # Arguments are what stays between steps, the step's number, and nothing else.
    assert planned.step.memory.arguments == sum(resident.values()) + 4
    assert planned.fits
    assert planned.step.memory.total > planned.step.memory.arguments
    collectives = planned.step.program.collectives
    assert collectives["all-gather"].received > 0
    assert {"all-reduce", "reduce-scatter"} & set(collectives)


def test_figures_follow_from_cycles(planned):
    def figures_of(program):
        return dataclasses.replace(planned, step=dataclasses.replace(planned.step, program=program))

    program = Program(2_000_000, planned.step.program.collectives, {})
    f = figures_of(program)
    assert f.times.computing == 2e-3
    assert f.seconds == pytest.approx(2e-3 + program.exposed / 1e10)
    assert f.mfu == pytest.approx(f.model_flops / (f.seconds * 8e12))
    # Kernels are costed at the least: here by computing, at 1 TFLOP/s, and by memory, at 100 GB/s.
    kernels = (Kernel(3, 1e9, 1e7), Kernel(2, 1e9, 4e8))
    with_kernels = figures_of(dataclasses.replace(program, kernels=kernels))
    assert with_kernels.times.computing - f.times.computing == pytest.approx(3e-3 + 8e-3)
    assert with_kernels.seconds - f.seconds == pytest.approx(11e-3)
    # 2 ms for the bytes of an asynchronous collective, at 10 GB/s, of which 1.5 ms are hidden at 1 GHz; another is hidden.
    overlapped = (Overlapped(4, 2e7, 1_500_000), Overlapped(1, 1e6, 200_000))
    beside = figures_of(dataclasses.replace(program, overlapped=overlapped))
    assert beside.seconds - f.seconds == pytest.approx(4 * 0.5e-3)
    rows = dict(report.rows(f))
    assert "16 images" not in rows["sampler"]
    assert "4 images, 4 steps" in rows["sampler"]
    assert "1 host" in rows["input"]
    assert "unknown" in dict(report.rows(planned))["step time"]  # a CPU's compiler estimates none


def test_splitting_the_state_divides_it():
    whole, split = (make_job(settings(fsdp=n), jax.devices(), cached=False).resident_bytes() for n in (1, 8))
    assert whole["ema"] / split["ema"] > 6  # all but a few small ones
    assert whole["frozen"] == split["frozen"]


def test_running_out_of_memory_is_an_answer_with_what_to_try(planned):
    held = sum(planned.job.resident_bytes().values())
    tiny = Target(dataclasses.replace(MACHINE.chip, usable=2 * held), (8,))
    over = Compiled(Memory(3 * held, 0, 0, 0, 0), None, "")
    f = dataclasses.replace(planned, target=tiny, step=over)
    assert not f.fits
    assert "does NOT fit" in dict(report.rows(f))["memory a chip"]
    tips = search.suggest(f, jax.devices())
    assert any(tip.startswith("--config.model.remat=dots") for tip in tips)
    assert any(tip.startswith("--config.optimizer.accumulate=2") for tip in tips)
    assert any(tip.startswith("--config.optimizer.state_dtype=bfloat16 halves") for tip in tips)
    assert any(tip.startswith("--config.optimizer.ema_memory=host keeps") for tip in tips)
    # Where the state alone is too much, nothing is compiled, and splitting comes first.
    whole = sum(make_job(settings(), jax.devices(), cached=True).resident_bytes().values())
    tiny = Target(dataclasses.replace(MACHINE.chip, usable=whole - 1), (8,))
    f = estimate(settings(), tiny, jax.devices(), cached=True)
    assert f.step.program is None
    assert search.suggest(f, jax.devices())[0].startswith("--config.mesh.fsdp=4 splits")


def job_of(planned, settings):
    experiment = dataclasses.replace(planned.job.experiment, settings=settings)
    return dataclasses.replace(planned.job, experiment=experiment)


def variant(planned, batch, cycles, memory, fits=True):
    s = planned.job.settings
    job = job_of(planned, dataclasses.replace(s, train=dataclasses.replace(s.train, batch_size=batch)))
    program = Program(cycles, {}, {}) if fits else None
    return dataclasses.replace(planned, job=job, step=Compiled(Memory(memory, 0, 0, 0, 0), program, ""))


def test_the_front_has_what_nothing_beats_and_the_winner_keeps_the_batch(planned):
    slow_small, fast, beaten, out, doubled = (
        variant(planned, 16, 300, 100), variant(planned, 16, 200, 300), variant(planned, 16, 250, 400),
        variant(planned, 16, 0, 2**40, fits=False), variant(planned, 32, 300, 500),
    )  # fmt: skip
    found = [slow_small, fast, beaten, out, doubled]
    assert search.pareto(found) == [doubled, fast, slow_small]
    assert search.winner(found, planned.job.settings) is fast
    assert search.winner([out, doubled], planned.job.settings) is doubled
    assert search.winner([out], planned.job.settings) is None


def test_what_a_search_tries_and_that_its_winner_is_a_config(planned, tmp_path, monkeypatch):
    tried = []

    def by_table(settings, target, devices, *, cached):
        """Of the policies, mlp is fastest; none does not fit, nor does a doubled batch."""
        s = settings
        tried.append((s.mesh.fsdp, s.train.batch_size, s.optimizer.accumulate, s.model.remat, s.model.dtype))
        job = job_of(planned, settings)
        cycles = {"dots": 1200, "mlp": 1000, "full": 1500}.get(s.model.remat) if s.train.batch_size == 16 else None
        program = cycles and Program(cycles * (1 + s.optimizer.accumulate), {}, {})
        return dataclasses.replace(planned, job=job, step=Compiled(Memory(2**20, 0, 0, 0, 0), program, ""))

    monkeypatch.setattr(search, "estimate", by_table)
    start = settings()
    found = search.search(start, MACHINE, jax.devices(), True, lambda line: None)
    own = [(fsdp, 16, 1, remat, "float32") for fsdp in (1, 4, 8) for remat in search.REMAT]
    # Then, with the fastest, the batch in two parts and doubled, and the other precision.
    assert tried == [*own, (1, 16, 2, "mlp", "float32"), (1, 32, 1, "mlp", "float32"), (1, 16, 1, "mlp", "bfloat16")]
    best = search.winner(found, start)
    assert (best.job.settings.model.remat, best.job.settings.model.dtype) == ("mlp", "float32")
    search.write_config(tmp_path / "fitted.py", f"{i2i.__file__}:test", {"train.seed": 7}, best)
    scope = {}
    exec((tmp_path / "fitted.py").read_text(), scope)
    resolved = config_io.resolve(scope["get_config"]())
    assert resolved == dataclasses.replace(
        best.job.settings, train=dataclasses.replace(best.job.settings.train, seed=7)
    )


def test_measured_steps_stand_beside_the_figures(planned, tmp_path, monkeypatch):
    each = planned.model_flops / planned.batch_size

    def row(**changes):
        known = {"chip": "here", "device": "A chip", "jax": "1.0", "size": "32x2x2", "pixels": 16, "images": 2,
                 "remat": "none", "milliseconds": 4.0, "teraflops": 2 * each / 4e9, "memory_gib": 0.5}  # fmt: skip
        return measured.Measured(**known | changes)

    path = tmp_path / "measured.json"
    others = [row(size="XL"), row(chip="v5e", device="Another"), row(pixels=32), row(images=640, milliseconds=9.0)]
    measured.record([*others, row(milliseconds=7.0)], path)
    measured.record([row()], path)  # replaces the last
    rows = measured.load(path)
    assert len(rows) == 5
    assert measured.nearest(settings(fsdp=4), MACHINE, rows) == row()
    assert measured.nearest(settings(fsdp=4), MACHINE, others[:3]) is None
    assert all(one.chip in chips.CHIPS for one in measured.load())

    monkeypatch.setattr(report, "load", lambda: rows)
    program = Program(5_000_000, {}, {})
    step = Compiled(Memory(2**28, 0, 0, 0, 0), program, "")
    f = dataclasses.replace(planned, target=Target(MACHINE.chip, (1,)), step=step)  # 16 images on one chip, not two
    shown = dict(report.rows(f))
    assert shown["measured"].startswith("32x2x2 at 16 px, 2 images, remat none, on one A chip: 4.0 ms")
    assert shown["  at that speed"].startswith("32.0 ms a step, MFU")
    assert shown["  estimate"] == "-84.4% of that time"
    assert "  memory" not in shown
    two = dataclasses.replace(variant(planned, 2, 5_000_000, 2**28), target=f.target, model_flops=2 * each)
    shown = dict(report.rows(two))
    assert shown["  at that speed"] == f"MFU {2 * each / 4e9:.1%}"
    assert shown["  estimate"] == "+25.0% of that time"
    assert shown["  memory"] == "-50.0% of what was measured"

"""A run planned for the eight devices that the tests have: the same code as for machines that are not there."""

import dataclasses

import jax
import pytest

from configs import i2i
from lumos_jax import config_io
from lumos_jax.planning import advice, report, search
from lumos_jax.planning.ahead import Compiled, Memory
from lumos_jax.planning.build import make_job
from lumos_jax.planning.chips import Chip, Target
from lumos_jax.planning.estimate import estimate
from lumos_jax.planning.program import Program

MACHINE = Target(Chip("here", "cpu", 2**30, 1e12, 1e11, 1e10, 1, 1e9), (8,))


def settings(**mesh):
    made = i2i.test()
    made.update({"mesh": mesh})
    return config_io.resolve(made)


@pytest.fixture(scope="module")
def planned():
    """configs/i2i.py:test on cached features, parameters split over four of eight devices."""
    return estimate(settings(fsdp=4), MACHINE, jax.devices(), cached=True, sampler=True)


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
    program = Program(2_000_000, planned.step.program.collectives, {})
    f = dataclasses.replace(planned, step=dataclasses.replace(planned.step, program=program))
    assert f.computing == 2e-3
    assert f.seconds == pytest.approx(2e-3 + program.exposed / 1e10)
    assert f.mfu == pytest.approx(f.model_flops / (f.seconds * 8e12))
    rows = dict(report.rows(f))
    assert "16 pictures" not in rows["sampler"]
    assert "4 pictures, 4 steps" in rows["sampler"]
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
    tips = advice.suggest(f, jax.devices())
    assert any(tip.startswith("--config.model.remat=dots") for tip in tips)
    assert any(tip.startswith("--config.optimizer.accumulate=2") for tip in tips)
    # Where the state alone is too much, nothing is compiled, and splitting comes first.
    whole = sum(make_job(settings(), jax.devices(), cached=True).resident_bytes().values())
    tiny = Target(dataclasses.replace(MACHINE.chip, usable=whole - 1), (8,))
    f = estimate(settings(), tiny, jax.devices(), cached=True, sampler=False)
    assert f.step.program is None
    assert advice.suggest(f, jax.devices())[0].startswith("--config.mesh.fsdp=4 splits")


def variant(planned, batch, cycles, memory, fits=True):
    s = planned.job.settings
    job = dataclasses.replace(
        planned.job, settings=dataclasses.replace(s, train=dataclasses.replace(s.train, batch_size=batch))
    )
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


def test_a_search_compiles_and_its_winner_is_a_config_that_resolves(planned, tmp_path, monkeypatch):
    tried = []

    def first_fits_with_dots(settings, target, devices, *, cached, sampler):
        tried.append(
            (settings.mesh.fsdp, settings.train.batch_size, settings.optimizer.accumulate, settings.model.remat)
        )
        job = dataclasses.replace(planned.job, settings=settings)
        fits = settings.model.remat == "dots"
        program = Program(1000, {}, {}) if fits else None
        return dataclasses.replace(planned, job=job, step=Compiled(Memory(2**20, 0, 0, 0, 0), program, ""))

    monkeypatch.setattr(search, "estimate", first_fits_with_dots)
    start = settings()
    found = search.search(start, MACHINE, jax.devices(), True, lambda line: None)
    assert {fsdp for fsdp, *_ in tried} == {1, 8}
    assert (1, 16, 2, "none") in tried
    assert (8, 32, 1, "dots") in tried
    assert not any(remat == "full" for *_, remat in tried)  # behind one that fits
    best = search.winner(found, start)
    search.write_config(tmp_path / "fitted.py", f"{i2i.__file__}:test", {"train.seed": 7}, best)
    scope = {}
    exec((tmp_path / "fitted.py").read_text(), scope)
    resolved = config_io.resolve(scope["get_config"]())
    assert resolved == dataclasses.replace(best.job.settings, train=dataclasses.replace(best.job.settings.train, seed=7),
                                           model=dataclasses.replace(best.job.settings.model, unroll=0))  # fmt: skip

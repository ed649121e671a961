"""What the study trains, how it scores it, and what each figure of the paper compares: declarations only.

Every run has `steps` of its task, and every prior `prior_steps`. The learning rate of each start is the one of `rates` with the
lowest held-out loss after `trial_steps` (seed 0); runs that differ from another in their data, their prior's data or their
condition alone take that one's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.study.spec import Cell, Claim, Evaluation, Figure, Panel, Run, Scale

SEEDS = 3
ALL_SCENES = 1_000_000  # that the priors of configs/*.py:desk learn from, none of them twice
DROPOUT = 0.1  # of the condition, there

_FD = ("fd_scene_vit", "fd_vgg16")
_TRUTH = ("psnr", "ssim", "lpips")
_CAPTIONS = ("caption_count", "caption_colour", "caption_shape", "caption_all")
_CLIPS = ("fvd", "psnr", "ssim", "flow_error")
_PROMPTS = ("scenes",)  # GenEval's six categories, and their mean
_I2I, _I2I_SWEEP, _T2I_SWEEP = (*_FD, *_TRUTH), (*_FD, "psnr"), (*_FD, *_CAPTIONS)
_T2I = (*_T2I_SWEEP, *_PROMPTS)
_CLAIMED = ("fd_vgg16", "caption_all")  # what claims on text to image are judged by
_I2I_CURVE = ("held_out_loss", "score_psnr", "score_ssim")
_T2I_CURVE = ("held_out_loss", "score_count", "score_colour", "score_shape")
_ALL_TOKENS = (("encoder.output", "all"),)
_OTHERS = ("scratch", "T2I prior")  # what figure 5 compares the I2I prior with

DESK = Scale(
    size="desk",
    prior_steps=1000,
    steps={"t2i": 800, "nvs": 600, "i2v": 300},
    rates=(1e-3, 2e-3, 4e-3),
    trial_steps=160,
    points=3,
    examples=256,
    scored=64,
    sampling_steps=20,
    evaluations={
        "i2i": (Evaluation("scenes", 256, _I2I),),
        "t2i": (Evaluation("scenes", 512, _T2I_SWEEP), Evaluation("scenes-geneval", 0, _PROMPTS, stride=2)),
        "nvs": (Evaluation("scenes", 256, _TRUTH),),
        "i2v": (Evaluation("scenes", 80, _CLIPS, frames=9, stride=4),),  # I3D needs 9 frames
    },
    sweeps={
        "i2i": (Evaluation("scenes", 256, _I2I_SWEEP),),
        "t2i": (Evaluation("scenes", 256, _T2I_SWEEP),),
    },
    references={"vgg16": 4000, "scene_vit": 4000, "i3d": 256},
    noises=(0.1, 0.3, 0.5, 0.7, 0.9),
    dropouts=(0.05, 0.1, 0.15, 0.2, 0.3),
    guidances=(1, 2, 3, 4, 6, 8, 10),
    shares={1000: "1%", 10_000: "10%"},
)
# The machinery alone: sizes and steps at which nothing is learned.
QUICK = Scale(
    size="test",
    prior_steps=4,
    steps={"t2i": 4, "nvs": 4, "i2v": 4},
    rates=(1e-3, 2e-3),
    trial_steps=2,
    points=2,
    examples=16,
    scored=8,
    sampling_steps=2,
    evaluations={
        "i2i": (Evaluation("scenes", 40, ("fd_scene_vit", *_TRUTH)),),
        "t2i": (
            Evaluation("scenes", 40, ("fd_scene_vit", *_CAPTIONS)),
            Evaluation("scenes-geneval", 0, _PROMPTS, stride=20),
        ),
        "nvs": (Evaluation("scenes", 40, _TRUTH),),
        "i2v": (Evaluation("scenes", 40, ("psnr", "ssim", "flow_error"), frames=9, stride=4),),
    },
    sweeps={
        "i2i": (Evaluation("scenes", 40, ("fd_scene_vit", "psnr")),),
        "t2i": (Evaluation("scenes", 40, ("fd_scene_vit", *_CAPTIONS)),),
    },
    references={"scene_vit": 200},
    noises=(0.5,),
    dropouts=(0.1, 0.3),
    guidances=(1, 4),
    shares={10: "1%"},
)
SCALES = {scale.size: scale for scale in (DESK, QUICK)}
# Figures of the paper that show the runs of another.
ALIASES = {"2d": "5", "10": "2c"}


def declare(scale: Scale) -> dict[str, Figure]:
    """Every figure, by its number in the paper, in the order of their importance."""
    steps, first = scale.steps, scale.prior_steps

    # Priors. Those that learn from images alone, with the condition that the figure varies, share the I2I prior's rate.
    i2i = Run("i2i", "i2i", "configs/i2i.py", first)
    classes = Run("classes", "", "configs/ablations/class_conditional.py", first)
    unconditional = Run("unconditional", "", "configs/ablations/unconditional.py", first)
    rcg = Run("rcg", "", "configs/ablations/rcg.py", first)
    tokens = {
        "[CLS]": Run("i2i cls", "i2i", "configs/ablations/tokens.py", first, "cls", rate_of=i2i),
        "patches": Run("i2i patch", "i2i", "configs/ablations/tokens.py", first, "patch", rate_of=i2i),
        "all tokens": i2i,
    }
    encoders = {"self-distilled": i2i} | {
        title: Run(f"i2i {variant}", "i2i", "configs/ablations/encoders.py", first, variant, None, _ALL_TOKENS, i2i)
        for title, variant in (("contrastive", "clip"), ("MoCo v3", "moco"))
    }
    data_scale = "configs/ablations/data_scale.py"
    shares = {
        scenes: Run(f"i2i of {scenes} scenes", "i2i", data_scale, first, share, rate_of=i2i)
        for scenes, share in scale.shares.items()
    } | {ALL_SCENES: i2i}

    # Tasks, from nothing and from each prior.
    def t2i_from(prior: Run | None, start: str, variant: str = "", **fields) -> Run:
        config = "configs/ablations/t2i_prior.py" if variant else "configs/t2i.py"
        return Run(f"t2i from {start}", "t2i", config, steps["t2i"], variant, prior, **fields)

    t2i_scratch, t2i = t2i_from(None, "scratch"), t2i_from(i2i, "i2i")
    t2i_prior = dataclasses.replace(t2i_scratch, steps=first)
    t2i_starts = {
        "scratch": t2i_scratch,
        "class-conditional": t2i_from(classes, "classes", "class_conditional"),
        "unconditional": t2i_from(unconditional, "unconditional", "unconditional"),
        "RCG": t2i_from(rcg, "rcg", "rcg"),
        "I2I prior": t2i,
    }

    def t2i_after(priors: Mapping[Any, Run]) -> dict[Any, Run]:
        """Text-to-image from each of these I2I priors, at the rate of the one from `i2i`."""
        return {
            key: t2i if prior is i2i else t2i_from(prior, prior.title, rate_of=t2i) for key, prior in priors.items()
        }

    def from_priors(task: str, **fields) -> dict[str, Run]:
        starts = {"scratch": None, "I2I prior": i2i, "T2I prior": t2i_prior}
        titles = {"scratch": "scratch", "I2I prior": "i2i", "T2I prior": "t2i"}
        return {
            start: Run(f"{task} from {titles[start]}", task, f"configs/{task}.py", steps[task], prior=prior, **fields)
            for start, prior in starts.items()
        }

    figure_5 = Figure(
        "5",
        "Priors for novel views and for clips",
        (
            Panel(
                "Novel views", _lines(from_priors("nvs", changes=(("eval.sampler", "dpm++"),))), _TRUTH, "scratch",
                ("held_out_loss", "score_psnr"), claims=_wins("views", "I2I prior", ("psnr", "lpips"), *_OTHERS),
            ),
            Panel(
                "Image to video", _lines(from_priors("i2v")), _CLIPS, "scratch",
                ("held_out_loss", "score_psnr", "score_flow_error"),
                claims=_wins("clips", "I2I prior", ("fvd", "psnr"), *_OTHERS),
            ),
        ),
    )  # fmt: skip
    figure_8 = Figure(
        "8",
        "Priors for text to image",
        (
            Panel(
                "Text to image", _lines(t2i_starts), _T2I, "scratch", _T2I_CURVE,
                claims=_wins("images", "I2I prior", _CLAIMED, *list(t2i_starts)[:-1]),
            ),
        ),
    )  # fmt: skip
    noisy = {
        start: {0.0: run} | {noise: _noisy(run, noise) for noise in scale.noises}
        for start, run in (("scratch", t2i_scratch), ("I2I prior", t2i))
    }
    most = max(scale.noises)
    figure_2a = Figure(
        "2a",
        "Captions that belong to other images",
        (
            Panel(
                "Text to image from noisy captions", _sweep(noisy), _T2I, "scratch", axis="share of wrong captions",
                claims=(
                    Claim(f"captions of which {most:.0%} are wrong hurt training from scratch",
                          ("scratch", 0.0), ("scratch", most), _CLAIMED),
                    *(Claim(f"with {noise:.0%} wrong captions, images from the I2I prior are better than from scratch",
                            ("I2I prior", noise), ("scratch", noise), _CLAIMED)
                      for noise in scale.noises),
                ),
            ),
        ),
    )  # fmt: skip
    figure_9 = Figure(
        "9",
        "Tokens of the encoder",
        (
            Panel("Image to image", _lines(tokens), _I2I, "[CLS]", _I2I_CURVE),
            Panel(
                "Text to image after it",
                _lines(t2i_after(tokens)),
                _T2I,
                "[CLS]",
                _T2I_CURVE,
                claims=_wins("images", "[CLS]", _CLAIMED, "patches", "all tokens"),
            ),
        ),
    )
    figure_2c = Figure(
        "2c",
        "Encoders of the I2I prior",
        (
            Panel("Image to image", _lines(encoders), _I2I, "self-distilled", _I2I_CURVE),
            Panel(
                "Text to image after it",
                _lines(t2i_after(encoders)),
                _T2I,
                "self-distilled",
                _T2I_CURVE,
                claims=_wins("images", "self-distilled", _CLAIMED, *list(encoders)[1:]),
            ),
        ),
    )
    clip_text = dataclasses.replace(
        t2i,
        title="t2i from i2i clip text",
        config="configs/ablations/text_encoders.py",
        variant="clip_text",
        rate_of=t2i,
    )
    texts = {"T5, random weights": t2i, "CLIP text, trained on scenes": clip_text}
    figure_11 = Figure(
        "11",
        "Encoders of the captions",
        (Panel("Text to image", _lines(texts), _T2I, "T5, random weights", _T2I_CURVE),),
    )

    def dropped(run: Run) -> dict[str, dict[float, Run]]:
        """Guidance scales of each condition dropout."""
        runs = {
            dropout: run if dropout == DROPOUT
            else _changed(run, f"{run.title} dropout {dropout:g}", ("task.condition_dropout", dropout))
            for dropout in scale.dropouts
        }  # fmt: skip
        return {f"dropout {dropout:g}": dict.fromkeys(scale.guidances, run) for dropout, run in runs.items()}

    figure_12 = Figure(
        "12",
        "Condition dropout and guidance",
        (
            Panel("Image to image", _sweep(dropped(i2i), guided=True), _I2I_SWEEP, "", axis="guidance scale"),
            Panel("Text to image", _sweep(dropped(t2i), guided=True), _T2I_SWEEP, "", axis="guidance scale"),
        ),
    )
    least = min(shares)
    figure_2b = Figure(
        "2b",
        "Images that the prior learns from",
        (
            Panel("Image to image", _sweep({"I2I": shares}), _I2I, "", axis="scenes", log=True),
            Panel(
                "Text to image after it", _sweep({"I2I prior": t2i_after(shares)}), _T2I, "", axis="scenes", log=True,
                claims=(
                    Claim(f"images are better after a prior of {ALL_SCENES:,} scenes than of {least:,}",
                          ("I2I prior", ALL_SCENES), ("I2I prior", least), _CLAIMED),
                ),
            ),
        ),
    )  # fmt: skip
    chosen = (figure_5, figure_8, figure_2a, figure_9, figure_2c, figure_11, figure_12, figure_2b)
    return {figure.key: figure for figure in chosen}


def _changed(run: Run, title: str, *changes: tuple[str, Any]) -> Run:
    """Another run with the learning rate of this one."""
    return dataclasses.replace(run, title=title, changes=run.changes + changes, rate_of=run)


def _noisy(run: Run, noise: float) -> Run:
    """The same on captions of which a share `noise` is another record's."""
    config, title = "configs/ablations/caption_noise.py", f"{run.title} noise {noise:g}"
    return dataclasses.replace(run, title=title, config=config, variant=str(noise), rate_of=run)


def _lines(runs: Mapping[str, Run]) -> tuple[Cell, ...]:
    return tuple(Cell(line, run) for line, run in runs.items())


def _sweep(runs: Mapping[str, Mapping[float, Run]], guided: bool = False) -> tuple[Cell, ...]:
    """A cell for each place x of each line; guided: x is the guidance scale."""
    return tuple(
        Cell(line, run, x, x if guided else None) for line, places in runs.items() for x, run in places.items()
    )


def _prior(start: str) -> str:
    return start if start == "scratch" else f"the {start.removesuffix(' prior')} prior"


def _wins(what: str, better: str, scores: tuple[str, ...], *others: str) -> tuple[Claim, ...]:
    return tuple(
        Claim(
            f"{what} from {_prior(better)} are better than from {_prior(other)}", (better, None), (other, None), scores
        )
        for other in others
    )

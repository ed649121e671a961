"""What a prior is worth to a task: the same task from scratch and from the I2I prior, at equal steps, over several seeds.

    python -m benchmarks.transfer --task=t2i --prior=runs/desk --out=runs/transfer
    python -m benchmarks.transfer --task=nvs --prior=runs/desk --steps=600 --seeds=3

Trains `configs/<task>.py:desk` twice a seed, in turns (scratch, prior, scratch, ...), each in a process of its own that logs as
any run does; a run that is there already is not trained again, so the command continues where it was stopped. Prints held-out
loss and the exact scores over training steps, as mean and standard deviation over seeds, and writes them as `<task>.json`
and as a plot `<task>.png` (needs matplotlib: the extra `plots`). The paper's claim (its Fig. 3 and section 4) is that the prior
wins.

Scores: T2I: share of samples whose count, colours and shapes, read back from the pixels, are those of the caption. NVS: PSNR
and SSIM against the true view. I2V: PSNR against the true frames, and the error of their optical flow in pixels.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

STARTS = ("scratch", "prior")
# What is shown of metrics.jsonl, and whether more is better.
SCORES = {
    "t2i": {"score_count": True, "score_colour": True, "score_shape": True, "score_all": True},
    "nvs": {"score_psnr": True, "score_ssim": True},
    "i2v": {"score_psnr": True, "score_flow_error": False},
}


def train(args: argparse.Namespace, start: str, seed: int) -> pathlib.Path:
    """One run; returns its directory. Raises SystemExit if it fails."""
    workdir = pathlib.Path(args.out) / args.task / f"{start}_{seed}"
    if _points(workdir).get(args.steps):
        return workdir
    every = args.steps // args.points
    command = [
        sys.executable, "-m", "lumos_jax.main", f"--config=configs/{args.task}.py:desk", f"--workdir={workdir}",
        f"--config.train.steps={args.steps}", f"--config.train.seed={seed}", f"--config.eval.every={every}",
        f"--config.eval.num_scored={args.scored}", f"--config.checkpoint.every={args.steps}",
        f"--config.optimizer.ema_decay={args.ema_decay}", f"--config.init_from={args.prior if start == 'prior' else ''}",
    ]  # fmt: skip
    print(f"{args.task} from {start}, seed {seed}: {args.steps} steps", file=sys.stderr, flush=True)
    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(f"that run ended with exit code {code}: see above, and {workdir}")
    return workdir


def _points(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """step -> what was measured there on held-out records."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {line["step"]: line for line in lines if "held_out_loss" in line}


def gather(args: argparse.Namespace) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Trains what is missing: start -> metric -> step -> a value a seed."""
    names = ["held_out_loss", "held_out_shuffled_margin", *SCORES[args.task]]
    found = {start: {name: {} for name in names} for start in STARTS}
    for seed in range(args.seeds):
        for start in STARTS:
            for step, values in _points(train(args, start, seed)).items():
                for name in names:
                    if name in values:
                        found[start][name].setdefault(step, []).append(values[name])
    return found


def table(found, seeds: int) -> str:
    """Lines of metric, step, scratch, prior."""
    lines = [f"{'metric':<26}{'step':>6}  {'scratch':>18}  {'prior':>18}   (mean, deviation over {seeds} seeds)"]
    for name in found["scratch"]:
        for step in found["scratch"][name]:
            cells = [found[start][name][step] for start in STARTS]
            spread = [statistics.stdev(cell) if len(cell) > 1 else 0.0 for cell in cells]
            text = [f"{statistics.mean(cell):>10.4f} {dev:>7.4f}" for cell, dev in zip(cells, spread, strict=True)]
            lines.append(f"{name:<26}{step:>6}  {text[0]}  {text[1]}")
    return "\n".join(lines)


def plot(found, task: str, path: pathlib.Path) -> None:
    """A panel a metric over steps, with a band of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in found["scratch"] if found["scratch"][name]]
    columns = -(-len(names) // 2)
    rows = -(-len(names) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(3.4 * columns, 2.7 * rows), constrained_layout=True)
    panels = list(panels.flat)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, names, strict=False):
        for start in STARTS:
            steps = sorted(found[start][name])
            values = [found[start][name][step] for step in steps]
            mean = [statistics.mean(v) for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            panel.plot(steps, mean, marker="o", markersize=3, label=f"from {start}")
            low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
            panel.fill_between(steps, low, high, alpha=0.2)
        panel.set_title(name.removeprefix("score_").replace("_", " "), fontsize=9)
        panel.set_xlabel("training steps", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{task}: from scratch and from the I2I prior", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains, prints the table, writes the numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", required=True, choices=tuple(SCORES))
    add("--prior", required=True, help="the directory of an I2I desk run")
    add("--steps", type=int, default=600, help="of every run (600)")
    add("--seeds", type=int, default=3, help="runs from each start (3)")
    add("--points", type=int, default=3, help="evaluations a run, besides the one at step 0 (3)")
    add("--scored", type=int, default=128, help="held-out records that are drawn and scored each time (128)")
    # What is judged is the average, and that of the config's long runs would still be half the beginning.
    add("--ema-decay", type=float, default=0.98, help="of the averaged weights, over few steps (0.98)")
    add("--out", default="runs/transfer", help="where the runs are kept (runs/transfer)")
    args = parser.parse_args()
    found = gather(args)
    print(table(found, args.seeds))
    folder = pathlib.Path(args.out)
    (folder / f"{args.task}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, args.task, folder / f"{args.task}.png")
    print(folder / f"{args.task}.png")


if __name__ == "__main__":
    main()

"""The pages of `lumos_jax.demo` in a real browser: samples are those of `lumos_jax.sample`, and mistakes are messages."""

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from configs import i2i, i2v, nvs, t2i
from lumos_jax import demo
from lumos_jax.config import io as config_io
from lumos_jax.evaluation import intervals, scoring
from tests import running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLAYWRIGHT = importlib.util.find_spec("playwright")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and PLAYWRIGHT), reason="no chromium is installed (apt-get install chromium), or no playwright"
)
SECONDS = 60_000  # milliseconds that anything may take
DONE, STOPPED, ERROR = re.compile("^done in"), re.compile("^stopped$"), re.compile("^error: ")
STEP = re.compile(r"^step \d+ of 4000, \d\d:\d\d left")


def make_run(workdir, module, steps=2, seed=0):
    """A run of a task at step 1, whose weights are noise."""
    made = module.test()
    made.model.size, made.encoder.size = "32x1x2", "32x1x4/8" if module is not t2i else made.encoder.size
    made.eval.steps, made.train.seed = steps, seed
    return running.untrained(workdir, config_io.resolve(made), seed)


def log(run, step, **values):
    """What training leaves of a step."""
    speed = {"images_per_second": 10.0, "step_seconds": 1.6, "goodput": 0.5}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step, **speed, **values}) + "\n")
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), (step, 0, 0)).save(run / "samples" / f"step_{step}.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    made = {name: make_run(root / name, module) for name, module in
            (("images", i2i), ("texts", t2i), ("views", nvs), ("clips", i2v))}  # fmt: skip
    shutil.copytree(made["images"], root / "copy")
    return made | {"copy": root / "copy"}


@pytest.fixture(scope="module")
def served(runs, program, tmp_path_factory):
    """(address, folder of temporary files) of a page with all runs."""
    folder = tmp_path_factory.mktemp("temporary")
    log(runs["images"], 2)
    arguments = [f"--workdir={run}" for run in runs.values()] + [f"--watch={runs['images']}", "--port=0"]
    started = program("lumos_jax.demo", *arguments)
    started["env"]["TMPDIR"] = str(folder)
    process = running.start(started)
    try:
        running.wait_for(lambda: "the page is at" in process.output(), process)
        yield re.search("the page is at (.*)", process.output())[1], folder
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 143
    assert not list(folder.glob("lumos_jax_demo_*"))  # uploads and samples are deleted
    assert "Traceback" not in process.output()


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A tab of the page, as a user sees it."""

    def __init__(self, browser, address, tab):
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.foreign = []
        self.page.on("request", lambda request: self.foreign.append(request.url))
        self.page.goto(address)
        self.page.get_by_role("tab", name=tab, exact=True).click()
        self.panel = self.page.locator("[role=tabpanel]:visible")
        self.address = address

    def close(self):
        self.context.close()
        local = (self.address, "data:", "blob:")
        assert not [url for url in self.foreign if not url.startswith(local)]  # nothing is fetched from elsewhere

    def until(self, pattern, label="Status", side=0):
        """The text of a field once it matches."""
        from playwright import sync_api

        field = self.panel.get_by_label(label).nth(side)
        sync_api.expect(field).to_have_value(pattern, timeout=SECONDS)
        return field.input_value()

    def fill(self, label, value):
        self.panel.get_by_label(label, exact=True).fill(str(value))
        self.panel.get_by_label(label, exact=True).blur()

    def click(self, text, pattern=DONE):
        """Clicks a button and waits until the status, which is emptied before, matches."""
        self.panel.get_by_label("Status").first.evaluate("field => field.value = ''")
        self.panel.get_by_role("button", name=text, exact=True).click()
        return self.until(pattern)

    def command(self, side=0):
        return self.panel.locator(".command textarea").nth(side).input_value()

    def file(self, name, side=0):
        """The bytes of a file that the page offers."""
        link = self.panel.locator(f"a[download='{name}']").nth(side)
        return self.page.request.get(link.get_attribute("href")).body()


@pytest.fixture
def visit(browser, served):
    """(name of a tab) -> Page, whose run is loaded."""
    with contextlib.ExitStack() as stack:

        def open_tab(tab, loaded=True):
            page = Page(browser, served[0], tab)
            stack.callback(page.close)
            if loaded:
                page.until(DONE)
            return page

        yield open_tab


@pytest.fixture
def sampled(program, tmp_path):
    """(command of the page, names of files) -> the bytes of these files, which it writes in tmp_path."""

    def run(command, *names):
        words = shlex.split(command.replace("--out=", f"--out={tmp_path}/"))
        assert words[:3] == ["python", "-m", "lumos_jax.sample"]
        words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words[2:]]
        running.finish(running.start(program(*words)))
        return [(tmp_path / name).read_bytes() for name in names]

    return run


@needs_browser
def test_uploaded_images_and_the_same_on_the_command_line(visit, sampled, tmp_path, served):
    page = visit("images")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "a b.png")
    frames = [Image.new("RGB", (20, 20), color) for color in ("blue", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    page.panel.locator("input[type=file]").set_input_files([tmp_path / "a b.png", tmp_path / "moving.gif"])
    page.panel.locator(".chosen img").nth(1).wait_for()
    page.fill("Seed", 7)
    page.click("Variations")
    command = page.command()
    assert "--images 'a b.png' moving.gif" in command
    page.panel.locator(".command button").click()
    assert page.page.evaluate("navigator.clipboard.readText()") == command
    assert [page.file("samples.png")] == sampled(command, "samples.png")
    inside = [path for path in served[1].rglob("*") if path.name in ("a b.png", "moving.gif")]
    assert inside  # the uploads are in the temporary folder
    assert {path.relative_to(served[1]).parts[0][:15] for path in inside} == {"lumos_jax_demo_"}


@needs_browser
def test_the_path_between_two_images(visit, sampled):
    page = visit("images")
    page.click("Path", ERROR)
    assert "a path needs two images" in page.until(ERROR)
    page.panel.locator(".held-out button").nth(2).click()
    page.panel.locator(".chosen img").nth(1).wait_for()
    page.click("Path")
    assert "--images held-out:0 held-out:2 --interpolate=8" in page.command()
    assert [page.file("samples.png")] == sampled(page.command(), "samples.png")
    frame = page.panel.get_by_label("Frame").locator("visible=true").first
    assert frame.get_attribute("max") == "9"  # both ends and 8 samples
    shown = page.panel.locator("img").locator("visible=true").last
    before = shown.get_attribute("src")
    page.panel.locator("input[type=range]").last.press("Home")
    page.page.wait_for_function(
        "([image, before]) => image.src != before", arg=[shown.element_handle(), before], timeout=SECONDS
    )


@needs_browser
def test_steps_are_shown_and_stop_ends_what_samples_or_waits(visit):
    """A visitor's Stop takes that visitor's request out of the queue, and leaves what another one samples."""
    first, second = visit("images"), visit("images")
    before = second.command()
    for number in (1, 2, 3):  # beside the first: 16 samples of each in 250 steps are 4,000 steps
        first.panel.locator(".held-out button").nth(number).click()
        first.panel.locator(".chosen img").nth(number).wait_for()
    first.fill("Steps", 250)
    first.fill("Samples", 16)
    first.panel.get_by_role("button", name="Variations", exact=True).click()
    first.until(STEP)
    for seed in (5, 6):
        second.fill("Seed", seed)
        second.panel.get_by_role("button", name="Variations", exact=True).click()
        second.panel.get_by_text(re.compile("queue: 1/1")).first.wait_for()
        if seed == 5:
            second.click("Stop", STOPPED)
    assert second.command() == before
    first.until(STEP)
    first.click("Stop", STOPPED)
    second.until(DONE)
    assert "--seed=6 " in second.command()
    first.fill("Steps", 2)
    first.fill("Samples", 1)
    first.click("Variations")


@needs_browser
def test_prompts(visit, sampled):
    page = visit("texts")
    prompts = page.panel.get_by_label("Prompts")
    for text, message in (
        ("", "write a prompt first"),
        ("x" * 10_000, "10000 characters: at most 2000"),
        ("--out=x", "hyphen"),
    ):
        prompts.fill(text)
        page.click("Sample", re.compile(message))
    prompts.fill("a red sphere\ntwo <b>blue</b> 'boxes'")
    page.click("Sample")
    assert [page.file("samples.png")] == sampled(page.command(), "samples.png")


@needs_browser
def test_an_orbit_to_drag(visit, sampled):
    page = visit("views")
    slider = page.panel.locator("#azimuth input[type=range]")
    box = slider.bounding_box()
    mouse, middle = page.page.mouse, box["y"] + box["height"] / 2
    mouse.move(box["x"] + 0.58 * box["width"], middle)
    mouse.down()
    for part in range(12):
        mouse.move(box["x"] + (0.6 + 0.02 * part) * box["width"], middle)
    while "--steps=3" not in page.command():  # few steps while it moves
        page.page.wait_for_timeout(50)
    mouse.up()
    turned = slider.input_value()
    page.page.wait_for_function(
        "([field, words]) => words.every(word => field.value.includes(word))",
        arg=[page.panel.locator(".command textarea").element_handle(), ["--steps=2 ", f"--azimuths {turned} "]],
        timeout=SECONDS,
    )
    page.until(DONE)
    assert float(turned) > 90
    assert [page.file("samples.png")] == sampled(page.command(), "samples.png")
    page.fill("Views of the orbit", 3)
    page.click("Orbit")
    names = ("samples.png", "samples.gif", "samples.mp4")
    assert [page.file(name) for name in names] == sampled(page.command(), *names)


@needs_browser
def test_clips(visit, sampled):
    page = visit("clips")
    page.fill("Frames a second", "")
    page.click("Clip", re.compile("error: Frames a second must be a number from 0.1 to 50"))
    page.fill("Frames a second", 6)
    page.fill("Frames", 3)
    page.click("Clip")
    assert [page.file("samples.gif")] == sampled(page.command(), "samples.gif")


@needs_browser
def test_two_runs_on_the_same_noise(visit):
    page = visit("Compare images, copy", loaded=False)
    page.panel.locator(".held-out button").first.wait_for()
    page.click("Variations")
    page.until(DONE, side=1)
    commands = page.command(0), page.command(1)
    assert commands[0].replace("/images ", "/copy ") == commands[1] != commands[0]
    assert page.file("samples.png", 0) == page.file("samples.png", 1)  # of equal weights


@needs_browser
def test_a_run_that_trains(visit, runs):
    page = visit("Watch images", loaded=False)
    page.until(re.compile("training, step 2 of 12, 0 min left, 10.0 images/s, goodput 50.0%"), "State")
    for name in ("whole", "cut"):
        (runs["images"] / "evaluated" / name).mkdir(parents=True)
        estimate = intervals.Estimate(22.0, None, 0.25, 21.5, 22.5, "jackknife", {})
        scores = scoring.Scores({"psnr": estimate}, {"psnr": {"better": "higher"}})
        scoring.save(scores, runs["images"] / "evaluated" / name, {"step": 4})
    cut = runs["images"] / "evaluated" / "cut" / "scores.json"
    cut.write_text(cut.read_text()[:40])
    log(runs["images"], 4, **{"held_out_margin": 0.5, "suite_lpips@64": 0.25, "suite_lpips@64_error": 0.01})
    page.until(re.compile("training, step 4 of 12"), "State")
    page.panel.get_by_text("0.2304 .. 0.2696").locator("visible=true").first.wait_for()
    page.panel.get_by_text("held_out_margin").first.wait_for()
    page.until(re.compile("damaged or half-written, skipped: evaluated/cut/scores.json$"), "State")
    page.panel.get_by_text("evaluated/whole: psnr").locator("visible=true").first.wait_for()
    page.panel.get_by_text("21.5 .. 22.5").locator("visible=true").first.wait_for()
    page.panel.get_by_text("Sample sheet of step 4").wait_for()
    page.panel.locator("input[type=range]").press("Home")
    page.panel.get_by_text("Sample sheet of step 2").wait_for()


def bomb(path):
    """A PNG whose header says 300 megapixels."""
    header = struct.pack(">IIBBBBB", 20_000, 15_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@needs_browser
def test_mistakes_are_messages(visit, runs, tmp_path, served):
    page = visit("images")
    (tmp_path / "notes.png").write_text("no image")
    bomb(tmp_path / "bomb.png")
    files = page.panel.locator("input[type=file]")
    files.set_input_files([tmp_path / "notes.png", tmp_path / "bomb.png"])
    said = page.until(re.compile("notes.png"), "Problem")
    assert "notes.png is not a readable image" in said
    assert "bomb.png is not a readable image" in said
    assert str(served[1]) not in said
    png = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(png).save(tmp_path / "x.png")
    odd = {"name": "../../../../escaped.png", "mimeType": "image/png", "buffer": (tmp_path / "x.png").read_bytes()}
    files.set_input_files([odd])
    page.panel.get_by_text("escaped.png").wait_for()
    assert {path.relative_to(served[1]).parts[0][:15] for path in served[1].parent.parent.rglob("*escaped.png")} == {
        "lumos_jax_demo_"
    }
    for label, value in (("Steps", ""), ("Guidance", "1e999"), ("Seed", "-1"), ("Samples", "1.5"), ("Steps", "9999")):
        page.fill(label, value)
        page.click("Variations", re.compile(f"error: {label} must be a"))
        page.fill(label, 2)
    hidden = runs["images"].rename(runs["images"].with_name("gone"))
    page.click("Variations", re.compile("error: .*no config.json"))
    hidden.rename(runs["images"])
    page.click("Variations")


@needs_browser
def test_two_visitors_are_served_in_turn(visit):
    pages = [visit("images"), visit("images")]
    for seed, page in enumerate(pages):
        page.fill("Seed", seed)
        page.fill("Steps", 50)
        page.panel.get_by_role("button", name="Variations", exact=True).click()
    for seed, page in enumerate(pages):
        page.page.wait_for_function(
            f"field => field.value.includes('--steps=50 --sampler=dpm++ --seed={seed}')",
            arg=page.panel.locator(".command textarea").element_handle(), timeout=SECONDS,
        )  # fmt: skip
        page.until(DONE)
    assert pages[0].file("samples.png") != pages[1].file("samples.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run with --workdir=RUN"),
        (["--workdir=/nowhere"], "no config.json"),
        ([f"--workdir={__file__}"], "`lumos_jax.convert import` makes a run directory of released weights"),
        (["--watch=/nowhere"], "--watch=/nowhere is no directory"),
        (["--watch=/", "--auth=me"], "--auth must be NAME:PASSWORD"),
        (["--watch=/", "--port=70000"], "--port=70000 must be from 0 to 65535"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    assert demo.main(arguments) == 2
    assert message in capsys.readouterr().err

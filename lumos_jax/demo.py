"""A page in the browser to sample from trained runs, and to watch one train: python -m lumos_jax.demo ...

  --workdir=runs/desk
      a tab with what the run's task samples from: images, texts, cameras; and the command line for the same samples
  --workdir=runs/desk --workdir=runs/scratch
      a tab a run, and one that compares two runs of a task on the same noise
  --watch=runs/desk
      losses, scores and sample sheets of a run, refreshed while it trains; only its files are read

The page is at http://127.0.0.1:7860, for this machine alone. --host=0.0.0.0 opens it to the network, --share to the world
through Gradio's servers; both should have --auth=NAME:PASSWORD. Needs the extra `demo`: pip install '.[demo]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence

from lumos_jax import cli
from lumos_jax.checkpoints import CheckpointError, quiet_logs
from lumos_jax.exit_codes import STOPPED
from lumos_jax.train.experiment import use_compilation_cache

UPLOAD_LIMIT = "32mb"


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m lumos_jax.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", action="append", default=[], metavar="RUN", help="directory of a run; may be given several times")
    add("--watch", action="append", default=[], metavar="RUN", help="directory of a run whose training is shown")
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine alone")
    add("--port", type=int, default=7860, help="default: 7860; 0 takes a free one")
    add("--share", action="store_true", help="make a public address, through Gradio's servers")
    add("--auth", metavar="NAME:PASSWORD", help="ask for this name and password")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError for values that are not allowed."""
    args = _parser().parse_args(argv)
    if not args.workdir and not args.watch:
        raise ValueError("name a run with --workdir=RUN, or one to watch with --watch=RUN; --help has examples")
    if args.auth is not None and not all(args.auth.partition(":")):
        raise ValueError("--auth must be NAME:PASSWORD")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port={args.port} must be from 0 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("lumos_jax.demo needs Gradio: pip install '.[demo]'")
    return args


def run(argv: Sequence[str] | None = None) -> None:
    """Serves the page until it is interrupted. Raises ValueError for a user's mistake."""
    args = parse(argv)
    use_compilation_cache()
    with tempfile.TemporaryDirectory(prefix="lumos_jax_demo_", ignore_cleanup_errors=True) as folder:
        # Uploads and samples, of Gradio and of us, are there and nowhere else, and go with the folder.
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "served")
        tempfile.tempdir = os.path.join(folder, "made")
        os.mkdir(tempfile.tempdir)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            _serve(args)
        finally:
            tempfile.tempdir = None


def _serve(args: argparse.Namespace) -> None:
    from lumos_jax import pages  # Gradio takes seconds to import, and reads its environment then

    runs = [pages.Run(workdir) for workdir in args.workdir]
    page = pages.build(runs, args.watch)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED["SIGTERM"]))  # so that the folder is removed
    page.queue(max_size=64, api_open=False)
    _, address, public = page.launch(
        server_name=args.host, server_port=args.port or None, share=args.share,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None, max_file_size=UPLOAD_LIMIT, prevent_thread_lock=True,
        quiet=True, show_error=True, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False,
    )  # fmt: skip
    print(f"the page is at {public or address}", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
        pages.close(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve as the command line says; return the exit code."""
    return cli.call(lambda: run(arguments), CheckpointError)


if __name__ == "__main__":
    quiet_logs()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Gradio's threads may still compile or sample: the interpreter's shutdown under them can abort the process.
    os._exit(code)

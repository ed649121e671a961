"""Ports for processes that meet on this machine."""

import socket


def free_port():
    """A port that is free, as is the one below it: processes meet there (lumos_jax/cluster/processes.py)."""
    while True:
        with socket.socket() as high, socket.socket() as low:
            high.bind(("", 0))
            port = high.getsockname()[1]
            try:
                low.bind(("", port - 1))
            except OSError:
                continue
            return port

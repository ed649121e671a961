"""Ports for processes that meet on this machine."""

import socket


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]

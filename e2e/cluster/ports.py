"""Ports of the loopback interface for servers that are told their port before they start."""

from __future__ import annotations

import socket


def reserve_port() -> int:
    """A port that Linux gives to nobody else until this process ends, neither as a free port nor to an outgoing connection.

    A server that names it may listen there, end, and listen again. Only asking for a free port would leave it free until
    the server starts, and between two lives of it: long enough, where other tests open thousands of connections.
    """
    held = socket.socket()
    # Bound and not listening, it lets in whoever sets the same option, as redis-server, Go's and asyncio's servers do.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = int(held.getsockname()[1])
    held.detach()  # open until this process ends
    return port

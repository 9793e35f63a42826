"""Runs the application until it is told to stop."""

from __future__ import annotations

import ipaddress
import signal
import socket

import uvicorn

from fourfold.api.app import create_app
from fourfold.serve.engine import Engine

GRACE_SECONDS = 5  # for answers under way, once Ctrl-C or SIGTERM came


def run_server(
    engine: Engine, model_name: str, *, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None
) -> None:
    """Serves until Ctrl-C or SIGTERM, then lets answers under way finish for a few seconds and closes the engine.

    Port 0 takes a free one. To be called in the main thread. Raises OSError if the address cannot be taken.
    """
    with socket.create_server((host, port), family=_family(host)) as listener:
        address = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(engine, model_name, api_key),
            timeout_graceful_shutdown=GRACE_SECONDS,
            log_level="warning",
            access_log=False,
        )
        print(f"Fourfold serves {model_name}: playground {address}/, OpenAI API {address}/v1", flush=True)
        if api_key is None and not _loopback(host):
            print("Anybody who reaches this address may use it: give an API key to change that.", flush=True)
        # Once it has shut down, uvicorn raises the signal that it was stopped by again; this makes both end alike.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            engine.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""``sft-dist serve``: a small server to try a run with clients of the OpenAI API."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sft_dist.checkpoint.source import Source, find_newest_source
from sft_dist.errors import ConfigError

PACKAGES = ("fastapi", "uvicorn")

# Running answers get so long to end after Ctrl-C.
SHUTDOWN_S = 2


@dataclass(frozen=True)
class Address:
    """
    Args:
        port: 0: any that is free.
        api_key: that clients have to show; None: none, on this machine only.
    """

    host: str
    port: int
    api_key: str | None

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def require_packages() -> None:
    """Raises ``ConfigError`` where the packages of the extra ``serve`` are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            fix="pip install 'sft-dist[serve]'",
        )


def serve(path: str, address: Address, *, max_new_tokens: int, checkpoint: str | None, device: str, dtype: str) -> None:
    """Answers requests until it is interrupted.

    Raises:
        ConfigError: the address needs a key or is taken, or PATH is nothing that answers.
        CheckpointError, PlanError: it does not load, or does not fit.
    """
    _check(address)
    source = find_newest_source(path, checkpoint=checkpoint)
    # Before the model is loaded, which may take minutes.
    with _listening(address) as listening:
        import uvicorn

        from sft_dist.generate.api import Service, make_app
        from sft_dist.generate.command import load_showing

        notes = Console(stderr=True, highlight=False)
        loaded = load_showing(source, notes, device=device, dtype=dtype)  # type: ignore[arg-type]
        service = Service(
            loaded=loaded,
            aliases=frozenset({path, str(Path(path).expanduser().resolve()), "default"}),
            api_key=address.api_key,
            hosts=("localhost", "127.0.0.1", "::1", address.host) if address.is_local and not address.api_key else None,
            max_new_tokens=max_new_tokens,
            created=int(time.time()),
        )
        port = listening.getsockname()[1]
        for line in welcome(source, address, port, name=loaded.name, chats=loaded.prompter.chats):
            notes.print(line, soft_wrap=True)
        config = uvicorn.Config(
            make_app(service), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S, server_header=False
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            notes.print("stopped")


def welcome(source: Source, address: Address, port: int, *, name: str, chats: bool) -> list[str]:
    """What a user has to know, with rich's markup."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address.host, address.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    url = f"http://{host}:{port}/v1"
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Hello"}
    body = json.dumps({"model": name, **asked}, ensure_ascii=False)
    key = "" if address.api_key is None else ' -H "Authorization: Bearer $SFT_DIST_API_KEY"'
    endpoint = "chat/completions" if chats else "completions"
    run = "RUN" if source.config is None else shlex.quote(str(source.config.output_dir))
    shown_key = "any" if address.api_key is None else "the one that was given"
    production = f"sft-dist export {run} --merge; vllm serve FOLDER"
    return [
        f"base_url [bold]{escape(url)}[/]  model [bold]{escape(name)}[/]  api_key {shown_key}",
        escape(f"curl -s {url}/{endpoint} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"),
        f"[dim]one answer at a time, to try it; for production vLLM: {escape(production)}[/]",
    ]


def _check(address: Address) -> None:
    if address.api_key == "":
        raise ConfigError("--api-key is empty", fix="give a key, or leave --api-key and SFT_DIST_API_KEY out")
    if not address.is_local and address.api_key is None:
        raise ConfigError(
            f"--host {address.host} lets other machines ask, and there is no API key",
            fix="set SFT_DIST_API_KEY or --api-key, or keep to 127.0.0.1",
        )


def _listening(address: Address) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
    except OSError as error:
        raise ConfigError(
            f"{address.host} port {address.port} cannot be listened on: {error.strerror}",
            fix="name another --port (0: any that is free) or --host",
        ) from error
    return listening

"""Settings of the HTTP shim, checked once. Knows no arrays, no MPI and no web framework."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from mlx_dist.errors import ConfigError

LOOPBACK = "127.0.0.1"
CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
GENERATION_PATHS = frozenset({CHAT_PATH, COMPLETION_PATH})
_LEAST_READY_AGE_S = 6.0


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Where the shim listens, whom it answers, and how much it takes. Fields are flags."""

    host: str = LOOPBACK
    """The address to listen on. Any but a loopback address needs `api_key`."""
    port: int = 8100
    """The port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """What `Authorization: Bearer ...` must hold on every route but /health."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a Host header may have besides loopback ones and `host`; "*" is any."""
    cors_origins: tuple[str, ...] = ()
    """Origins, as in https://example.org, whose web pages may call; "*" is any."""

    max_body_bytes: int = 4 << 20
    """Largest request body."""
    max_header_bytes: int = 16 << 10
    """Largest request line and headers together."""
    max_connections: int = 2048
    """Most connections; a request beyond them is answered 503."""
    max_json_depth: int = 64
    """Deepest nesting of a body."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None leaves it to the model's context and the KV memory."""
    max_choices: int = 32
    """Most answers to one request: its prompts times `n`."""
    max_stops: int = 16
    """Most stop strings."""
    max_logprobs: int = 20
    """Most likeliest tokens told at each position."""
    max_tools: int = 128
    """Most tools."""

    request_timeout_s: float = 1800.0
    """Longest time from a request's arrival to the end of its answer."""
    body_timeout_s: float = 30.0
    """Longest time that headers may take to arrive, and then the body."""
    keep_alive_s: float = 5.0
    """A stream gets a comment after this long without a token."""
    ready_age_s: float = 10.0
    """/ready says 503 when no step has come back through all ranks for this long."""
    stop_timeout_s: float = 5.0
    """How long stopping waits for answers that are under way."""
    access_log: bool = False
    """Log every request."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; use 0 to 65535")
        for field in fields(self):
            value = getattr(self, field.name)
            is_limit = field.name.startswith("max_") or field.name.endswith("_s")
            # Written so that NaN is refused too.
            if is_limit and value is not None and not value > 0:
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(f"{flag} is {value}; use more than 0")
        if self.ready_age_s < _LEAST_READY_AGE_S:
            raise ConfigError(
                f"--ready-age-s is {self.ready_age_s}; use {_LEAST_READY_AGE_S} or more: ranks "
                "without work answer every 5 s"
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key has characters that a header cannot carry; use ASCII")
        if self.api_key is not None and self.api_key.strip() != (self.api_key or " "):
            raise ConfigError("the API key is empty or has spaces around it; write it without")
        check_address(self.host, self.api_key)


def check_address(host: str, api_key: str | None) -> None:
    """Raise ConfigError if `host` would be open to the network without a key."""
    if api_key is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines; give it an --api-key, "
            "or use 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def is_wildcard(host: str) -> bool:
    """Whether listening on `host` is listening on every address of this machine."""
    return is_ip(host) and ipaddress.ip_address(host).is_unspecified


def is_ip(host: str) -> bool:
    """Whether `host` is an address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

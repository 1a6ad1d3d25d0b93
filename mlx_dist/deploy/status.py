"""`mlx-dist cluster status`: whether the server runs, and how it says it is."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any

from mlx_dist.cluster.state import ServerRecord, StateFolder

_ANSWERS_S = 5.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Status:
    """How a server is. `cluster` is what its route of that name says; `fault` why it is not ready.

    `started_at` is in seconds since 1970.
    """

    is_running: bool
    is_ready: bool
    fault: str | None = None
    url: str | None = None
    pid: int | None = None
    started_at: float | None = None
    hosts: tuple[str, ...] = ()
    log: str | None = None
    cluster: dict[str, Any] | None = None

    @property
    def exit_code(self) -> int:
        """0 if it is ready, 3 if it does not run (as of init scripts), 4 if it runs unready."""
        return 0 if self.is_ready else 4 if self.is_running else 3

    def as_object(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """What a person reads."""
        if not self.is_running:
            return [f"not running: {self.fault}"]
        assert self.started_at is not None
        hours, seconds = divmod(int(time.time() - self.started_at), 3600)
        lines = [
            "ready" if self.is_ready else f"not ready: {self.fault}",
            f"url      {self.url or 'none yet'}",
            f"process  {self.pid}, up {hours}:{seconds // 60:02}:{seconds % 60:02}",
            f"hosts    {', '.join(self.hosts)}",
            f"log      {self.log}",
        ]
        if self.cluster:
            lines += _cluster_lines(self.cluster)
        return lines


def status_of(state: StateFolder, api_key: str | None) -> Status:
    """How the server of `state` is. Raises ConfigError if the state cannot be read."""
    record = state.read()
    if record is None:
        return Status(False, False, f"nothing was started in {state.path}")
    if not record.is_running:
        fault = f"it is over; see {state.log}, and `mlx-dist cluster down` for what may be left"
        return Status(False, False, fault, hosts=tuple(record.hosts), log=str(state.log))
    url = record.url or state.served_url()
    if url is None:
        return _running(record, state, None, "it is starting; see its log")
    server = _Server(url, api_key)
    try:
        server.get("/health")
        server.get("/ready")
        cluster = server.get("/cluster")
    except _UnreadyError as error:
        return _running(record, state, url, str(error))
    return _running(record, state, url, None, cluster)


def _running(
    record: ServerRecord,
    state: StateFolder,
    url: str | None,
    fault: str | None,
    cluster: dict[str, Any] | None = None,
) -> Status:
    return Status(
        is_running=True,
        is_ready=fault is None,
        fault=fault,
        url=url,
        pid=record.pid,
        started_at=record.started_at,
        hosts=tuple(record.hosts),
        log=str(state.log),
        cluster=cluster,
    )


class _UnreadyError(Exception):
    """What the server answers, or that it does not."""


class _Server:
    """The server's own routes, asked on this machine and past any proxy."""

    def __init__(self, url: str, api_key: str | None) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        host = _ANYWHERE.get(host.strip("[]"), host.strip("[]"))
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises _UnreadyError."""
        request = urllib.request.Request(self._url + path, headers=self._headers)
        try:
            with self._opener.open(request, timeout=_ANSWERS_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise _UnreadyError(_reason(error)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _UnreadyError(f"{self._url}{path} does not answer: {reason}") from None
        return answer if isinstance(answer, dict) else {}


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says against a request."""
    try:
        said = str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        said = f"it answers {error.code}"
    if error.code == 401:
        return f"{said}; it is told by MLX_DIST_API_KEY or --api-key-file here, too"
    return said


def _cluster_lines(cluster: dict[str, Any]) -> list[str]:
    stats = cluster["stats"]
    rows = [["rank", "host", "layers", "weights"]]
    for rank in cluster["ranks"]:
        start, end = rank["layers"]
        size = f"{rank['weights_bytes'] / 1e9:.3f} GB"
        rows.append([str(rank["rank"]), rank["host"], f"[{start}, {end})", size])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    return [
        f"model    {cluster['model']}",
        f"serving  {stats['num_active']} of up to {stats['num_slots']} sequences, "
        f"{stats['num_waiting']} waiting; {stats['completion_tokens']} tokens generated so far",
        "",
        *(line.rstrip() for line in table),
    ]

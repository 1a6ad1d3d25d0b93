"""A host of a test: the first process of namespaces of its own, and the `ssh` that reaches it.

    host.py up NAME FOLDER                    is the host NAME until it is killed
    host.py on NAME FOLDER COMMAND...         runs COMMAND there, in this environment and folder
    host.py ssh [OPTIONS] NAME WORDS          as ssh does: by the network, in no environment

What `on` runs gets its caller's stdin, stdout and stderr, passed over a Unix socket in FOLDER. What
`ssh` runs has a connection for each of them, so that a cut network cuts them off.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

_SSH_PORT = 22
# Else it reads its user's file when its stdin is a connection.
_BASH = ("bash", "--norc", "-c")
_SSH_ENV = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": os.environ.get("HOME", "/root")}
_MOST_BYTES = 1 << 20
# What a caller sends first is here at once, or the network has just been cut.
_FIRST_WORDS_S = 2.0
# What a command has printed last comes soon after its exit code.
_LAST_WORDS_S = 2.0


def up(name: str, folder: Path) -> None:
    """Start what comes over the socket, and see that nothing that ended is left behind."""
    socket.sethostname(name)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    scratch = folder / f"{name}-tmp"
    scratch.mkdir()
    door = socket.create_server(("", _SSH_PORT))
    caller = socket.socket(socket.AF_UNIX)
    caller.bind(str(folder / name))
    caller.listen()
    wakes, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    callers: dict[int, socket.socket] = {}
    streams: dict[str, list[socket.socket]] = defaultdict(list)
    looking = selectors.DefaultSelector()
    for file in (door, caller, wakes):
        looking.register(file, selectors.EVENT_READ)
    print("up", flush=True)
    while True:
        for key, _ in looking.select():
            if key.fileobj is door:
                _answer(door.accept()[0], streams, callers, scratch)
            elif key.fileobj is caller:
                connection = caller.accept()[0]
                message, files, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
                child = _start(json.loads(message), files, scratch)
                callers[child] = connection
                looking.register(connection, selectors.EVENT_READ, child)
            elif key.fileobj is wakes:
                wakes.recv(4096)
                _reap(callers, looking)
            elif key.fileobj in callers.values():
                # A test that gave up waits for the end of what it had started.
                looking.unregister(key.fileobj)
                _end_session(key.data)


def _answer(
    connection: socket.socket,
    streams: dict[str, list[socket.socket]],
    callers: dict[int, socket.socket],
    scratch: Path,
) -> None:
    """Take one of a call's three streams, or the call itself, which comes last."""
    connection.settimeout(_FIRST_WORDS_S)
    with contextlib.suppress(OSError):
        words = _first_line(connection).split(maxsplit=1)
        connection.settimeout(None)
        if words:
            name = words[0].decode()
            streams[name].append(connection)
            if len(words) > 1:
                *three, caller = streams.pop(name)
                files = [os.dup(stream.fileno()) for stream in three]
                for stream in three:
                    stream.close()
                # What ssh has started lives on without it.
                callers[_start(json.loads(words[1]), files, scratch)] = caller
            return
    connection.close()


def _first_line(connection: socket.socket) -> bytes:
    """What comes first, and nothing of what may follow."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line


def _start(job: dict[str, Any], files: list[int], scratch: Path) -> int:
    """Start what is asked for with these as stdin, stdout and stderr; its process id."""
    for file in files:
        os.set_inheritable(file, False)
    try:
        return os.posix_spawn(
            "/bin/bash",
            [*_BASH, 'cd "$1" && shift && exec "$@"', "_", job["folder"], *job["command"]],
            # mpirun has folders there that are called by process ids, which hosts have in common.
            job["env"] | {"TMPDIR": str(scratch)},
            file_actions=[(os.POSIX_SPAWN_DUP2, file, i) for i, file in enumerate(files)],
            setsid=True,
            setsigdef=[signal.SIGCHLD],
        )
    finally:
        for file in files:
            os.close(file)


def _end_session(leader: int) -> None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It may have just ended.
            # After the name, which may have spaces: state, parent, group, session.
            if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def _reap(callers: dict[int, socket.socket], looking: selectors.BaseSelector) -> None:
    """Take every process that ended, and tell its caller how."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            # Orphans come to the first process, too.
            if connection := callers.pop(pid, None):
                with contextlib.suppress(KeyError):
                    looking.unregister(connection)
                with connection, contextlib.suppress(OSError):
                    code = os.waitstatus_to_exitcode(status)
                    connection.send(bytes([code if code >= 0 else 128 - code]))


def on(name: str, folder: Path, command: list[str]) -> int:
    """Run `command` on the host `name` for as long as this runs. Returns its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / name))
        job = {"command": command, "env": dict(os.environ), "folder": str(Path.cwd())}
        socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
        return _code(connection)


def _code(connection: socket.socket) -> int:
    answer = connection.recv(1)
    return answer[0] if answer else 255


def ssh(arguments: list[str]) -> int:
    """Run words in a shell on a host, if the network leads there. Returns its exit code or 255."""
    timeout_s = None
    while arguments[0].startswith("-"):
        flag = arguments.pop(0)
        value = arguments.pop(0) if flag in ("-o", "-l", "-p", "-i") else ""
        if value.startswith("ConnectTimeout="):
            timeout_s = float(value.partition("=")[2])
    name, *words = arguments
    command = [*_BASH, " ".join(words)]
    job = {"command": command, "env": _SSH_ENV, "folder": _SSH_ENV["HOME"]}
    call, connections = secrets.token_hex(8), []
    try:
        for words_first in (call, call, call, f"{call} {json.dumps(job)}"):
            connection = socket.create_connection((name, _SSH_PORT), timeout_s)
            connection.settimeout(None)
            connection.sendall(f"{words_first}\n".encode())
            connections.append(connection)
    except OSError as error:
        print(f"ssh: connect to host {name} port {_SSH_PORT}: {error}", file=sys.stderr)
        return 255
    stdin, stdout, stderr, caller = connections
    threading.Thread(target=_send, args=(stdin,), daemon=True).start()
    printing = [
        threading.Thread(target=_print, args=pair, daemon=True)
        for pair in ((stdout, 1), (stderr, 2))
    ]
    for thread in printing:
        thread.start()
    code = _code(caller)
    for thread in printing:
        thread.join(_LAST_WORDS_S)
    return code


def _send(stream: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(0, _MOST_BYTES):
            stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)


def _print(stream: socket.socket, file: int) -> None:
    with contextlib.suppress(OSError):
        while data := stream.recv(_MOST_BYTES):
            os.write(file, data)


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "up":
        up(rest[0], Path(rest[1]))
    elif role == "on":
        sys.exit(on(rest[0], Path(rest[1]), rest[2:]))
    else:
        sys.exit(ssh(rest))

"""A host of a test: the first process of namespaces of its own, and the `ssh` that reaches it.

    host.py up NAME FOLDER                    is the host NAME until it is killed
    host.py on NAME FOLDER COMMAND...         runs COMMAND there, in this environment and folder
    host.py ssh FOLDER [OPTIONS] NAME WORDS   as ssh does: by the network, in no environment

What runs on a host gets its caller's stdin, stdout and stderr, passed over a Unix socket in FOLDER.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path

_SSH_PORT = 22
_SSH_ENV = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": os.environ.get("HOME", "/root")}
_MOST_BYTES = 1 << 20


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
    looking = selectors.DefaultSelector()
    for file in (door, caller, wakes):
        looking.register(file, selectors.EVENT_READ)
    print("up", flush=True)
    while True:
        for key, _ in looking.select():
            if key.fileobj is door:
                door.accept()[0].close()
            elif key.fileobj is caller:
                _start(caller.accept()[0], callers, scratch, looking)
            elif key.fileobj is wakes:
                wakes.recv(4096)
                _reap(callers, looking)
            elif key.fileobj in callers.values():
                # A test that gave up waits for the end of what it had started.
                looking.unregister(key.fileobj)
                _end_session(key.data)


def _start(
    connection: socket.socket,
    callers: dict[int, socket.socket],
    scratch: Path,
    looking: selectors.BaseSelector,
) -> None:
    message, files, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
    for file in files:
        os.set_inheritable(file, False)
    job = json.loads(message)
    try:
        child = os.posix_spawn(
            "/bin/bash",
            ["bash", "-c", 'cd "$1" && shift && exec "$@"', "_", job["folder"], *job["command"]],
            # mpirun has folders there that are called by process ids, which hosts have in common.
            job["env"] | {"TMPDIR": str(scratch)},
            file_actions=[(os.POSIX_SPAWN_DUP2, file, i) for i, file in enumerate(files)],
            setsid=True,
            setsigdef=[signal.SIGCHLD],
        )
        callers[child] = connection
        # What ssh has started lives on without it.
        if job["is_bound"]:
            looking.register(connection, selectors.EVENT_READ, child)
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


def on(
    name: str, folder: Path, command: list[str], env: dict[str, str], work: str, is_bound: bool
) -> int:
    """Run `command` on the host `name`, bound to this process or not. Returns its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / name))
        job = {"command": command, "env": env, "folder": work, "is_bound": is_bound}
        socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
        answer = connection.recv(1)
    return answer[0] if answer else 255


def ssh(folder: Path, arguments: list[str]) -> int:
    """Run words in a shell on a host, if the network leads there. Returns its exit code or 255."""
    timeout_s = None
    while arguments[0].startswith("-"):
        flag = arguments.pop(0)
        value = arguments.pop(0) if flag in ("-o", "-l", "-p", "-i") else ""
        if value.startswith("ConnectTimeout="):
            timeout_s = float(value.partition("=")[2])
    name, *words = arguments
    try:
        socket.create_connection((name, _SSH_PORT), timeout_s).close()
    except OSError as error:
        print(f"ssh: connect to host {name} port {_SSH_PORT}: {error}", file=sys.stderr)
        return 255
    return on(name, folder, ["bash", "-c", " ".join(words)], _SSH_ENV, _SSH_ENV["HOME"], False)


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "up":
        up(rest[0], Path(rest[1]))
    elif role == "on":
        sys.exit(on(rest[0], Path(rest[1]), rest[2:], dict(os.environ), str(Path.cwd()), True))
    else:
        sys.exit(ssh(Path(rest[0]), rest[1:]))

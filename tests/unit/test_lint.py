"""Nothing that runs what it reads: no pickle, no eval, no mpi4py methods that pickle.

Ruff bans most of it by name. Which methods are mpi4py's it cannot tell, so that this does: it
follows communicators through the names that they are given.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for part in ("mlx_dist", "benchmarks") for p in (ROOT / part).rglob("*.py"))

MODULES = {
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "mpi4py.futures",
    "mpi4py.util",
    "pickle",
    "shelve",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Of an mpi4py communicator, those that take any object and pickle it.
PICKLING = {
    "allgather",
    "allreduce",
    "alltoall",
    "bcast",
    "bsend",
    "exscan",
    "gather",
    "ibsend",
    "improbe",
    "irecv",
    "isend",
    "issend",
    "mprobe",
    "recv",
    "reduce",
    "scan",
    "scatter",
    "send",
    "sendrecv",
    "ssend",
}


def offences(source):
    """What in `source` is banned, as (line, what)."""
    tree = ast.parse(source)
    communicators = _communicators(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if _is_banned(a.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            found += [(node.lineno, name) for name in names if _is_banned(name)][:1]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                found.append((node.lineno, node.func.id))
            found += [
                (node.lineno, f"{word.arg}=True")
                for word in node.keywords
                if word.arg == "allow_pickle"
                and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            ]
        elif isinstance(node, ast.Attribute):
            is_method = node.attr in PICKLING and _is_communicator(node.value, communicators)
            if is_method or ast.unparse(node) == "MPI.pickle":
                found.append((node.lineno, ast.unparse(node)))
    return sorted(found)


def _is_banned(module):
    return any(module == banned or module.startswith(f"{banned}.") for banned in MODULES)


def _communicators(tree):
    """The names and attributes that hold a communicator, as they are written."""
    names = set()
    while True:
        before = len(names)
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
                if "comm" in ast.unparse(node.annotation).lower():
                    target = node.target if isinstance(node, ast.AnnAssign) else node.arg
                    names.add(target if isinstance(target, str) else ast.unparse(target))
            elif isinstance(node, ast.Assign | ast.NamedExpr | ast.withitem):
                value = node.context_expr if isinstance(node, ast.withitem) else node.value
                if _is_communicator(value, names):
                    targets = getattr(node, "targets", None) or [
                        getattr(node, "target", None) or getattr(node, "optional_vars", None)
                    ]
                    names.update(ast.unparse(t) for t in targets if t is not None)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpi4py"):
                names.update(a.asname or a.name for a in node.names if a.name.startswith("COMM_"))
        if len(names) == before:
            return names


def _is_communicator(value, names):
    """Whether `value` is a communicator, or what one of its methods makes of it."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        makes = value.func.attr.startswith(("Dup", "Idup", "Split", "Create", "Clone", "Merge"))
        return makes and _is_communicator(value.func.value, names)
    if isinstance(value, ast.BoolOp):
        return any(_is_communicator(v, names) for v in value.values)
    if isinstance(value, ast.IfExp):
        return any(_is_communicator(v, names) for v in (value.body, value.orelse))
    if isinstance(value, ast.Attribute) and value.attr.startswith("COMM_"):
        return True
    return isinstance(value, ast.Name | ast.Attribute) and ast.unparse(value) in names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path):
    assert offences(path.read_text()) == []


def test_only_the_cluster_package_speaks_to_mpi():
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "mlx_dist")]
    speakers = [path for path in package if "import MPI" in path.read_text()]
    assert speakers and all(path.parent.name == "cluster" for path in speakers)
    # The rule sees the communicators there.
    assert any(_communicators(ast.parse(path.read_text())) for path in speakers)


@pytest.mark.parametrize("module", sorted(MODULES))
@pytest.mark.parametrize("form", ["import {}", "import {} as x", "from {} import x", "import {}.x"])
def test_each_module_is_caught(module, form):
    assert len(offences(form.format(module))) == 1


@pytest.mark.parametrize("builtin", sorted(BUILTINS))
def test_each_builtin_is_caught(builtin):
    assert offences(f"x = 1\n{builtin}('x')") == [(2, builtin)]


FORMS = (
    "MPI.COMM_WORLD.{}(x)",
    "MPI.COMM_WORLD.Dup().{}(x)",
    "comm = MPI.COMM_WORLD\ncomm.{}(x)",
    "self._comm = MPI.COMM_WORLD.Split(0, 1)\nself._comm.{}(x)",
    "self._comm: MPI.Intracomm = make()\nself._comm.{}(x)",
    "def f(channel: MPI.Comm):\n    channel.{}(x)",
    "a = MPI.COMM_SELF\nb = a\nc = b.Clone()\nc.{}(x)",
    "from mpi4py.MPI import COMM_WORLD as w\nw.{}(x)",
    "send = MPI.COMM_WORLD.{}",
)


@pytest.mark.parametrize("method", sorted(PICKLING))
def test_each_method_is_caught_however_the_communicator_is_called(method):
    for form in FORMS:
        assert len(offences(form.format(method))) == 1, form


@pytest.mark.parametrize(
    "source",
    [
        "comm = MPI.COMM_WORLD\ncomm.Send([x, MPI.BYTE], 1)",
        "control.send(x, 1)",
        "self._wire.receive(1)",
        "np.load(p, allow_pickle=False)",
        "re.compile('x')",
        "mx.eval(x)",
        "functools.reduce(f, x)",
        "import pickletools",
    ],
)
def test_what_pickles_nothing_is_left_alone(source):
    assert offences(source) == []


@pytest.mark.parametrize("source", ["np.load(p, allow_pickle=True)", "MPI.pickle.dumps(x)"])
def test_ways_around_are_caught(source):
    assert len(offences(source)) == 1

"""Setting up: the pins, envs/meltingpot/install.py and the Makefile. Only the slow tests need the
network; servers here are real ones on the loopback interface."""

import ast
import contextlib
import http.server
import importlib.metadata
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from envs.meltingpot import install as installer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "envs/meltingpot/install.py"
MODEL = "assets/saved_models/chicken_in_the_matrix__repeated/puppet_1/saved_model.pb"
DATA = bytes(range(256)) * 4000  # about 1 MB


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MELTINGPOT_ASSETS", raising=False)


def make_archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), int(time.time())
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path):
    """An archive such as the asset host's, with one model in it."""
    (tmp_path / "host").mkdir()
    return make_archive(tmp_path / "host" / installer.ARCHIVE, {"assets/README": b"", MODEL: DATA})


@pytest.fixture
def host(tmp_path):
    """A web server for tmp_path/host: (address, requests it has answered)."""
    seen = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            seen.append(self.path)

    (tmp_path / "host").mkdir(exist_ok=True)
    handler = partial(Handler, directory=tmp_path / "host")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", seen
        server.shutdown()


@pytest.fixture
def speak():
    """speak(text, slow): the address of a server that answers every request with exactly `text`,
    then with ten bytes of `slow` a second, and then with silence on an open connection."""
    listening, connections = [], []

    def start(text, slow=b""):
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection):
            with contextlib.suppress(OSError):
                connection.sendall(text)
                for byte in slow:
                    time.sleep(0.1)
                    connection.sendall(bytes([byte]))

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/{installer.ARCHIVE}"

    yield start
    for item in listening + connections:
        item.close()


@pytest.fixture
def nobody():
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}/{installer.ARCHIVE}"


def one_line(text):
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text


# Pins -------------------------------------------------------------------------------------------


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    found = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line[:1] not in "#"
    ]
    assert all(found), f"{name} has a line that is not NAME==VERSION"
    versions = {canonicalize_name(match[1]): match[2] for match in found}
    assert len(versions) == len(found), f"{name} names a package twice"
    return versions


RUN, EXPERIMENTS = "requirements.txt", "requirements-experiments.txt"
LOCKED = [RUN, EXPERIMENTS, "requirements-wandb.txt", "requirements-dev.txt"]


def all_pins():
    """What is installed on purpose, each package in one file."""
    found = [pins(name) for name in LOCKED]
    both = {name: version for part in found for name, version in part.items()}
    assert len(both) == sum(map(len, found))
    return both


def test_requirements_are_in_the_lock():
    lock = pins("requirements-lock.txt")
    wanted = all_pins()
    assert {name: lock.get(name) for name in wanted} == wanted
    for extra in ("bots", "ray"):
        assert not set(pins(f"requirements-{extra}.txt")) & set(lock)


def imports(file, everywhere):
    """Modules that a file imports as it is imported itself, or anywhere."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


DISTRIBUTIONS = importlib.metadata.packages_distributions()
OURS = {
    "harness",
    "baselines",
    "envs",
    "experiments",
    "tests",
    *(x.stem for x in ROOT.glob("*.py")),
}


def packages(patterns, everywhere=False):
    """Names of packages, as requirements have them, and of modules that are not installed."""
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    assert files
    modules = {name.split(".")[0] for file in files for name in imports(file, everywhere)}
    modules -= {*sys.stdlib_module_names, *OURS}
    return {canonicalize_name(DISTRIBUTIONS.get(name, [name])[0]) for name in modules}


SCRIPTS = ["*.py", "baselines/*.py", "envs/**/*.py"]


def test_scripts_start_with_what_training_needs():
    """Also without tables, figures, wandb and tests; dm-meltingpot comes with its installer."""
    training = {*pins(RUN), "dm-meltingpot"}
    assert packages(SCRIPTS) <= training
    assert packages(["experiments/launch.py", "experiments/runs.py"]) <= training
    assert packages(["experiments/*.py"]) <= training | {*pins(EXPERIMENTS)}


def test_the_launcher_needs_no_figures(tmp_path):
    """A node with requirements.txt alone, on which what else make setup installs is missing."""
    missing = [*pins(EXPERIMENTS), "sklearn", "wandb", "pytest"]
    lines = [f"sys.modules[{name!r}] = None" for name in missing]
    begin = "\n".join(["import runpy, sys", *lines])
    study = ROOT / "experiments/studies/mra_gate.toml"
    words = [str(ROOT / "experiments/launch.py"), str(study), "--dry-run"]
    code = f"{begin}\nsys.argv = {words}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "mra_maddpg_particle.py" in found.stdout


def test_whatever_is_imported_is_named():
    extras = [pins(f"requirements-{name}.txt") for name in ("sc2", "bots", "ray", "bench")]
    known = {*all_pins(), "dm-meltingpot", *(name for extra in extras for name in extra)}
    # mpe2's and dmlab2d's own dependencies are theirs; smaclite has no release to pin.
    assert packages([*SCRIPTS, "experiments/*.py"], everywhere=True) <= known | {"smaclite"}


@pytest.mark.parametrize("name", [*LOCKED, "requirements-lock.txt"])
def test_lock_pins_versions_not_builds(name):
    versions = pins(name)
    assert not [v for v in versions.values() if "+" in v or "/" in v or "@" in v]
    assert not [n for n in versions if re.match(r"nvidia|cuda|triton|dm-meltingpot|pip$", n)]
    assert not re.search(r"://|file:|(^|\s)/\w+/\w+|\.org|\.com", (ROOT / name).read_text())


def wants(name):
    """What an installed package requires here, without its extras."""
    for line in importlib.metadata.requires(name) or []:
        wanted = Requirement(line)
        if not wanted.marker or wanted.marker.evaluate({"extra": ""}):
            yield wanted


def test_lock_is_complete():
    """Following what every installed package asks for never leaves the lock."""
    lock = pins("requirements-lock.txt")
    todo, done = list(all_pins()), set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        assert name in lock, f"{name} is needed, but not in requirements-lock.txt"
        for wanted in wants(name):
            if name == "torch" and re.match(r"nvidia|cuda|triton", wanted.name):
                continue  # a build's own, pinned by torch
            assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)], prereleases=True)
            todo.append(canonicalize_name(wanted.name))
    assert done == set(lock), f"in the lock, but needed by nothing: {set(lock) - done}"


def test_ray_needs_nothing_else():
    """`make setup-ray` follows no dependencies: all are among its pins or in the lock."""
    pytest.importorskip("ray")
    own = pins("requirements-ray.txt")
    have = pins("requirements-lock.txt") | own
    for name, version in own.items():
        assert importlib.metadata.version(name) == version
        for wanted in wants(name):
            assert wanted.specifier.contains(have[canonicalize_name(wanted.name)])


def test_ci_has_what_optional_tests_need(project):
    """A package that CI lacks is a test that never runs: in .ci/run and in the hosted workflow."""
    run = (ROOT / ".ci/run").read_text()
    hosted = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    jobs = [[step.get("run", "") for step in x["steps"]] for x in hosted["jobs"].values()]
    (long,) = ("\n".join(job) for job in jobs if "make test-long" in job)
    for extra in ("sc2", "ray"):
        assert f"setup-{extra}" in run and f"setup-{extra}" in long
        (project / f"requirements-{extra}.txt").write_text("# nothing\n")
        done = make(project, "-n", f"setup-{extra}")
        assert f"--no-deps -r requirements-{extra}.txt" in done.stdout, done.stderr


def test_docker_copies_nothing_that_clean_removes():
    """An image gets no other environment, website or cache."""
    recipe = (ROOT / "Makefile").read_text().partition("\nclean:")[2]
    removed = recipe.partition("rm -rf ")[2].partition("\n")[0].split()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".venv-docs" in removed and {*removed} <= {*ignored}


# What to install --------------------------------------------------------------------------------


@pytest.mark.parametrize("assets", ["auto", "none", "some.tar.gz", "http://127.0.0.1/some.tar.gz"])
def test_what_is_enough(assets):
    stub, bots = (installer.Installed(ROOT, bots=b) for b in (False, True))
    assert not installer.is_enough(assets, None)
    assert installer.is_enough(assets, bots)
    assert installer.is_enough(assets, stub) == (assets in ("auto", "none"))


def test_stub_is_an_archive_without_bots(tmp_path):
    path = tmp_path / "stub.tar.gz"
    installer.write_stub(path)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["assets/README"]
    assert installer.inspect(path).bots is False


def test_whole_archive_is_accepted(archive):
    assert installer.inspect(archive) == (archive.stat().st_size, len(DATA), True)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.9, 0.99, 0.9999])
def test_cut_off_archive_is_refused(archive, share):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(share * len(data))])
    with pytest.raises(installer.Unusable):
        installer.inspect(archive)


def test_damaged_archive_is_refused(archive):
    data = archive.read_bytes()
    for where in (0, *range(60, len(data), 29)):  # between lies gzip's header, with a name and time
        archive.write_bytes(data[:where] + bytes([data[where] ^ 0x55]) + data[where + 1 :])
        with pytest.raises(installer.Unusable):
            installer.inspect(archive)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>Sign in</html>", b"\0" * 5000])
def test_what_is_no_archive_is_refused(tmp_path, page):
    (tmp_path / "page").write_bytes(page)
    with pytest.raises(installer.Unusable, match=r"not a tar\.gz"):
        installer.inspect(tmp_path / "page")


@pytest.mark.parametrize("name", ["other/README", "README", "my/assets/README"])
def test_archive_of_something_else_is_refused(tmp_path, name):
    path = make_archive(tmp_path / "other.tar.gz", {name: b"x"})
    with pytest.raises(installer.Unusable, match="no folder assets/"):
        installer.inspect(path)


def test_archive_that_reaches_outside_is_refused(tmp_path):
    for name in "assets/../../x", "/elsewhere/x":
        path = make_archive(tmp_path / "other.tar.gz", {"assets/README": b"", name: b"x"})
        with pytest.raises(installer.Unusable, match="outside"):
            installer.inspect(path)


# Fetching ---------------------------------------------------------------------------------------


def test_local_file_is_taken(tmp_path, archive):
    contents = installer.provide(str(archive), tmp_path / "target")
    assert contents.bots and (tmp_path / "target").read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("address", ["folder", "file"])
def test_archive_is_fetched_from_a_server(tmp_path, archive, host, address, capsys):
    url, seen = host
    contents = installer.provide(
        url if address == "folder" else url + installer.ARCHIVE, tmp_path / "target"
    )
    assert contents.bots and (tmp_path / "target").read_bytes() == archive.read_bytes()
    assert seen == ["/" + installer.ARCHIVE]
    assert re.search(r"Downloading .*\d+ MB", capsys.readouterr().out)


def test_auto_takes_the_real_archive_where_it_can(tmp_path, archive, host, capsys):
    contents = installer.provide("auto", tmp_path / "target", host=host[0] + installer.ARCHIVE)
    assert contents.bots and (tmp_path / "target").read_bytes() == archive.read_bytes()
    assert "unavailable" not in capsys.readouterr().out


def expect_stub(capsys, target, url, timeout=installer.TIMEOUT):
    """auto makes do with the stub and says so in one sentence; an explicit address is refused."""
    contents = installer.provide("auto", target, host=url, timeout=timeout)
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["assets/README"]
    assert not contents.bots
    out = capsys.readouterr().out
    said = one_line(re.sub(r"^Downloading .*\n", "", out))
    assert "unavailable" in said and "everything else works" in said and "--reinstall" in said
    with pytest.raises(installer.Unusable):
        installer.provide(url, target.with_name("other"), timeout=timeout)


def test_unreachable_host(tmp_path, nobody, capsys):
    expect_stub(capsys, tmp_path / "target", nobody)


def test_unknown_host(tmp_path, capsys):
    expect_stub(capsys, tmp_path / "target", "http://no-such-host.invalid/x.tar.gz")


def test_host_without_the_archive(tmp_path, host, capsys):
    expect_stub(capsys, tmp_path / "target", host[0] + installer.ARCHIVE)
    assert "/" + installer.ARCHIVE in host[1]


def test_page_instead_of_the_archive(tmp_path, host, capsys):
    (tmp_path / "host" / installer.ARCHIVE).write_text("<html>Please sign in.</html>")
    expect_stub(capsys, tmp_path / "target", host[0] + installer.ARCHIVE)


@pytest.mark.parametrize("text", [b"not HTTP at all\r\n", b"HTTP/1.1 200 OK\r\n", b""])
def test_silent_or_confused_host_is_given_up_soon(tmp_path, speak, capsys, text):
    start = time.monotonic()
    expect_stub(capsys, tmp_path / "target", speak(text), timeout=0.4)
    assert time.monotonic() - start < 4


def test_download_that_stalls_is_given_up_soon(tmp_path, speak, capsys):
    start = time.monotonic()
    text = b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n" + DATA[:4000]
    expect_stub(capsys, tmp_path / "target", speak(text), timeout=0.4)
    assert time.monotonic() - start < 4


def test_host_that_never_comes_to_the_point_is_given_up_soon(tmp_path, speak, capsys):
    start = time.monotonic()
    url = speak(b"HTTP/1.1 200 OK\r\n", slow=b"X: " + b"x" * 100)
    expect_stub(capsys, tmp_path / "target", url, timeout=0.4)
    assert time.monotonic() - start < 4


def test_download_that_would_take_for_ever_is_given_up(tmp_path, speak, capsys, monkeypatch):
    start = time.monotonic()
    monkeypatch.setattr(installer, "PATIENCE", 0.5)
    url = speak(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n", slow=b"x" * 100)
    expect_stub(capsys, tmp_path / "target", url)
    assert time.monotonic() - start < 8


def test_download_that_ends_early(tmp_path, archive, capsys):
    whole = archive.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole) + 1))
            self.end_headers()
            self.wfile.write(whole)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        expect_stub(capsys, tmp_path / "target", f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


# The installer as a program ---------------------------------------------------------------------


def install(*args, python=sys.executable, script=SCRIPT, **env):
    return subprocess.run(
        [python, script, *map(str, args)],
        env={**os.environ, **{key: str(value) for key, value in env.items()}},
        capture_output=True,
        text=True,
        timeout=200,
    )


# pip finds no package at all with these, so that these tests cannot change what is installed.
NO_INDEX = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


@pytest.mark.parametrize("kind", ["missing", "page", "nobody"])
def test_unusable_archive_is_one_sentence(tmp_path, nobody, kind):
    (tmp_path / "page").write_text("<html></html>")
    assets = {"missing": tmp_path / "nothing", "page": tmp_path / "page", "nobody": nobody}[kind]
    before = installer.installed()
    # Once from the command line and once from the environment variable.
    for args, env in (["--assets", assets], {}), ([], {"MELTINGPOT_ASSETS": assets}):
        done = install("--reinstall", *args, **env, **NO_INDEX)
        assert (done.returncode, done.stdout) == (1, "")
        assert "nothing was changed" in one_line(done.stderr)
    assert installer.installed() == before


def test_failing_pip_shows_its_last_lines(tmp_path):
    before = installer.installed()
    done = install("--assets", "none", "--reinstall", TMPDIR=tmp_path, **NO_INDEX)
    assert done.returncode == 1
    assert "No matching distribution found for dm-meltingpot" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("pip could not install")
    assert len(done.stderr.splitlines()) < 20 and not list(tmp_path.iterdir())
    assert installer.installed() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_downloading():
    with (
        http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=ROOT)
        ) as server,
        pytest.raises(OSError) as caught,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            installer.fetch(f"http://127.0.0.1:{server.server_port}/LICENSE", Path("/dev/full"))
        finally:
            server.shutdown()
    assert installer.is_full(caught.value)


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux and unshare")
@pytest.mark.parametrize("assets", ["none", "bots"])
def test_full_disk_is_one_sentence(tmp_path, host, assets):
    """On a real file system of 1 MB: the stub's build has no room, the real archive neither."""
    (tmp_path / "small").mkdir()
    make_archive(tmp_path / "host" / installer.ARCHIVE, {MODEL: os.urandom(3_000_000)})
    shell = 'mount -t tmpfs -o size=1m none "$0" || exit 77; TMPDIR="$0" exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, tmp_path / "small", sys.executable, SCRIPT]
        + ["--reinstall", "--assets", host[0] if assets == "bots" else assets],
        env={**os.environ, **NO_INDEX},
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("The disk is full")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["download", "pip"])
def test_interruption_leaves_nothing_behind(tmp_path, speak, sign, during):
    silent = speak(b"")
    assets = silent if during == "download" else "none"
    index = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": silent, "PIP_FIND_LINKS": ""}
    # As in a terminal; for SIGTERM as in a script's background, where Ctrl-C is ignored.
    ctrl_c = signal.SIG_DFL if sign == signal.SIGINT else signal.SIG_IGN
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--reinstall", "--assets", assets],
        env={**os.environ, **index, "TMPDIR": str(tmp_path), "PIP_DEFAULT_TIMEOUT": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c),
    ) as process:
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("*" if during == "download" else "*/pip.log")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(sign)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "run it again" in err
    assert time.monotonic() - start < 10
    assert not list(tmp_path.iterdir())
    assert not running(tmp_path)


def running(folder):
    """Processes whose environment names the folder: pip, if it has outlived the installer."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] * (str(folder).encode() in path.read_bytes())
        except OSError:
            continue
    return found


# The Makefile -----------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """The Makefile with an empty lock and an installer that only counts its runs."""
    (tmp_path / "envs/meltingpot").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements-lock.txt").write_text("# nothing\n")
    write_installer(tmp_path)
    return tmp_path


def write_installer(project, extra=""):
    text = f"import os, signal\nopen('runs.txt', 'a').write('x')\n{extra}\n"
    (project / "envs/meltingpot/install.py").write_text(text)


def make(folder, *args, path=None, uv=""):
    """uv: of the Makefile; "" leaves all to pip."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    else:
        args = (f"PYTHON={sys.executable}", *args)
    args = (f"UV={uv}", *args)
    return subprocess.run(
        ["make", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )


def fake_python(folder, first):
    """A python3 that runs `first` before what it is asked to run."""
    (folder / "bin").mkdir()
    script = folder / "bin/python3"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{first}; exec(sys.argv[2])' \"$@\"\n")
    script.chmod(0o755)
    return script.parent


@pytest.mark.parametrize("target", ["setup", "train", "test", "test-slow", "lint", "docs"])
def test_old_python_gets_one_sentence(project, target):
    old = "import sys, platform; sys.version_info = (3, 10, 14)"
    old += '; platform.python_version = lambda: "3.10.14"'
    done = make(project, target, path=fake_python(project, old))
    assert done.returncode != 0 and done.stdout == ""
    assert "needs Python 3.11 or newer, and python3 is 3.10.14" in one_line(done.stderr)
    assert not (project / ".venv").exists()


def test_missing_python_gets_one_sentence(project):
    done = make(project, "setup", "PYTHON=no-such-python")
    assert done.returncode != 0 and done.stdout == ""
    assert "no-such-python is missing" in one_line(done.stderr)


def test_python_without_venv_gets_one_sentence(project):
    without = 'import sys; sys.modules["ensurepip"] = None'
    done = make(project, "train", path=fake_python(project, without))
    assert done.returncode != 0 and done.stdout == ""
    assert "python3-venv" in one_line(done.stderr)
    assert not (project / ".venv").exists()


def test_help_is_the_default_and_lists_every_target(project):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    done = make(project)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == targets


@pytest.mark.long
def test_setup_once_then_quick_then_repaired(project):
    done = make(project, "setup")
    ready, canary = project / ".venv/ready", project / ".venv/canary"
    assert done.returncode == 0 and ready.exists() and "to download" in done.stdout, done.stderr
    assert (project / ".venv/bin/pip").exists()
    assert (project / "runs.txt").read_text() == "x"

    # Again: `setup` only asks the installer, other targets not even that.
    made = ready.stat().st_mtime_ns
    assert make(project, "setup").stdout == ""
    assert (project / "runs.txt").read_text() == "xx"
    (project / "bidist_mappo_meltingpot.py").write_text("import sys; print(sys.argv[1:])")
    start = time.monotonic()
    done = make(project, "train", "ARGS=--seed 7")
    assert time.monotonic() - start < 2 and done.stdout.endswith("'--seed', '7']\n")
    assert (project / "runs.txt").read_text() == "xx" and ready.stat().st_mtime_ns == made

    # A new lock: what is there is kept.
    canary.touch()
    os.utime(project / "requirements-lock.txt", (time.time() + 1, time.time() + 1))
    assert make(project, "setup").returncode == 0
    assert canary.exists() and ready.stat().st_mtime_ns > made
    os.utime(project / "requirements-lock.txt", (1, 1))

    # Killed on the way: not ready, and the next run begins with an empty environment.
    ready.unlink()
    write_installer(project, "os.kill(os.getpid(), signal.SIGKILL)")
    assert make(project, "setup").returncode != 0
    assert canary.exists() and not ready.exists()
    write_installer(project)
    assert make(project, "setup").returncode == 0
    assert not canary.exists() and ready.exists()


@pytest.mark.long
def test_without_uv_pip_does_it(project):
    """uv that cannot be had, or that fails, is no error."""
    (project / "requirements-lock.txt").write_text("iniconfig==2.3.1\n")
    done = make(project, "setup", uv="no-such-package-as-this==1.0")
    assert done.returncode == 0 and (project / ".venv/ready").exists(), done.stderr
    assert "Successfully installed iniconfig" in done.stdout


@pytest.mark.slow
def test_uv_installs_what_the_lock_says(project):
    (project / "requirements-lock.txt").write_text("iniconfig==2.3.1\n")
    pin = re.search(r"^UV \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    done = make(project, "setup", uv=pin)
    assert done.returncode == 0 and "+ iniconfig==2.3.1" in done.stderr, done.stderr
    show = [project / ".venv/bin/python", "-m", "pip", "show", "iniconfig"]
    assert "Version: 2.3.1" in subprocess.run(show, capture_output=True, text=True).stdout


# The real thing ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("setuptools", ["isolated", "locked"])
def test_real_install_stub_then_bots(tmp_path, archive, host, setuptools):
    """dm-meltingpot built in a new environment: the stub, then the bots from a web server."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    if setuptools == "locked":
        pin = f"setuptools=={pins('requirements-lock.txt')['setuptools']}"
        subprocess.run([python, "-m", "pip", "install", "-q", pin], check=True)
    run = partial(install, python=python, TMPDIR=tmp_path / "tmp")
    (tmp_path / "tmp").mkdir()

    done = run("--assets", "none")
    assert done.returncode == 0, done.stderr
    root = next(tmp_path.glob("venv/lib/*/site-packages/meltingpot"))
    assert done.stdout.splitlines()[-1] == (
        f"dm-meltingpot 2.4.1 is in {root}, without the official bots' saved_models."
    )
    assert [p.name for p in (root / "assets").iterdir()] == ["README"]
    assert (root / "substrate.py").exists()
    packages = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert "dm-meltingpot" in packages and "tensorflow" not in packages

    for assets in "none", "auto":
        start = time.monotonic()
        assert "Nothing to do" in one_line(run("--assets", assets).stdout)
        assert time.monotonic() - start < 3

    # What cannot be used changes nothing.
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-100])
    for assets in archive, host[0]:
        done = run("--assets", assets)
        assert done.returncode == 1 and "nothing was changed" in one_line(done.stderr)
    assert (root / "assets/README").exists()

    archive.write_bytes(whole)
    done = run("--assets", host[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(", with the official bots' saved_models.")
    assert (root.parent / "meltingpot" / MODEL).read_bytes() == DATA
    asked = len(host[1])
    for assets in "none", "auto", host[0], archive:
        assert "Nothing to do" in one_line(run("--assets", assets).stdout)
    assert len(host[1]) == asked

    # Half an installation, as a killed pip leaves it, is made whole.
    (root / "substrate.py").unlink()
    done = run("--assets", archive)
    assert done.returncode == 0 and (root / "substrate.py").exists()
    assert not list((tmp_path / "tmp").iterdir())

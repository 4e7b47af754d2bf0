"""Install Melting Pot into the Python that runs this file, with or without its official bots.

    python envs/meltingpot/install.py                    with the bots' files if their host answers
    python envs/meltingpot/install.py --assets none      without the files and without a download
    python envs/meltingpot/install.py --assets FILE|URL  with the files from another archive

dm-meltingpot is a source package. Its build downloads the archive of the official bots, without a
time-out, unless a file with the archive's name lies in the temporary folder. This program therefore
puts a file there first: the real archive, or a stub with only a README. With the stub substrates,
scenario settings and everything else in Unseen work, except for the official bots.
"""

import argparse
import contextlib
import csv
import errno
import gzip
import http.client
import io
import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import zlib
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PACKAGE, VERSION = "dm-meltingpot", "2.4.1"
ARCHIVE = "meltingpot-assets-2.3.0.tar.gz"  # the name that the package's setup.py looks for
HOST = f"https://storage.googleapis.com/dm-meltingpot/{ARCHIVE}"
TIMEOUT = 15.0  # seconds to connect, and between two parts of a download
MIN_SPEED, PATIENCE = 20e3, 60.0  # a download below so many bytes/s after so many seconds fails
MB = 1e6
LATER = (
    "to add them later, run `python envs/meltingpot/install.py --reinstall` where that host can "
    f"be reached, or pass --assets FILE with a copy of {HOST}"
)


class Unusable(Exception):
    """The archive is not available or not valid; the message says why."""


class Failed(Exception):
    """The installation has failed; the message is the sentence to print."""


class Contents(NamedTuple):
    packed: int  # bytes
    unpacked: int  # bytes
    bots: bool  # True: the archive has assets/saved_models


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        have = installed()
        if not args.reinstall and is_enough(args.assets, have):
            print(f"{describe(have)} Nothing to do.")
            return 0
        with tempfile.TemporaryDirectory(prefix="meltingpot-") as folder:
            contents = provide(args.assets, Path(folder) / ARCHIVE)
            if not args.reinstall and have and contents.bots == have.bots:
                print(f"{describe(have)} That archive has no more than this. Nothing to do.")
                return 0
            check_space(contents, folder)
            pip_install(folder)
        have = installed()
        if have is None or have.bots != contents.bots:
            raise Failed(f"pip installed {PACKAGE}, but it is not whole: run this again.")
        print(describe(have))
        return 0
    except KeyboardInterrupt:
        print("\nInterrupted: run it again to finish.", file=sys.stderr)
        return 130
    except Unusable as error:
        print(f"{error}; nothing was changed.", file=sys.stderr)
    except Failed as error:
        print(error, file=sys.stderr)
    except OSError as error:
        if not is_full(error):
            raise
        print(no_space(tempfile.gettempdir()), file=sys.stderr)
    return 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Install Melting Pot.")
    parser.add_argument(
        "--assets",
        metavar="auto|none|FILE|URL",
        default=os.environ.get("MELTINGPOT_ASSETS") or "auto",
        help="the official bots' files: auto takes them from their host if it answers, none does "
        f"without, or give {ARCHIVE} as a file or address (default: $MELTINGPOT_ASSETS or auto)",
    )
    parser.add_argument(
        "--reinstall", action="store_true", help="install even if it is there already"
    )
    return parser.parse_args(argv)


# What is there already ------------------------------------------------------------------------


class Installed(NamedTuple):
    root: Path  # .../site-packages/meltingpot
    bots: bool  # True: with assets/saved_models


def installed() -> Installed | None:
    """The installed VERSION; None if it is missing, incomplete or another version."""
    for dist in metadata.distributions(name=PACKAGE):
        record = csv.reader((dist.read_text("RECORD") or "").splitlines())
        files = [row[0] for row in record if row and not row[0].endswith(".pyc")]
        # Not dist.files: newer Pythons omit missing files from it.
        whole = bool(files) and all(Path(dist.locate_file(f)).exists() for f in files)
        if dist.version == VERSION and whole:
            root = Path(dist.locate_file("meltingpot")).resolve()
            return Installed(root, bots=(root / "assets/saved_models").is_dir())
        return None  # `import` finds the first one
    return None


def is_enough(assets: str, have: Installed | None) -> bool:
    """True if `have` satisfies --assets: any install for auto and none, else one with bots."""
    return have is not None and (have.bots or assets in ("auto", "none"))


def describe(have: Installed) -> str:
    bots = "with" if have.bots else "without"
    return f"{PACKAGE} {VERSION} is in {have.root}, {bots} the official bots' saved_models."


# The archive ----------------------------------------------------------------------------------


def provide(assets: str, target: Path, host: str = HOST, timeout: float = TIMEOUT) -> Contents:
    """Put the archive that `assets` names, or a stub, at `target`; its Contents, or Unusable."""
    if assets == "auto":
        try:
            fetch(host, target, timeout)
            return inspect(target)
        except Unusable as error:
            why = f"{error}"
    elif assets == "none":
        why = "They were not asked for"
    elif assets.startswith(("http://", "https://")):
        fetch(assets + ARCHIVE if assets.endswith("/") else assets, target, timeout)
        return inspect(target, name=assets)
    else:
        source = Path(assets).expanduser().resolve()
        if not source.is_file():
            raise Unusable(f"--assets {assets}: there is no such file")
        target.symlink_to(source)
        return inspect(target, name=assets)
    print(f"Official bots will be unavailable ({why}), everything else works; {LATER}.")
    write_stub(target)
    return inspect(target)


def write_stub(target: Path) -> None:
    text = f"No official bots here; {LATER}.\n".encode()
    target.unlink(missing_ok=True)
    with tarfile.open(target, "w:gz") as tar:
        member = tarfile.TarInfo("assets/README")
        member.size, member.mtime = len(text), int(time.time())
        tar.addfile(member, io.BytesIO(text))


def inspect(path: Path, name: str | None = None) -> Contents:
    """Read the whole archive; raises Unusable, so that the build gets no damaged file."""
    name = name or path.name
    top, bots, unpacked = False, False, 0
    try:
        with gzip.open(path) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if ".." in parts or member.name.startswith("/"):
                    raise Unusable(f"{name} has a member outside its folder: {member.name}")
                top |= parts[:1] == ("assets",)
                bots |= parts[:2] == ("assets", "saved_models")
                unpacked += member.size
            while raw.read(1 << 20):  # read the rest: gzip checks its checksum at the end
                pass
    except gzip.BadGzipFile as error:
        raise Unusable(f"{name} is not a tar.gz archive, or a damaged one") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise Unusable(f"{name} is cut off or damaged") from error
    except OSError as error:
        raise Unusable(f"{name} cannot be read: {error.strerror}") from error
    if not top:
        raise Unusable(f"{name} has no folder assets/ in it")
    return Contents(path.stat().st_size, unpacked, bots)


def fetch(url: str, target: Path, timeout: float = TIMEOUT) -> None:
    """Download url to target with progress lines; raises Unusable on errors and long waits."""
    try:
        with connect(url, timeout) as reply, open(target, "wb") as out:
            size = int(reply.headers.get("Content-Length") or 0)
            total = f"{size / MB:.0f} MB" if size else "unknown size"
            print(f"Downloading the official bots ({total}) from {url}", flush=True)
            start = last = time.monotonic()
            got = 0
            while piece := reply.read1(1 << 16):
                out.write(piece)
                got += len(piece)
                now = time.monotonic()
                if now - start > PATIENCE and got / (now - start) < MIN_SPEED:
                    raise TimeoutError("too slow")
                if now - last > (0.5 if sys.stdout.isatty() else 15):
                    last = now
                    end = "\r" if sys.stdout.isatty() else "\n"
                    print(f"  {got / MB:.0f} MB of {total}", end=end, flush=True)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if is_full(error):
            raise
        why = " ".join(str(getattr(error, "reason", error)).split())
        raise Unusable(f"{url} cannot be fetched: {why}") from error
    if size and got != size:
        raise Unusable(f"{url} stopped after {got} of {size} bytes")


def connect(url: str, timeout: float) -> http.client.HTTPResponse:
    """Open url within `timeout` seconds, else TimeoutError. urlopen's own limit holds for each
    address of the host (minutes behind a silent firewall), and not for the look-up of the name."""
    answer: queue.Queue = queue.Queue()

    def ask() -> None:
        try:
            answer.put(urllib.request.urlopen(url, timeout=timeout))
        except BaseException as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        reply = answer.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout:g} s") from None
    if isinstance(reply, BaseException):
        raise reply
    return reply


# pip ------------------------------------------------------------------------------------------


def pip_install(folder: str) -> None:
    """Build and install with pip, which keeps an older install if this fails; raises Failed."""
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--force-reinstall"]
    # Otherwise pip would cache a wheel with the stub, and accept a wheel that others have built.
    command += ["--no-cache-dir", f"--no-binary={PACKAGE}"]
    if can_build_here():
        command += ["--no-build-isolation"]
    print(f"Building and installing {PACKAGE} {VERSION}", flush=True)
    log = Path(folder) / "pip.log"
    with open(log, "wb") as out:
        pip = subprocess.Popen(
            [*command, f"{PACKAGE}=={VERSION}"],
            env={**os.environ, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach pip only once, from stop()
            # pip must not ignore SIGINT, which stop() sends, as background jobs of a shell do
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            code = pip.wait()
        except BaseException:
            stop(pip)
            raise
    if code == 0:
        return
    lines = log.read_text(errors="replace").rstrip().splitlines()
    if any("No space left on device" in line for line in lines):
        raise Failed(no_space(folder))
    print(*lines[-15:], sep="\n", file=sys.stderr)
    raise Failed(f"pip could not install {PACKAGE} (its last lines are above).")


def can_build_here() -> bool:
    """True if the installed setuptools can build it: no download, and a pinned builder."""
    try:
        major, minor = metadata.version("setuptools").split(".")[:2]
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) >= (70, 1)  # from 70.1 on the package `wheel` is not needed


def stop(pip: subprocess.Popen) -> None:
    for sign, seconds in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pip.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            pip.wait(seconds)
            return


# Disk space -----------------------------------------------------------------------------------


def check_space(contents: Contents, folder: str) -> None:
    """Raise Failed if space is short: the build unpacks, copies twice and zips; pip copies."""
    needed = 2 * contents.packed + 4 * contents.unpacked + 50 * MB
    if shutil.disk_usage(folder).free < needed:
        raise Failed(no_space(folder, needed))


def no_space(folder: str, needed: float = 0) -> str:
    size = f" {needed / MB:.0f} MB" if needed else ""
    return (
        f"The disk is full: {folder} or the installation needs{size} more room (TMPDIR=FOLDER "
        "names another folder for the build, and --assets none needs least)."
    )


def is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)  # a plain `kill` cleans up as Ctrl-C does
    sys.exit(main())

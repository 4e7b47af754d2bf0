"""--track: what wandb keeps of a run, read back from its files, and what it does to a run when its
server is away. Servers here are real ones on the loopback interface."""

import contextlib
import gzip
import http.server
import json
import socket
import struct
import threading
import time
from pathlib import Path

import harness

import pytest
from runs import metrics, sentences, start
from wandb.proto import wandb_internal_pb2

from tests.harness.tools import NAME, PULLS, flags, learner, resume

LIMIT = 1  # --wandb-timeout, in seconds
KEY = 40 * "a"


def records(path):
    """The records of a .wandb file, in LevelDB's log format: blocks of 32 KiB, in which records
    may be split into a first (2), middle (3) and last (4) part, or are whole (1)."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # too short for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def pairs(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read(path):
    """A run's id, configuration and rows of history, and the metric that is its x-axis."""
    found = {"history": [], "config": {}, "axes": []}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["id"], found["project"] = record.run.run_id, record.run.project
            found["config"] |= pairs(record.run.config.update)
        elif kind == "config":
            found["config"] |= pairs(record.config.update)
        elif kind == "history":
            found["history"].append(pairs(record.history.item))
        elif kind == "metric" and record.metric.step_metric:
            name = record.metric.name or record.metric.glob_name
            found["axes"].append((name, record.metric.step_metric))
    return found


def wandb_files(run_dir):
    return sorted((Path(run_dir) / "wandb").glob("*run-*/run-*.wandb"))


def check_scalars(run_dir, rows):
    """Each line of metrics.jsonl is a row, with all its names and figures."""
    for line in metrics(run_dir):
        (row,) = [
            r for r in rows if r["timesteps"] == line["timesteps"] and line.keys() <= r.keys()
        ]
        assert {name: row[name] for name in line} == line
    assert len(rows) == len(metrics(run_dir)) > 1


def nobody(folder):
    """The environment of a process that knows no user: no settings, no key, no proxy."""
    home = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_API_KEY": ""}
    return home | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def env(tmp_path):
    return nobody(tmp_path)


def play(argv, cwd, env):
    """A run without a terminal: its exit code, what it said, and how many seconds it took."""
    with start(NAME, argv, cwd, env=env) as run:
        began = time.monotonic()
        code = run.wait()
    return code, run.stderr(), time.monotonic() - began


def tracked(run_dir, iterations, *more):
    track = ("--track", "--wandb-timeout", LIMIT, "--final-episodes", 2, *more)
    return flags(run_dir, iterations, *track)


# Offline ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_offline_run_read_back(tmp_path, env):
    run_dir = tmp_path / "run"
    more = ("--wandb-mode", "offline", "--wandb-project", "here", "--capture-video")
    with contextlib.closing(Server(working)) as server:
        env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        code, err, _ = play(tracked(run_dir, 3, *more), tmp_path, env)
        assert server.asked == []  # offline is offline
    assert code == 0 and sentences(err) == []
    (path,) = wandb_files(run_dir)
    found = read(path)
    assert found["project"] == "here" and found["axes"] == [("*", "timesteps")]

    stored = json.loads((run_dir / "args.json").read_text())
    config = {k: x for k, x in found["config"].items() if k != "_wandb"}
    assert config["track"] is True and len(config) > 20
    assert {k: stored[k] for k in config} == config

    check_scalars(run_dir, found["history"])
    results = json.loads((run_dir / "summary.json").read_text())["eval"]
    *_, last = found["history"]
    assert last["timesteps"] == 3 * PULLS

    # The table and the videos are files beside, which a row points to.
    entry = {k.removeprefix("final/table/"): x for k, x in last.items() if "final/table/" in k}
    entry = last.get("final/table") or entry
    assert entry["_type"] == "html-file"
    assert learner.table(results) in (path.parent / "files" / entry["path"]).read_text()
    assert len(results) == 2
    videos = sorted(path.stem for path in (run_dir / "videos").iterdir())
    assert len(videos) == len(results)
    for video in videos:
        named = {k: x for k, x in last.items() if k.startswith(f"video/{video}")}
        (stored_at,) = [
            x["path"] if isinstance(x, dict) else x
            for k, x in named.items()
            if k.endswith(("/path", video))
        ]
        copy = path.parent / "files" / stored_at
        original = run_dir / "videos" / f"{video}.mp4"
        assert copy.read_bytes() == original.read_bytes() and original.stat().st_size > 500


def test_runs_of_one_name_have_their_own_ids(tmp_path):
    """As two studies have them; a run keeps its id."""
    folders = [tmp_path / study / "mappo-s11" for study in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    ids = [harness.wandb_id(folder) for folder in folders]
    assert ids[0] != ids[1] and all(x.startswith("mappo-s11-") for x in ids)
    assert [harness.wandb_id(folder) for folder in folders] == ids


def test_resumed_offline_run_is_one_run(tmp_path, env):
    """Both parts carry the same id, so that `wandb sync` joins them, and no row is lost."""
    run_dir = tmp_path / "run"
    argv = tracked(run_dir, 2, "--wandb-mode", "offline", "--final-episodes", 0)
    for line in (argv, resume(run_dir, 4)):
        assert play(line, tmp_path, env)[0] == 0
    found = [read(path) for path in wandb_files(run_dir)]
    assert [len(part["history"]) for part in found] == [2, 2]
    assert found[0]["id"] == found[1]["id"]
    check_scalars(run_dir, found[0]["history"] + found[1]["history"])


# Away -------------------------------------------------------------------------------------------


class Server:
    """A W&B server: `answers(number, body)` returns what to answer to its n-th request, as
    (status, JSON), or None to keep the connection open and stay silent."""

    def __init__(self, answers):
        self.asked, over = [], threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
                body = body.decode(errors="replace")
                self.server.outer.asked.append((self.path, body))
                answer = answers(len(self.server.outer.asked), body)
                if answer is None:
                    over.wait()
                    self.close_connection = True
                    return
                data = json.dumps(answer[1]).encode()
                self.send_response(answer[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_PUT = do_GET

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.outer, self.over = self, over
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.http.handle_error = lambda *args: None
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


def working(number, body):
    """As much of W&B's GraphQL as wandb.init asks for."""
    entity = {"id": "e", "name": "me"}
    if "RunResumeStatus" in body:
        return 200, {"data": {"model": {"id": "p", "name": "u", "entity": entity, "bucket": None}}}
    if "upsertBucket" in body:
        name = json.loads(body)["variables"]["name"]
        project = {"id": "p", "name": "unseen", "entity": entity}
        bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
        bucket |= {"description": "", "sweepName": "", "historyLineCount": 0}
        return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
    if "CreateRunFiles" in body:
        return 200, {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}}
    if "viewer" in body:
        viewer = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}"}
        return 200, {"data": {"viewer": viewer | {"teams": {"edges": []}}}}
    return 200, {}


def silent_after_init():
    """Works until the run has been registered."""
    registered = []

    def answers(number, body):
        if registered:
            return None
        if "upsertBucket" in body:
            registered.append(True)
        return working(number, body)

    return answers


AWAY = {
    "silent": lambda number, body: None,
    "answers once": lambda number, body: (200, {}) if number == 1 else None,
    "out of order": lambda number, body: (500, {}),
    "refuses": lambda number, body: (401, {}),
}


@pytest.fixture(scope="module")
def offline_s(tmp_path_factory):
    """Seconds that an offline run takes on this machine."""
    folder = tmp_path_factory.mktemp("offline")
    env = nobody(folder) | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    argv = tracked(folder / "run", 2, "--wandb-mode", "offline")
    code, _, seconds = play(argv, folder, env)
    assert code == 0
    return seconds


def check_away(tmp_path, env, offline_s, sentences_of_ours=(1,)):
    """The run goes on as if nothing were: one sentence, a few time-outs, and all data kept."""
    run_dir = tmp_path / "run"
    code, err, seconds = play(tracked(run_dir, 2), tmp_path, env)
    assert code == 0 and "Traceback" not in err, err[-3000:]
    ours = [line for line in sentences(err) if not line.startswith("wandb: ")]
    assert len(ours) in sentences_of_ours, err
    assert all("wandb" in line and line.endswith(".") for line in ours)
    assert (run_dir / "summary.json").exists()
    check_scalars(run_dir, max((read(x)["history"] for x in wandb_files(run_dir)), key=len))
    # wandb's own time-outs, of 10 s and more, are none of --wandb-timeout's.
    assert seconds < 1.5 * offline_s + 5 * LIMIT, f"{seconds:.1f} s, offline {offline_s:.1f} s"


def test_server_closed(tmp_path, env, offline_s):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": KEY}
    check_away(tmp_path, env, offline_s)


@pytest.mark.parametrize(
    "how",
    [
        "silent",
        pytest.param("answers once", marks=pytest.mark.long),
        pytest.param("out of order", marks=pytest.mark.long),
        "refuses",
    ],
)
def test_server_away(how, tmp_path, env, offline_s):
    with contextlib.closing(Server(AWAY[how])) as server:
        env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        check_away(tmp_path, env, offline_s)
        assert server.asked


def test_server_speaks_no_http(tmp_path, env, offline_s):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.sendall(b"220 smtp.example.org ESMTP\r\n")

        threading.Thread(target=speak, daemon=True).start()
        port = listening.getsockname()[1]
        env |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": KEY}
        check_away(tmp_path, env, offline_s)
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("key", ["", "short"])
def test_no_key_and_no_terminal(key, tmp_path, env, offline_s):
    with contextlib.closing(Server(working)) as server:
        check_away(tmp_path, env | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": key}, offline_s)


def test_server_goes_silent_during_the_run(tmp_path, env, offline_s):
    """wandb has begun by then, and may say itself that it could not send everything."""
    with contextlib.closing(Server(silent_after_init())) as server:
        env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        check_away(tmp_path, env, offline_s, sentences_of_ours=(0, 1))
        assert any("upsertBucket" in body for _, body in server.asked)


def test_online_run_reaches_the_server(tmp_path, env):
    with contextlib.closing(Server(working)) as server:
        env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        more = ("--wandb-timeout", 30, "--final-episodes", 0)  # no table: artifacts need more
        argv = tracked(tmp_path / "run", 3, *more)
        code, err, _ = play(argv, tmp_path, env)
        assert code == 0, err[-3000:]
    sent = {}
    for path, body in server.asked:
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            for number, row in enumerate(history.get("content", []), history.get("offset", 0)):
                sent[number] = json.loads(row)
    check_scalars(tmp_path / "run", list(sent.values()))

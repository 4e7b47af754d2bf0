"""The website: all pages are in it, scripts' pages say what studies have, films are small. The long
tests build it and look at it at two widths: they need `make docs` once, and Chromium."""

import csv
import functools
import html
import http.server
import itertools
import json
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import tracked
from PIL import Image
from scipy import stats

from experiments import website
from experiments.runs import COLUMNS, load_script, read_study, script_args
from experiments.website import (
    DECIDED,
    FAMILIES,
    METHODS,
    NAVIGATION,
    PLACES,
    ROOT,
    command_of,
    equations_of,
    gallery_page,
    groups_of,
    method_flags,
    read_films,
    read_studies,
    script_page,
)

SPHINX = ROOT / ".venv-docs/bin/python"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
has_sphinx = pytest.mark.skipif(not SPHINX.exists(), reason="needs .venv-docs: make docs")
has_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
FILMS = read_films()


def test_navigation_has_every_page_once():
    named = " ".join(NAVIGATION.values()).split()
    pages = {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")}
    pages |= {"README", "CONTRIBUTING", "CHANGELOG", "gallery", "scripts/index", "data"}
    pages.add("zoo/README")
    assert sorted(named) == sorted(pages)


def test_every_script_has_a_page_and_a_page_of_decisions():
    scripts = tracked.files("*_*.py", "baselines/*.py")
    assert {path.stem for path in scripts} == set(DECIDED)
    assert all((ROOT / page).exists() for page in DECIDED.values())


SOURCE = '''"""Doc. Eq. (1)"""

class Args(RunArgs):
    """Flags."""

    # Environment
    task: str = "treasure"  # which
    # Method
    copy_every: Count = 0  # control, Eq. (2); 0: off
    share: Annotated[float, Interval(gt=0, le=1)] = 0.5  # of a | b
    # Base algorithm
    gamma: Share = 0.95  # discount


class Net(nn.Module):
    def forward(self):
        # Eq. (3), Sec. 4, of
        # all agents
        return 1  # Eq. (6)


def loss(x):
    return x  # minus Eqs. (4), (5)
'''


def test_equations_and_flags_of_a_source():
    found = [(x.line, x.function, x.text) for x in equations_of(SOURCE)]
    assert found == [
        (17, "Net · forward", "Eq. (3), Sec. 4, of all agents"),
        (19, "Net · forward", "Eq. (6)"),
        (23, "loss", "minus Eqs. (4), (5)"),
    ]
    assert [tuple(flag) for flag in method_flags(SOURCE)] == [
        ("--copy-every", "0", "control, Eq. (2); 0: off"),
        ("--share", "0.5", "of a | b"),
    ]


RETURNS = [1.0, 2.0, 3.0, 4.0, 9.0]


def write_study(path: Path) -> None:
    """MADDPG with five seeds, of which the first was resumed to more steps."""
    lines = []
    for seed, value in enumerate(RETURNS, 1):
        name = f"small-s{seed}"
        args = {"script": "maddpg_particle", "seed": seed, "total_timesteps": 1000}
        args |= {"task": "resource", "population": "9", "no_such_flag": 7, "commit": "abc"}
        lines += [(name, "argument", "", "", k, json.dumps(x)) for k, x in args.items()]
        lines.append((name, "log", "", "", "timesteps", 3000))
        lines += [(name, "curve", 75 * k, "", "return", value * k) for k in range(1, 41)]
        for row in ("6", "6 random", "12"):
            figures = {"return": value, "return_low": value - 1, "return_high": value + 1}
            lines += [(name, "final", 3000, row, k, x) for k, x in figures.items()]
            lines.append((name, "final", 3000, row, "episodes", 10))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *lines])


def test_a_scripts_page_says_what_its_study_has(tmp_path):
    write_study(tmp_path / "study_small.csv")
    studies = {"small": read_study(tmp_path / "study_small.csv")}
    page = script_page("maddpg_particle", studies, [], tmp_path / "curves")
    low, high = stats.ttest_1samp(RETURNS, 0).confidence_interval()
    mean = f"**3.80 [{low:.2f}, {high:.2f}]**"
    assert f"| **small, mean of 5** | {mean} | {mean} |" in page
    assert "| `small-s2` | 2.00 [1.00,\N{NO-BREAK SPACE}3.00] |" in page
    assert "|  | 6 | 12 |" in page and "random" not in page.split("## Benchmarks")[1]
    assert "| `small` | 1, 2, 3, 4, 5 | 3,000 | abc |" in page
    command = "python baselines/maddpg_particle.py --task resource --population 9"
    assert f"    # small; gone since: no_such_flag 7\n    {command} --total-timesteps 3000" in page
    assert "(curves/maddpg_particle-small.png)" in page
    assert (tmp_path / "curves/maddpg_particle-small.png").stat().st_size > 5000
    assert "| `--polyak` | `0.01` |" in page and "| `actor_loss` | Eq. (9)" in page

    without = script_page("maac_particle", studies, [], tmp_path / "curves")
    assert "No study of this script is in `docs/data`" in without
    assert "(../docs/baselines_particle.md)" in without


@pytest.mark.long
def test_commands_of_benchmarks_are_ones_that_scripts_take():
    """Of all studies in docs/data, whose runs may be older than today's flags."""
    for runs in read_studies(ROOT / "docs/data").values():
        for members in groups_of(runs).values():
            _, path, *argv = shlex.split(command_of(members[0]))
            argv[-1] = "1"  # of --seed S
            script_args(load_script(Path(path).stem), argv)


def test_films_of_two_runs_share_no_directory():
    """A directory takes one run's evaluations: else the second of two commands is refused."""
    sources = {}
    for words in (command.split() for film in FILMS for command in film["commands"]):
        options = dict(itertools.pairwise(words))
        if "--eval-only" in options and "--run-dir" in options:
            sources.setdefault(options["--run-dir"], set()).add(options["--eval-only"])
    assert sources and all(len(found) == 1 for found in sources.values())


def test_films_are_small_named_and_on_their_pages():
    pictures = ROOT / "docs/images"
    shown = "".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    assert all((pictures / film["file"]).stat().st_size < 1_000_000 for film in FILMS)
    named = {film["file"] for film in FILMS}
    assert len(named) == len(FILMS)
    assert not [
        x.name for x in pictures.glob("*.gif") if x.name not in named and x.name not in shown
    ]
    page = gallery_page(FILMS)
    for film in FILMS:
        assert f"docs/images/{film['file']}" in page
    links = re.findall(r"\[film\]\(#(\w+)\)", page)
    assert sorted(links) == sorted(Path(name).stem for name in named)
    assert all(f"\n({link})=\n### " in page for link in links)
    cells = {(x["world"], x["where"].split(",")[0], x["method"]) for x in FILMS}
    asked = sum(len(PLACES[family]) * len(METHODS[family]) for family in METHODS)
    assert page.count("| – ") == asked - len(cells)


def test_methods_of_the_gallery_are_the_scripts():
    assert list(METHODS) == list(PLACES) == list(FAMILIES)
    for family, scripts in FAMILIES.items():
        assert set(METHODS[family].values()) == set(scripts)


def test_a_gif_keeps_colours_that_come_late(tmp_path, capsys):
    """One palette for all pictures, not the first one's."""
    frames = np.full((12, 64, 64, 3), 255, np.uint8)
    frames[6:, :32] = (31, 119, 180)
    frames[6:, 32:] = (214, 39, 40)
    imageio.mimwrite(tmp_path / "x.mp4", list(frames), fps=6)
    argv = [
        "gif",
        str(tmp_path / "x.mp4"),
        str(tmp_path / "x.gif"),
        "--every",
        "3",
        "--width",
        "32",
    ]
    assert website.main(argv) == 0 and "4 pictures" in capsys.readouterr().out
    image = Image.open(tmp_path / "x.gif")
    assert image.size == (32, 32)
    image.seek(image.n_frames - 1)
    last = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(last[4, 16] - (31, 119, 180)).max() < 25
    assert np.abs(last[28, 16] - (214, 39, 40)).max() < 25
    assert website.main([*argv, "--first", "99"]) == 2


def test_a_folder_of_somebody_elses_is_kept(tmp_path, capsys):
    """Another project of Sphinx's, which has a conf.py, too."""
    for name in ("mine.md", "conf.py"):
        (tmp_path / name).write_text("mine")
        assert website.main(["lay-out", str(tmp_path)]) == 2
        sentence = f"{tmp_path} is there and holds none of our websites: remove it."
        assert capsys.readouterr().err == f"error: {sentence}\n"
        assert (tmp_path / name).exists()


def test_an_older_website_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(website, "write_pages", lambda site: (site.out / "x.md").write_text("x"))
    for _ in range(2):
        assert website.main(["lay-out", str(tmp_path / "new/site")]) == 0
        assert {path.name for path in (tmp_path / "new/site").iterdir()} == {".website", "x.md"}
        (tmp_path / "new/site/old.md").write_text("old")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert website.main(["lay-out", str(tmp_path / "file/site")]) == 2
    sentence = f"{tmp_path}/file/site cannot be written: Not a directory."
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_the_generator_is_pinned_and_the_workflow_makes_what_make_makes():
    lines = (ROOT / "requirements-docs.txt").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins if pin)
    workflow = (ROOT / ".github/workflows/docs.yml").read_text()
    assert "run: make docs" in workflow and "path: site/html" in workflow
    makefile = (ROOT / "Makefile").read_text()
    assert "-W --keep-going" in makefile and "site/source site/html" in makefile


# Built -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole website."""
    folder = tmp_path_factory.mktemp("site")
    assert website.main(["lay-out", str(folder / "source")]) == 0
    flags = ["-q", "-W", "--keep-going", "-d", folder / "doctrees"]
    command = [SPHINX, "-m", "sphinx", *flags, folder / "source", folder / "html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def pages_of(site: Path) -> list[str]:
    found = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    return sorted(str(path.relative_to(site)) for path in found)


@pytest.mark.long
@pytest.mark.timeout(900)
@has_sphinx
def test_the_site_is_whole_and_needs_no_other_machine(site):
    pages = pages_of(site)
    for page in ("index", "docs/CLAIMS", "gallery", "search", *(f"scripts/{x}" for x in DECIDED)):
        assert f"{page}.html" in pages
    for page in pages:
        text = (site / page).read_text()
        loaded = re.findall(r"<(?:script|img|link|source)[^>]*(?:src|href)=\"([^\"]+)\"", text)
        assert not [x for x in loaded if re.match(r"(https?:)?//", x)], page
        if page.startswith("docs/") and "/data/" not in page:
            shown = re.sub(r"<(pre|code).*?</\1>", "", text, flags=re.DOTALL)
            assert "\\frac" not in shown and "\\pi" not in shown, page
        assert not re.search(r"[\s(>]–[a-z]", text), page  # a flag whose "--" became a dash
    for name in ("bidist", "mra", "mipi"):
        assert (site / f"docs/{name}.html").read_text().count("<math") > 10
    words = (site / "searchindex.js").read_text()
    assert "reptil" in words and "resnet" not in words


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def look(folder: Path, pages: list[str]) -> dict:
    """What tests/look_at_site.js finds in pages of a folder."""
    script = (ROOT / "tests/look_at_site.js").read_text()
    frame = '<iframe style="height: 900px; border: 0"></iframe>'
    call = f"look({json.dumps(pages)})"
    (folder / "look.html").write_text(f"<body>{frame}<script>{script}\n{call}</script></body>")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = "--headless --no-sandbox --disable-gpu --dump-dom --window-size=1400,1000"
        address = f"http://127.0.0.1:{server.server_port}/look.html"
        command = [CHROMIUM, *flags.split(), "--virtual-time-budget=600000", address]
        done = subprocess.run(command, capture_output=True, text=True)
        server.shutdown()
    (folder / "look.html").unlink()
    body = re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)
    return json.loads(html.unescape(body[1]))


@pytest.mark.long
@has_browser
def test_what_runs_off_or_breaks_is_found(tmp_path):
    """The looking itself: of five pages three have faults at 390 pixels, none at 1280; one cannot
    be read where it is dark."""
    box = '<div style="overflow-x: auto">{}</div>'
    wide = '<table style="width: 800px"><tr><td>x</table>'
    broken = "<p>see <code>{}</code>".format(
        "--a-flag-that-is-too-long-for-a-telephone-to-show-whole"
    )
    pages = {"a": box.format(wide), "b": wide, "c": broken, "d": "<h1>{}</h1>".format("W" * 60)}
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(f"<body style='margin: 0'><article>{text}</article>")
    (tmp_path / "d.html").write_text((tmp_path / "d.html").read_text().replace("h1>", "small>"))
    dark = "<style>[data-theme=dark] { background: black } p { color: #333 }</style>"
    (tmp_path / "e.html").write_text(f"{dark}<article><p>x</p></article>")
    found = look(tmp_path, [f"{name}.html" for name in "abcde"])
    assert found["looked"] == 10
    wrong = {fault.split(":")[0] for fault in found["found"]}
    assert wrong == {
        *(f"{x}.html at 390" for x in "bcd"),
        *(f"e.html at {x}, dark" for x in (390, 1280)),
    }


@pytest.mark.long
@pytest.mark.timeout(900)
@has_sphinx
@has_browser
def test_nothing_runs_off_a_page_and_no_code_breaks_inside_a_word(site):
    pages = pages_of(site)
    found = look(site, pages)
    assert found["looked"] == 2 * len(pages) and not found["found"]

"""The page in a real browser: it renders offline, runs nothing, and fits a phone."""

import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lightleak.report import report
from report.synthetic_people import write_people_run
from report.synthetic_probe import EXPOSED, write_probe_run
from report.synthetic_run import exposed

HOSTILE = (
    """<script>document.title="owned"</script>"><img src=x onerror='document.title="owned"'>"""
)
PHONE = 390
SUSPECT_BLUE = (11, 92, 148)
# A window has a least width, a frame has none: the page tells its width to the page around it.
FRAME = """<!doctype html><iframe src="framed.html" style="width:{width}px;height:900px;border:0">
</iframe><script>onmessage = event => document.title = event.data</script>"""
TELL = """<script>onload = () => parent.postMessage(
innerWidth + "/" + document.documentElement.scrollWidth, "*")</script>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Run a headless Chromium on a file and return what it prints."""
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        message = "NO BROWSER: the report was not looked at; install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    def run(page, *options):
        command = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            "--virtual-time-budget=3000",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            *options,
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of an exposed run whose records are hostile, and partly very long."""
    texts = {f"suspect/{i}": HOSTILE if i % 3 else "x" * 10_000 for i in range(120)}
    unusable = [(f"suspect/{HOSTILE}", "image", "y" * 3000)]
    folder = tmp_path_factory.mktemp("run") / "run"
    return report(
        exposed(
            folder, records=120, texts=texts, unusable=unusable, images=folder.parent / "images"
        ),
        show_images=True,
    )


@pytest.fixture(scope="module")
def people_page(tmp_path_factory):
    """The report of an exposed identity run with hostile and very long names, in any script."""
    names = {f"suspect/p{i}": HOSTILE if i % 3 else "م" * 10_000 for i in range(20)}
    folder = tmp_path_factory.mktemp("people")
    return report(
        write_people_run(
            folder / "run",
            sets={"suspect": 20, "known": 5, "control": 20},
            known=12,
            names=names,
            failures=[(f"suspect/{HOSTILE}", "photo", "y" * 3000)],
            photos=folder,
        )
    )


@pytest.fixture(scope="module")
def probe_page(tmp_path_factory):
    """The report of an exposed probe whose models have hostile and very long names."""
    names = (HOSTILE, "x" * 10_000)
    conditions = [replace(each, name=f"{i}{names[i % 2]}") for i, each in enumerate(EXPOSED)]
    return report(write_probe_run(tmp_path_factory.mktemp("probe") / "run", conditions, blocks=12))


@pytest.fixture(params=["page", "people_page", "probe_page"])
def either(request):
    """Each kind of page."""
    return request.getfixturevalue(request.param)


def without_policy(page):
    """The page as a browser would run it that knew no content policy."""
    source = page.read_text(encoding="utf-8")
    start = source.index("<meta http-equiv")
    return source[:start] + source[source.index(">", start) + 1 :]


def test_a_hostile_record_runs_nothing_even_without_the_policy(browse, either, tmp_path):
    bare = tmp_path / "bare.html"
    bare.write_text(without_policy(either), encoding="utf-8")
    for file in (either, bare):
        dom = browse(file, "--dump-dom")
        assert "<title>Exposed: " in dom
        assert "&lt;script&gt;document.title" in dom


def test_the_first_screen_is_drawn(browse, either, tmp_path):
    shot = tmp_path / "first.png"
    browse(either, f"--screenshot={shot}", "--window-size=1280,900")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (900, 1280, 3)
    assert (pixels[0, 0] == (152, 41, 28)).all()  # the bar in the colour of the verdict
    rows_with_ink = (pixels.min(axis=2) < 100).any(axis=1).mean()
    assert 0.2 < rows_with_ink < 0.95


def test_the_figures_are_drawn(browse, page, tmp_path):
    shot = tmp_path / "all.png"
    browse(page, f"--screenshot={shot}", "--window-size=1280,5000")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = np.abs(pixels - SUSPECT_BLUE).max(axis=2) < 12
    # The ROC curves alone stand side by side and draw some hundred pixels each.
    assert blue[:, :640].sum() > 300
    assert blue[:, 640:].sum() > 300


def test_the_heat_map_is_shaded_and_true_names_stand_beyond_their_decoys(
    browse, people_page, tmp_path
):
    shot = tmp_path / "all.png"
    browse(people_page, f"--screenshot={shot}", "--window-size=1280,10000")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = (np.abs(pixels - SUSPECT_BLUE).max(axis=2) < 3).sum(axis=1)
    # Rows of the heat map where a template named the person on every photo: one cell is filled.
    assert (blue > 60).sum() > 12 * 10
    # A marker is a small diamond, and there is one for each person that was found.
    assert ((blue > 4) & (blue < 30)).sum() > 12 * 8


def test_a_gain_is_shaded_in_the_colour_of_the_scale(browse, probe_page, tmp_path):
    shot = tmp_path / "all.png"
    browse(probe_page, f"--screenshot={shot}", "--window-size=1280,9000")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = np.abs(pixels - SUSPECT_BLUE).max(axis=2) < 12
    # No line or marker is so thick: these squares lie within a cell or the end of the scale.
    assert np.lib.stride_tricks.sliding_window_view(blue, (7, 7)).all(axis=(2, 3)).sum() > 40


@pytest.mark.parametrize("width", [PHONE, 768, 1280])
def test_nothing_sticks_out_sideways(browse, either, tmp_path, width):
    telling = without_policy(either).replace("</head>", f"{TELL}</head>")
    (tmp_path / "framed.html").write_text(telling, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    dom = browse(frame, "--dump-dom", "--window-size=1400,1000")
    assert f"<title>{width}/{width}</title>" in dom

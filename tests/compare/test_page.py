"""The page of a comparison: what it fetches, and what it is in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from pipeline import api
from pipeline.config import CompareConfig
from pipeline.evaluation.compare_figures import draw_differences, draw_run_curves
from pipeline.evaluation.comparison import MEAN_ROW, ComparedRun, Difference
from pipeline.evaluation.figures import draw_curves, draw_distributions
from pipeline.evaluation.summary import make_metrics

CHROMIUM = shutil.which("chromium")


class Addresses(HTMLParser):
    """What a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object", "embed")
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]


@pytest.fixture
def page(write_run, make_dice, write_final_scores, compare, tmp_path) -> Path:
    """Three runs, one of which never finished, with a name that a page must escape."""
    runs = [write_run("<b>first", dice=make_dice(), loss=2.0), write_run("second", dice=make_dice(0.05))]
    for run, shift in zip(runs, (0.0, 0.05), strict=True):
        write_final_scores(run, make_dice(shift))
    third = write_run("third", is_finished=False, epochs=2, loss=0.5)
    out = tmp_path / "compare.html"
    api.compare(CompareConfig(runs=tuple(map(str, [*runs, third])), out=str(out)))
    return out


def test_the_page_fetches_nothing_and_escapes_names(page):
    addresses = Addresses()
    addresses.feed(page.read_text())
    assert len(addresses.found) >= 5
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses.found)
    assert "<b>first" not in page.read_text()
    assert "&lt;b&gt;first" in page.read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", ["T$_1$", "lr$\\bad$", "$", "a\\$b", "\u809d\u810f", "\u043f\u0435\u0447\u0435\u043d\u044c", "caf\udce9"]
)
def test_names_of_any_letters_are_drawn_as_they_are_without_formulas_or_warnings(name):
    run = ComparedRun(
        **{"name": name, "folder": name, "state": "finished", "dataset_name": "d", "fingerprint_hash": "0", "fold": 0},
        **{"device": "cpu", "precision": "32-true", "class_names": (name, "b")},
        curves={"epoch": (1.0, 2.0), f"val_dice_{name}": (0.1, 0.2), "val_dice_b": (0.1, 0.2)},
    )
    rows = [Difference(name=each, num_cases=1, first=0.5, second=0.6, difference=0.1) for each in (MEAN_ROW, name)]
    metrics = make_metrics([], labels={name: 1, "b": 2}, tolerance_mm=1, failures={})
    drawn = [
        (f"Validation Dice, {name}", draw_run_curves([run], {name: "red"})[0][-1]),
        (f"Dice, {name}", draw_differences(rows, {name: [0.1]}, label=f"Dice, {name}", color="red")),
        (name, draw_distributions(metrics, {name: "red", "b": "blue"})),
        (name, draw_curves({k: np.array(v) for k, v in run.curves.items()}, {name: "red", "b": "blue"})),
    ]
    for text, picture in drawn:
        readable = text.replace("\udce9", "?")
        assert f">{readable}<" in b64decode(picture.split(",", 1)[1]).decode()


PROBE = """<script>
const shown = (node) => node.getClientRects().length > 0;
const press = (text, root) => [...root.querySelectorAll("button")].find((b) => b.textContent === text).click();
const rows = (id) => [...document.getElementById(id).tBodies[0].rows];
const column = (id, index) => rows(id).map((row) => row.cells[index].textContent.trim());
const runColours = [...document.querySelectorAll("#runs .swatch")].map(
  (swatch) => getComputedStyle(swatch).backgroundColor.match(/\\d+/g).map(Number));
// How many pixels of a picture have the colour of each run, more or less.
const colours = (image) => {
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data, counts = runColours.map(() => 0);
  for (let i = 0; i < pixels.length; i += 4) {
    runColours.forEach((rgb, run) => {
      counts[run] += pixels[i + 3] > 128 && rgb.every((value, k) => Math.abs(value - pixels[i + k]) < 12);
    });
  }
  return counts;
};
addEventListener("load", () => {
  const told = { errors: window.faults, axes: [], pictures: [], before: column("cases", 2) };
  for (const name of ["epochs", "optimiser steps", "samples", "time"]) {
    press(name, document.querySelector("[data-group=axis]"));
    const images = [...document.querySelectorAll("img[data-group=axis]")].filter(shown);
    told.axes.push(images.map((image) => image.dataset.name));
    told.pictures.push(...images.map(colours));
  }
  told.differences = [...document.querySelectorAll("figure img")].filter(shown).map(colours);
  press("second", document.getElementById("cases"));
  told.rising = column("cases", 3);
  press("second", document.getElementById("cases"));
  told.falling = column("cases", 3);
  press("run", document.getElementById("runs"));
  told.runs = column("runs", 0);
  document.body.insertAdjacentHTML("beforeend", "<pre id=told></pre>");
  document.getElementById("told").textContent = JSON.stringify(told);
});
</script></body>"""
LISTEN = """<head><script>window.faults = [];
addEventListener("error", (event) => window.faults.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => window.faults.push(event.violatedDirective));
</script>"""


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser without a screen, that logs what the page's console says."""
    assert CHROMIUM is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *common, profile, "--virtual-time-budget=5000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_a_browser_shows_plots_sorts_tables_and_reports_no_error(page, tmp_path):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("<head>", LISTEN, 1).replace("</body>", PROBE, 1))
    done = browse(probed, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    told = json.loads(unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert told["errors"] == []
    assert told["axes"] == [["epoch"], ["optimizer_step"], ["samples"], ["hours"]]
    # The third run's curves are short: it has two epochs.
    assert (np.min(told["pictures"], axis=0) > [100, 100, 40]).all(), told["pictures"]
    assert np.shape(told["pictures"]) == (4, 3)
    ((none, points, other),) = told["differences"]
    assert points > 20
    assert (none, other) == (0, 0)
    values = [float(text) for text in told["rising"] if text != "–"]
    assert values == sorted(values) != [float(text) for text in told["before"] if text != "–"]
    assert told["falling"] == told["rising"][::-1]
    assert told["runs"] == ["<b>first", "second", "third"]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_picture_of_the_page_has_the_colours_of_all_runs(page, tmp_path):
    shot = tmp_path / "page.png"
    done = browse(page, tmp_path, "--window-size=1280,2400", f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr, done.stderr
    picture = (255 * imread(shot)[..., :3]).round().astype(int)
    assert picture.shape[:2] == (2400, 1280)
    curves = picture[500:1500].reshape(-1, 3)
    for color in ("#56b4e9", "#e69f00", "#009e73"):
        rgb = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
        assert (np.abs(curves - rgb).max(axis=1) < 8).sum() > 50, color

from __future__ import annotations

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from pipeline.datasets.dataset import Case
from pipeline.errors import InputError
from pipeline.evaluation.figures import PALETTE, class_colors, draw_curves, read_curves
from pipeline.evaluation.metrics import score_class
from pipeline.evaluation.report import write_report
from pipeline.evaluation.shown_cases import choose_shown_cases, mean_over_classes, read_shown_cases
from pipeline.evaluation.slices import DPI, ReportCase, draw_slices, largest_slices, oriented_slice
from pipeline.evaluation.summary import CaseScores, Metrics, make_metrics
from pipeline.prediction_record import MANY_SEAMS, PredictionRecord
from pipeline.synthetic import make_synthetic_case, write_msd_dataset

SPACING = (1.0, 1.5, 2.0)
LABELS = {"organ_1": 1, "organ_2": 2}
CURVES = """epoch,iteration,lr,train_loss,val_dice_mean,val_dice_organ_1,val_dice_organ_2
0,10,0.01,0.9,,,
1,20,0.008,0.5,0.4,0.5,0.3
2,30,0.006,nan,,,
3,40,0.004,0.3,0.7,0.8,0.6
"""


class References(HTMLParser):
    """Everything in a page that a browser would fetch, and the tags it met."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "poster", "action")
        self.addresses += [value or "" for name, value in attributes if name in names]


def make_cases(*shifts: int) -> list[ReportCase]:
    """Synthetic cases whose prediction is the reference moved by so many voxels: more is worse."""
    cases = []
    for seed, shift in enumerate(shifts):
        case = make_synthetic_case(seed, shape=(30, 24, 18), spacing=SPACING, num_classes=3)
        label = case.label.array[0]
        cases.append(
            ReportCase(
                case_id=f"case_{seed}",
                image=case.image.array[0],
                reference=label,
                prediction=np.roll(label, shift, 0),
                spacing=SPACING,
            )
        )
    return cases


def score(cases: list[ReportCase], failures: dict[str, str] | None = None) -> Metrics:
    scored = [
        CaseScores(
            case_id=case.case_id,
            classes={
                name: score_class(case.prediction == value, case.reference == value, spacing=case.spacing)
                for name, value in LABELS.items()
            },
        )
        for case in cases
    ]
    return make_metrics(scored, labels=LABELS, tolerance_mm=1.0, failures=failures or {})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    cases, tmp_path = make_cases(1, 3), tmp_path_factory.mktemp("report")
    (tmp_path / "metrics.csv").write_text(CURVES)
    write_report(
        tmp_path / "report.html",
        score(cases, {"case_9": "has <no> prediction"}),
        title="Set A & B",
        facts={"Patch": "12 x 16 x 8"},
        curves_csv=tmp_path / "metrics.csv",
        cases=cases,
    )
    return (tmp_path / "report.html").read_text()


def pictures(page: str, kind: str) -> list[bytes]:
    return [b64decode(text) for text in re.findall(rf'src="data:image/{re.escape(kind)};base64,([^"]+)"', page)]


def test_the_page_asks_nothing_of_the_network(page: str) -> None:
    found = References()
    found.feed(page)
    assert len(found.addresses) == 4
    assert all(address.startswith("data:image/") for address in found.addresses)
    assert "link" not in found.tags
    assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", re.sub(r'"data:[^"]*"', "", page))
    assert "default-src 'none'" in page


def test_the_pictures_are_whole_and_ask_for_nothing_either(page: str) -> None:
    slices, drawings = pictures(page, "png"), pictures(page, "svg+xml")
    assert (len(slices), len(drawings)) == (2, 2)
    assert all(imread(BytesIO(png)).std() > 0.05 for png in slices)
    for svg in drawings:
        assert svg.rstrip().endswith(b"</svg>")
        assert not re.search(rb'(href|src)="(?!#)', svg)


def test_the_page_says_what_was_measured(page: str) -> None:
    metrics = score(make_cases(1, 3))
    assert f"<b>{metrics.overall['dice']:.3f}</b>" in page
    for name, summary in metrics.by_class.items():
        assert name in page
        assert f"{summary.metrics['dice'].mean:.3f} <small>± {summary.metrics['dice'].std:.3f}</small>" in page
    assert "12 x 16 x 8" in page
    assert "Best case, case_0" in page
    assert "Worst case, case_1" in page
    assert page.count("<td data-value=") == 2 * 7


def test_text_from_outside_is_escaped(page: str) -> None:
    assert "Set A &amp; B" in page
    assert "has &lt;no&gt; prediction" in page
    assert "<no>" not in page


def test_a_report_needs_neither_curves_nor_pictures_nor_cases(tmp_path: Path) -> None:
    write_report(tmp_path / "bare.html", score([]))
    text = (tmp_path / "bare.html").read_text()
    assert "<img" not in text
    assert "nan" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)


def seams_page(tmp_path: Path, *shares: float | None) -> str:
    """The report of cases in which such shares of 1000 compared voxels are seams; None of one without a record."""
    records = {
        f"case_{number}": PredictionRecord(
            case_id=f"case_{number}", seconds=1, windows=8, compared_voxels=1000, disagreeing_voxels=round(1000 * share)
        )
        for number, share in enumerate(shares)
        if share is not None
    }
    cases = make_cases(*range(1, len(shares) + 1))
    write_report(tmp_path / "report.html", score(cases), records=records)
    return (tmp_path / "report.html").read_text()


def test_seams_of_every_case_are_in_the_table_and_few_are_not_warned_of(tmp_path: Path) -> None:
    page = seams_page(tmp_path, 0.013, None, MANY_SEAMS - 0.01)
    assert '<td data-value="0.013">1.3%</td>' in page
    assert f'<td data-value="{MANY_SEAMS - 0.01}">{MANY_SEAMS - 0.01:.1%}</td>' in page
    headings = page.split('<table id="cases"')[1].split("</thead>")[0].count("<th")
    rows = [row.count("<td") for row in page.split('<table id="cases"')[1].split("<tr>")[2:]]
    assert rows == [headings - 1] * 3
    assert 'id="seams"' not in page


def test_many_seams_are_warned_of_with_the_cases_and_what_to_do(tmp_path: Path) -> None:
    warning = seams_page(tmp_path, 0.9, 0.01, MANY_SEAMS + 0.1).split('id="seams"')[1].split("</section>")[0]
    assert "disagree in 2 case(s)" in warning
    assert "case_0</b> 90%" in warning
    assert "case_1" not in warning
    assert "larger patch" in warning


def test_without_counted_seams_nothing_is_said_of_them(tmp_path: Path, page: str) -> None:
    assert "seams" not in page.lower()
    assert "seams" not in seams_page(tmp_path, None, None).lower()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    cases = make_cases(2)
    for name in ("a", "b"):
        write_report(tmp_path / name, score(cases), cases=cases)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_best_median_and_worst_are_shown() -> None:
    shown = choose_shown_cases(score(make_cases(5, 0, 2, 1, 8)))
    ranks = {item.rank: item.case_id for item in shown}
    assert ranks == {"best": "case_1", "median": "case_2", "worst": "case_4"}
    assert [item.rank for item in choose_shown_cases(score(make_cases(4, 0)))] == ["best", "worst"]
    assert [item.rank for item in choose_shown_cases(score(make_cases(4)))] == ["only"]
    assert choose_shown_cases(score([])) == ()


def test_a_case_without_any_class_is_not_ranked() -> None:
    (case,) = make_cases(0)
    nothing = np.zeros_like(case.reference)
    metrics = score(
        [case, ReportCase(case_id="void", image=case.image, reference=nothing, prediction=nothing, spacing=SPACING)]
    )
    assert np.isnan(mean_over_classes(metrics.cases[1], "dice"))
    assert [item.case_id for item in choose_shown_cases(metrics)] == ["case_0"]


def test_slices_cut_the_largest_reference_area() -> None:
    label = np.zeros((6, 7, 8), np.uint8)
    label[1:5, 3, 2:6] = 1
    label[4, 2:5, 5] = 2
    assert largest_slices(label) == (4, 3, 5)
    assert largest_slices(np.zeros((6, 7, 9))) == (3, 3, 4)


@pytest.mark.parametrize(
    ("axis", "voxel", "corner"),
    [
        # The last voxels along i, j, k are the patient's right, front and top: they come first on the screen.
        (2, (5, 6, 2), (0, 0)),
        (2, (0, 0, 2), (-1, -1)),
        (1, (5, 2, 7), (0, 0)),
        (0, (2, 6, 7), (0, 0)),
    ],
)
def test_slices_are_shown_in_the_radiological_convention(
    axis: int, voxel: tuple[int, int, int], corner: tuple[int, int]
) -> None:
    volume = np.zeros((6, 7, 8))
    volume[voxel] = 1
    picture = oriented_slice(volume, axis, 2)
    assert picture.shape == tuple(n for other, n in enumerate(volume.shape) if other != axis)[::-1]
    assert picture[corner] == 1


def test_slices_keep_the_physical_aspect() -> None:
    shape, spacing = (40, 30, 20), (1.0, 1.0, 4.0)
    distance = np.linalg.norm((np.indices(shape).T - (np.array(shape) - 1) / 2) * spacing, axis=-1).T
    ball = (distance < 11).astype(np.uint8)
    case = ReportCase(case_id="ball", image=ball * 0.0, reference=ball, prediction=ball * 0, spacing=spacing)
    picture = imread(
        BytesIO(b64decode(draw_slices(case, labels={"ball": 1}, colors={"ball": "#ff0000"}).split(",")[1]))
    )
    red = (picture[..., 0] > 0.9) & (picture[..., 1] < 0.1)
    widths = np.array([40, 40, 30]) / 110 * red.shape[1]
    for panel in np.split(red, np.cumsum(widths).round().astype(int)[:2], axis=1):
        height, width = (np.ptp(np.flatnonzero(panel.any(axis=axis))) for axis in (1, 0))
        # In the sagittal and coronal slice the contour steps by whole voxels of 4 mm.
        assert width == pytest.approx(22 / 110 * red.shape[1], abs=6)
        assert height == pytest.approx(width, rel=0.2)
    assert picture.shape[1] > DPI * 5


def test_volumes_of_the_shown_cases_are_read(tmp_path: Path) -> None:
    cases = {f"case_{seed}": make_synthetic_case(seed, shape=(30, 24, 18), num_classes=3) for seed in range(2)}
    root = write_msd_dataset(tmp_path, cases)
    labels = {case_id: root / "labelsTr" / f"{case_id}.nii.gz" for case_id in cases}
    images = {"case_0": Case(case_id="case_0", images=(root / "imagesTr" / "case_0.nii.gz",), label=None)}
    (shown,) = read_shown_cases(score(make_cases(1, 2)), images=images, references=labels, predictions=labels)
    np.testing.assert_array_equal(shown.image, cases["case_0"].image.array[0])
    np.testing.assert_array_equal(shown.reference, cases["case_0"].label.array[0])
    assert shown.spacing == pytest.approx((1, 1, 1), rel=1e-5)


def test_curves_are_read_with_their_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(CURVES)
    curves = read_curves(path)
    np.testing.assert_array_equal(curves["val_dice_mean"], [np.nan, 0.4, np.nan, 0.7])
    assert draw_curves(curves, class_colors(list(LABELS))).startswith("data:image/svg+xml;base64,")
    path.write_text(CURVES.splitlines()[0] + "\n")
    assert draw_curves(read_curves(path), {}) == ""
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column `epoch`"):
        read_curves(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_curves(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("count", [1, len(PALETTE), 40])
def test_every_class_has_a_colour_of_its_own(count: int) -> None:
    names = [f"class {n}" for n in range(count)]
    colors = class_colors(names)
    assert list(colors) == names
    assert len(set(colors.values())) == count
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors.values())


def test_volumes_of_different_shapes_are_refused() -> None:
    volume: NDArray[np.float64] = np.zeros((3, 4, 5))
    with pytest.raises(ValueError, match="differ in shape"):
        ReportCase(case_id="a", image=volume, reference=volume[:2], prediction=volume, spacing=SPACING)

import base64
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from dynexit.report.figures import exit_share_figure, pareto_figure
from dynexit.report.page import Figure, Page, PageSection, describe_configuration, write_page
from dynexit.search.operating_points import ReportRow
from tests.report.synthetic_rows import POSITIONS, synthetic_rows

ROWS = synthetic_rows(tradeoffs=(0.1, 1.0), accuracy_weights=(0.5, 0.8, 0.95))
VOID = {"meta", "img", "source"}


class Document(HTMLParser):
    """The page's text, tags and addresses; fails where tags are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def addresses(self):
        return [value for _, attrs in self.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    for theme in ("light", "dark"):
        pareto_figure(ROWS, folder / f"pareto_{theme}.png", theme=theme)
        exit_share_figure(ROWS, folder / f"exits_{theme}.png", theme=theme)
    return [
        Figure(folder / f"{name}_light.png", f"alt {name}", f"caption {name}", folder / f"{name}_dark.png")
        for name in ("pareto", "exits")
    ]


def describe(row: ReportRow) -> str:
    return describe_configuration(row.configuration, POSITIONS, ["linear"]) or row.source


def page(path, pictures, **changes):
    given = {
        "title": "digits",
        "rows": ROWS,
        "figures": pictures,
        "study_text": "backbone:\n  name: resnet",
        "points_table": [{"point": "p1", "ce_ic_tradeoff": 0.1}, {"point": "p2", "state": "failed"}],
        "notes": ["The data are load_digits."],
        "budgets": [
            {"budget": "relative_macs ≤ 0.5", "configuration": "exit after block 2", "test": 0.51, "holds": False},
            {"budget": "accuracy drop ≤ 0.01", "configuration": "exit after block 4", "test": 0.4, "holds": True},
        ],
        "sections": [PageSection("Calibration", "How far to trust it.", [{"exit": 0, "ece": 0.015}])],
        "describe": describe,
        **changes,
    }
    write_page(path, Page(**given))
    return path.read_text(encoding="utf-8")


def test_everything_is_on_the_page_in_order(tmp_path, pictures):
    text = Document(page(tmp_path / "report.html", pictures)).text
    said = ["digits", "of the backbone’s MACs this study reaches", "The front", "caption pareto", "exit after block"]
    said += [
        "Budgets",
        "relative_macs ≤ 0.5",
        "caption exits",
        "Calibration",
        "How far to trust it.",
        "0.015",
    ]
    said += ["Where the numbers come from", "chosen on the validation split", "load_digits", "The 2 trained points"]
    said += ["ce ic tradeoff", "failed", "The resolved study", "backbone:\n  name: resnet"]
    found = re.search(".*?".join(re.escape(part) for part in said), text, re.DOTALL)
    assert found, [part for part in said if part not in text]


def test_nothing_is_fetched(tmp_path, pictures):
    html = page(tmp_path / "report.html", pictures)
    own = re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe", own)
    addresses = Document(html).addresses()
    assert len(addresses) == 4
    embedded = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses]
    wanted = [path.read_bytes() for figure in pictures for path in (figure.dark_path, figure.path)]
    assert embedded == wanted
    assert "default-src 'none'" in html


def test_text_is_text(tmp_path, pictures):
    sly = "<script>alert('&')</script>"
    figure = Figure(pictures[0].path, sly, sly)
    html = page(
        tmp_path / "report.html", pictures, title=sly, study_text=sly, notes=[sly], points_table=[{sly: sly}],
        budgets=[{"budget": sly}], sections=[PageSection(sly, sly, [{"a": sly}], figure)], describe=lambda row: sly,
        figures=[figure],
    )  # fmt: skip
    document = Document(html)
    assert "script" not in {tag for tag, _ in document.tags}
    assert document.text.count(sly) >= 11
    assert [attrs["alt"] for tag, attrs in document.tags if tag == "img"] == [sly, sly]


def test_a_broken_budget_stands_out_and_numbers_are_aligned(tmp_path, pictures):
    html = page(tmp_path / "report.html", pictures)
    assert '<td data-label="holds" class="no">no</td>' in html
    assert '<td data-label="holds">yes</td>' in html
    assert '<td data-label="test" class="number">0.51</td>' in html


def test_a_page_without_anything_is_a_page(tmp_path):
    write_page(tmp_path / "report.html", Page("empty", []))
    document = Document((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "No operating point has both a validation and a test row yet." in document.text
    assert "Budgets" not in document.text
    assert "Downloads" not in document.text
    gates = [row for row in ROWS if row.source == "gates"]
    write_page(tmp_path / "gates.html", Page("gates", gates))
    assert "ce_ic_tradeoff 0.1, seed 0" in Document((tmp_path / "gates.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        ("[[0,0.93],[-1,0.0],[1,0.5]]", "exit after block 2 (linear) above 0.93, after block 7 (mlp3x500) above 0.50"),
        ("[[-1,0.5],[-1,0.0],[-1,0.0]]", "the whole backbone"),
        ("[[0,-1.0],[0,0.5],[1,0.5]]", "everybody leaves after block 2 (linear)"),
        ("[[0,0.9999872446060181],[1,-1.0],[-1,0.0]]",
         "exit after block 2 (linear) above 0.99999, the rest after block 4 (mlp3x500)"),
        ("[[0,0.0],[0,1.0],[0,1e-06]]",
         "exit after block 2 (linear) above 0.00, after block 4 (linear) never, "
         "after block 7 (linear) above 0.000001"),
        ("", ""),
    ],
)  # fmt: skip
def test_configurations_in_words(configuration, words):
    assert describe_configuration(configuration, (2, 4, 7), ("linear", "mlp3x500")) == words
    assert "(" not in describe_configuration(configuration.replace("[1,", "[0,"), (2, 4, 7), ["linear"])


def test_a_configuration_of_other_positions_is_no_configuration_of_these():
    with pytest.raises(ValueError):
        describe_configuration("[[0,0.5]]", (2, 4), ["linear"])


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_opens_it_from_disk_without_a_network(tmp_path, pictures, dark):
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "chromium is not installed"
        pytest.fail(reason) if os.environ.get("DYNEXIT_REQUIRE_ALL") == "1" else pytest.skip(reason)
    page(tmp_path / "report.html", pictures)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --window-size=1000,1400"
    flags += f" --blink-settings=preferredColorScheme={0 if dark else 1} --enable-logging=stderr"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/shot.png"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"file://{tmp_path}/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    assert not re.search(r"CONSOLE.*(error|refused|failed)", done.stderr, re.IGNORECASE)
    from PIL import Image

    with Image.open(tmp_path / "shot.png") as shot:
        colours = shot.convert("RGB")
        paper = colours.getpixel((3, 3))
        assert paper == ((21, 24, 29) if dark else (255, 255, 255))
        # the curve is there, in the search line's own colour for this theme
        line = (255, 138, 76) if dark else (217, 72, 15)
        assert sum(count for count, colour in colours.getcolors(1 << 24) if colour == line) > 300

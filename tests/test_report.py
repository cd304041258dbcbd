"""The HTML report: of one run, of several, of damaged ones; self-contained and well-formed."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from fedgan_lightning import GAN, Evaluation, Federation, SamplePictures, SequentialExecutor
from fedgan_lightning.__main__ import main
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.visuals import charts, pictures
from fedgan_lightning.visuals.report import write_report
from fedgan_lightning.visuals.runs import differing, read_run
from tests.conftest import ROOT, digits_data

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order; collects texts, pictures and what would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts, self.images, self.loaded, self.charts = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self._sources(attributes)
        if tag == "img":
            self.images.append(found["alt"])
        if found.get("role") == "img":
            self.charts.append(found["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._sources(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def _sources(self, attributes):
        self.loaded += [value for key, value in attributes if key in ("src", "href", "xlink:href")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("first", 1), ("<second> & co", 2)):
        gan = GAN(
            MLPGenerator(4, (1, 8, 8), num_classes=10),
            MLPDiscriminator((1, 8, 8), num_classes=10, conditioning="projection"),
        )
        Federation(
            gan,
            digits_data(),
            rounds=3,
            local_steps=steps,
            run_dir=str(folder / name),
            executor=SequentialExecutor(),
            evaluation=Evaluation(num_samples=100, every_n_rounds=1),
            pictures=SamplePictures(every_n_rounds=1),
            trainer={"accelerator": "cpu", "enable_progress_bar": False},
        ).fit()
    return folder


def test_the_page_of_a_run_has_what_happened_and_loads_nothing(runs):
    path = write_report([runs / "first"])
    assert path == runs / "first" / "report.html"
    page = Page(path.read_text())
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.loaded)
    assert page.images == [
        *(f"first, {name}" for name in ("untrained", "round 1", "round 2", "round 3", "real")),
        "first: who holds what",
    ]
    assert {"FID, clients' union", "FID against megabytes sent", "Discriminator loss", "D(x)"} <= set(page.charts)
    summary = json.loads((runs / "first" / "summary.json").read_text())
    assert f"{summary['final']['fid']:.4g}" in page.texts
    assert any(text.startswith("5 clients with") for text in page.texts)


def test_several_runs_are_compared_and_names_are_escaped(runs):
    path = write_report([runs / "first", runs / "<second> & co"])
    assert path == runs / "report.html"
    page = Page(path.read_text())
    assert "<second> & co" in page.texts
    assert "2 federations compared" in page.texts
    assert "status" in page.texts
    assert page.texts.count("finished") == 2, "how each came to its end"
    assert page.charts.count("FID, clients' union") == 1, "one chart for both"


def test_curves_are_read_as_they_were_written(runs):
    run = read_run(runs / "first")
    history = json.loads((runs / "first" / "summary.json").read_text())["history"]
    assert run.metrics["fid"] == ([0, 1, 2, 3], [entry["fid"] for entry in history])
    steps, totals = run.bytes_by_round
    assert steps == [1, 2, 3]
    whole = sum(sum(run.summary[f"bytes_{way}"].values()) for way in ("up", "down"))
    assert totals[-1] == pytest.approx(whole, rel=1e-6)
    assert totals[2] - totals[1] == pytest.approx(totals[1] - totals[0]), "but the first round sends no moments down"
    assert len(run.sizes) == 5
    assert [title for title, _ in run.grids] == ["untrained", "round 1", "round 2", "round 3"]


def test_the_full_evaluation_is_drawn_by_class_and_client_and_compared_once(runs, tmp_path):
    import shutil

    copy = tmp_path / "tested"
    shutil.copytree(runs / "first", copy)
    summary = json.loads((copy / "summary.json").read_text())
    found = {"class_share/3": 0.2, "class_share/3_raw": 0.3, "class_share_of_union/3": 0.1, "client_fid/0": 7.0}
    found |= {"membership_auc/0": 0.52, "membership_auc_of_split/0": 0.5}
    found |= {"class_recognised/3": 0.9, "recall": 0.625, "fid": summary["final"]["fid"]}
    (copy / "summary.json").write_text(json.dumps({**summary, "test": found}))
    page = Page(write_report([copy, runs / "first"], out=tmp_path / "r.html").read_text())
    assert {"Share of each class", "Recognised where asked for", "FID to each client's own data"} <= set(page.charts)
    assert "Membership inference by client, AUC (.5 at best)" in page.charts
    assert "recall (test command)" in page.texts
    assert "fid (test command)" not in page.texts, "it stands there already"
    assert not any("class_share" in text or "3_raw" in text for text in page.texts)


@pytest.mark.parametrize(
    "name, content",
    [("config.yaml", b"model: [broken"), ("config.yaml", b"\xff\xfe"), ("partition.npz", b"PK no archive")],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"as fit wrote them; got .*{name} \(.*move it away"):
        read_run(tmp_path)


def test_the_last_picture_is_the_last_round_s(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    for number in (100, 2000, 9900, 10000, 12000):
        (tmp_path / f"fakes_round{number:04d}.png").touch()
    assert [title for title, _ in read_run(tmp_path).grids][-1] == "round 12000"


def test_dollars_in_names_are_no_formulas(tmp_path):
    counts = np.ones((2, 2), dtype=int)
    assert pictures.partition(counts, class_names=["$5_$10", "up to $5"]).size
    assert "figure" in charts.bars("a $x_$ chart", {"lr$5_$x": {"$1_$": 1.0}}, owner="run")


def test_settings_that_differ_are_named(runs):
    first, second = read_run(runs / "first"), read_run(runs / "first")
    second.config["federation"] = {"local_steps": 7, "clients": {"class_path": "AllClients"}}
    first.config["federation"] = {"local_steps": 5, "clients": {"class_path": "AllClients"}}
    assert differing([first, second]) == {"federation.local_steps": [5, 7]}


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"summary.json; got .*nothing"):
        read_run(tmp_path / "nothing")
    (tmp_path / "summary.json").write_text("{ half")
    with pytest.raises(ConfigurationError, match="JSONDecodeError"):
        read_run(tmp_path)


def test_the_command(runs, tmp_path, capsys):
    assert main(["report", str(runs / "first"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n"
    assert main(["report"]) == 2
    assert "required: RUN" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "Name the directory" in capsys.readouterr().err


def test_a_report_needs_no_torch(runs):
    code = (
        "import sys; from fedgan_lightning.__main__ import main; "
        f"code = main(['report', {str(runs / 'first')!r}]); sys.exit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)

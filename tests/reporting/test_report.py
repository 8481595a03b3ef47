"""The report: what it shows of a whole run, of half a run, and of stages it does not know."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic

from pipelines.errors import UserError
from pipelines.reporting.notes import notes
from pipelines.reporting.report import duration, main, write_report
from pipelines.reporting.run import read_run
from pipelines.reporting.sections.examples import COUNT
from pipelines.reporting.sections.ppo import over_optimisation, rollouts

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The page's elements, checked for being closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_nothing_else(text: str) -> None:
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "img", "object", "embed"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", text, flags=re.DOTALL).group(1)
    assert "@import" not in style
    assert "url(" not in style
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert anchors <= set(ids)


def test_everything_of_a_run_is_there(text: str) -> None:
    for wanted in (
        "genalign run demo",
        "8 of 8",
        "Results",
        "26.4",
        "25.5–27.3",
        "num beams 4",
        "Win rate against SFT",
        "Reward against KL",
        "Calibration",
        "Learning curves",
        "Summaries side by side",
        "trl</b> 1.16.0",
        "seed 7",
        "learning_rate",
        "52.4 % (48.1–56.7)",
    ):
        assert wanted in text, wanted


def test_every_figure_has_axes_and_a_caption(text: str) -> None:
    found = re.findall(r"<figure>(.*?)</figure>", text, flags=re.DOTALL)
    assert len(found) >= 12
    for figure in found:
        caption = re.search(r"<figcaption>(.+?)</figcaption>", figure).group(1)
        assert caption.strip().endswith(".")
        labels = re.findall(r"<text[^>]*>([^<]*)</text>", figure)
        assert any(re.search(r"[a-z]{3}", label) for label in labels)


def test_model_texts_are_escaped(text: str) -> None:
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; the &lt;b&gt;bold" in text
    assert "value | of {{ 7 * 7 }}." in text


def test_the_same_files_give_the_same_bytes(run: Path, text: str) -> None:
    assert write_report(run).read_text(encoding="utf-8") == text
    assert sorted(os.listdir(run)) == sorted([*synthetic.RECIPES, "metrics.json", "report.html", "run.json"])


def test_the_examples_are_drawn_with_the_seed(run: Path, text: str) -> None:
    drawn = sorted(random.Random(7).sample(range(60), COUNT))
    shown = [
        int(n) for n in re.findall(r"<summary>pandas\.core\.reshape\.concat\.concatenate_block_(\d+)</summary>", text)
    ]
    assert shown == drawn


def test_the_corpus_is_a_row_for_each_split(text: str) -> None:
    row = re.search(r'<tr><th scope="row">train</th>(.*?)</tr>', text).group(1)
    assert row == "<td>16\u202f213</td><td>61.2<small>median 50, p95 160, largest 256</small></td>"
    assert "<summary>40 packages</summary>" in text
    assert re.search(r'<th scope="row">leaked share</th><td>0.0021</td>', text)


def test_paired_differences(text: str) -> None:
    row = '<th scope="row">SFT above Lead-1 (first sentence), ROUGE-1</th><td>+6.1 (+5.3 to +6.9)</td>'
    assert row in text
    assert "PPO above SFT, ROUGE-1" in text


def test_another_reference_system(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    synthetic.write_stage(folder, "evaluate", {}, config={"reference_system": "dpo"})
    assert "Win rate against DPO" in write_report(folder).read_text(encoding="utf-8")


def test_rollouts_and_the_verdict_on_them(run: Path, tmp_path: Path) -> None:
    stage = read_run(run).of_kind("ppo")[0]
    number, kl = rollouts(stage, "objective/kl")
    assert number == list(range(1, 151))
    assert kl == [entry["objective/kl"] for entry in json.loads((run / "ppo" / "log_history.json").read_text())]
    assert over_optimisation(stage).endswith("over-optimised.")
    rising = [{"objective/kl": 1.0, "objective/proxy_reward": n, "objective/gold": n} for n in range(20)]
    synthetic.write_stage(tmp_path, "ppo", {})
    synthetic.write(tmp_path / "ppo" / "log_history.json", rising)
    verdict = over_optimisation(read_run(tmp_path).stages[0])
    # First and last fifth: means of 0..3 and of 16..19.
    assert "moved by +16.00 and gold by +16.00." in verdict


def test_notes_say_what_must_be_known(run: Path) -> None:
    found = "\n".join(notes(read_run(run)))
    assert "DPO against SFT is undecided: win rate 52.4 % (48.1–56.7)." in found
    assert "PPO against SFT" not in found  # its interval lies above one half
    assert "DPO is 11.9 nats a sequence away from SFT" in found
    assert "sft: 7.3 % of sources cut, under 0.1 % of targets cut." in found
    assert "over-optimised" in found
    assert "SFT is not shown to be better than the baseline The name in words" in found
    assert "baseline Lead-1" not in found
    assert "not complete" not in found


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "run.json", {"name": "young", "stages": ["corpus", "sft", "ppo"]})
    synthetic.write_stage(tmp_path, "corpus", {"corpus/train": 10})
    synthetic.write_stage(tmp_path, ".sft.partial", {}, state="interrupted", recipe="summarization/sft")
    history = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.5}]
    synthetic.write(tmp_path / ".sft.partial" / "log_history.json", history)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    Page(text)
    assert "1 of 3" in text
    assert "The run is not complete: sft (interrupted), ppo (not started)." in text
    assert 'id="curves"' in text
    assert 'id="results"' not in text
    assert 'id="ppo"' not in text


def test_a_run_folder_without_notes_of_the_runner(tmp_path: Path) -> None:
    synthetic.write_stage(tmp_path, "corpus", {"corpus/train": 10})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert tmp_path.name in text
    assert "1 of 1" in text


def test_stages_of_other_names_and_unknown_kinds(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "ppo").rename(folder / "ppo_seed1")
    shutil.copytree(folder / "ppo_seed1", folder / "ppo_seed2")
    history = [{"step": n, "fid": 30.0 - n, "note": "x", "flag": True} for n in range(12)]
    synthetic.write_stage(folder, "flow", {"flow/fid": 18.0}, recipe="elsewhere/flow")
    synthetic.write(folder / "flow" / "log_history.json", history)
    names = ["corpus", "tokenizer", "sft", "preferences", "reward", "ppo_seed1", "ppo_seed2", "dpo", "evaluate", "flow"]
    synthetic.write(folder / "run.json", {"name": "two seeds", "stages": names})
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert text.count("<h3>ppo_seed") == 2
    assert "ppo_seed2: from the first to the last fifth" in text
    section = re.search(r'<section id="stage-flow">(.*?)</section>', text, flags=re.DOTALL).group(1)
    assert "flow/fid" in section
    assert section.count("<figure>") == 1


def test_settings_that_differ_stand_in_a_table(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    settings = {"sft": {"num_beams": 4}, "ppo": {"num_beams": 1, "top_p": 0.9}, "max_new_tokens": 48}
    synthetic.write(folder / "evaluate" / "settings.json", settings)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "max new tokens 48" in text
    assert re.search(r"<th scope=\"row\">PPO</th><td>1</td><td>0.9</td>", text)


def test_a_full_disk_leaves_the_old_report(run: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(run)
    assert (run / "report.html").read_text(encoding="utf-8") == text
    assert not [name for name in os.listdir(run) if name.startswith(".")]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.json", '{"a": NaN}', "not a finite number"),
        ("run.json", "[", "not valid JSON"),
        ("sft/stage.json", "[]", "not a JSON object"),
        ("evaluate/predictions.jsonl", '{"id": 1, "outputs": {}}\n{"id"', "predictions.jsonl line 2"),
    ],
)
def test_damaged_files_are_one_line(
    run: Path, tmp_path: Path, file: str, content: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "report.html").unlink(missing_ok=True)
    (folder / file).write_text(content)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "none")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, ""),
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.9, "1 min 00 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown

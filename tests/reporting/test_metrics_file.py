"""metrics.json, tables and the README's block."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.reporting import readme
from pipelines.reporting.metrics import (
    estimate,
    format_interval,
    format_mean,
    merge_metrics,
    read_metrics,
    write_metrics,
    write_text,
)
from pipelines.reporting.run import read_run
from pipelines.reporting.tables import (
    Cell,
    Table,
    html_table,
    markdown_table,
    metrics_table,
    results_table,
    show,
    systems_in,
)


def test_metrics_are_written_sorted_and_read_back(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.json", {"b/x": 2.5, "a/x": 1})
    assert path.read_text() == '{\n  "a/x": 1,\n  "b/x": 2.5\n}\n'
    assert read_metrics(path) == {"a/x": 1, "b/x": 2.5}


@given(st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False) | st.integers()))
def test_any_finite_metrics_survive_the_file(tmp_path_factory: pytest.TempPathFactory, metrics: dict) -> None:
    path = tmp_path_factory.mktemp("m") / "metrics.json"
    assert read_metrics(write_metrics(path, metrics)) == metrics


def test_merging_puts_the_new_over_the_old(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    assert merge_metrics(path, {"a/x": 1.0}) == {"a/x": 1.0}
    assert merge_metrics(path, {"a/x": 2.0, "b/x": 3.0}) == {"a/x": 2.0, "b/x": 3.0}
    assert read_metrics(path) == {"a/x": 2.0, "b/x": 3.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", None, True, [1.0]])
def test_what_is_no_finite_number_is_refused_and_nothing_changes(tmp_path: Path, bad: object) -> None:
    path = write_metrics(tmp_path / "metrics.json", {"a/x": 1.0})
    before = path.read_bytes()
    with pytest.raises(UserError, match="b/x"):
        merge_metrics(path, {"b/x": bad})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "not valid JSON"), (b"[1]", "not a JSON object"), (b'{"a": NaN}', "not a finite"), (b"\xff", "not UTF-8")],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_metrics(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "none.json")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_text(path, "old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_written_file_has_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "page", "x")
    assert (tmp_path / "page").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_means_in_words() -> None:
    metrics = synthetic.mean("sft/rouge1", 24.06, 0.9) | synthetic.mean("ppo/gold_win_rate", 0.5634, 0.04)
    metrics |= synthetic.mean("ppo/proxy", -0.121, 0.2) | {"ppo/kl": 3.456, "x/steps": 1200, "x/thing": 0.123456}
    assert format_mean(metrics, "sft/rouge1") == "24.1 (23.2–25.0)"
    assert format_mean(metrics, "ppo/gold_win_rate") == "56.3 % (52.3–60.3)"
    assert format_mean(metrics, "ppo/proxy") == "−0.12 (−0.32 to +0.08)"
    assert format_mean(metrics, "ppo/kl") == "3.46"
    assert format_mean(metrics, "x/steps") == "1,200"
    assert format_mean(metrics, "x/thing") == "0.1235"
    assert format_mean(metrics, "nothing/here") == "–"
    assert format_interval(metrics, "ppo/kl") == ""
    assert estimate(metrics, "nothing/here") is None


def test_minus_zero_is_zero() -> None:
    assert format_mean({"x/kl": -0.001}, "x/kl") == "0.00"


def test_the_order_of_systems() -> None:
    metrics = dict.fromkeys(
        ["ppo_seed1/gold", "sft/rouge1", "lead1/rouge1", "zebra/rouge1", "dpo/gold_win_rate", "reward/accuracy"], 1.0
    )
    assert systems_in(metrics) == ["lead1", "sft", "dpo", "ppo_seed1", "zebra"]
    assert systems_in(metrics, ["sft", "ppo_seed1", "dpo"]) == ["lead1", "sft", "ppo_seed1", "dpo", "zebra"]


def test_the_results_table_has_what_was_measured_and_no_more() -> None:
    table = results_table(synthetic.mean("sft/rouge1", 26.0, 1) | {"lead1/rouge1": 20.0, "ppo/kl": 2.0})
    assert table.columns == ["System", "ROUGE-1"]
    assert table.rows[1] == [Cell("SFT"), Cell("26.0", "25.0–27.0")]
    assert results_table({"reward/accuracy": 0.6}) is None


def test_tables_make_markup_harmless() -> None:
    table = Table(["a|b", "<c>"], [[Cell("<script>", "& |"), "x\ny"]])
    html = html_table(table)
    assert "<script>" not in html
    assert "&lt;script&gt;<small>&amp; |</small>" in html
    lines = markdown_table(table).splitlines()
    assert lines[0] == "| a\\|b | &lt;c&gt; |"
    assert lines[2] == "| &lt;script&gt; (&amp; \\|) | x y |"
    assert len(lines) == 3


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="columns"):
        Table(["a", "b"], [["x"]])


def test_every_metric_is_listed_once() -> None:
    metrics = synthetic.evaluation()
    rows = [row[0] for row in metrics_table(metrics).rows]
    assert rows == sorted(k for k in metrics if "_ci_" not in k)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        ("", "–"),
        (True, "yes"),
        (1e-4, "0.0001"),
        (0.30000000000000004, "0.3"),
        (12, "12"),
        (16213, "16\u202f213"),
        ([1, None], "1, –"),
        ({"a": False}, "a: no"),
    ],
)
def test_values_as_one_reads_them(value: object, shown: str) -> None:
    assert show(value) == shown


README = f"# Title\n\nbefore\n{readme.BEGIN}\nformer table\n{readme.END}\nafter\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    write_metrics(tmp_path / "demo.json", synthetic.evaluation() | synthetic.mean("reward/accuracy", 0.613, 0.02))
    (tmp_path / "README.md").write_text(README)
    return str(tmp_path / "demo.json"), str(tmp_path / "README.md")


def test_the_readme_is_rewritten_between_its_marks(files: tuple[str, str]) -> None:
    assert readme.main([*files, "--check"]) == 1
    assert Path(files[1]).read_text() == README
    assert readme.main([*files]) == 0
    text = Path(files[1]).read_text()
    assert text.startswith("# Title\n\nbefore\n<!-- results:begin -->\n\n| System | ROUGE-1 |")
    assert text.endswith("<!-- results:end -->\nafter\n")
    assert "| PPO | 27.3 (26.4–28.2) |" in text
    assert "61.3 % (59.3–63.3)" in text
    assert "former table" not in text
    assert readme.main([*files, "--check"]) == 0
    changed = json.loads(Path(files[0]).read_text()) | {"ppo/rouge1": 99.0}
    write_metrics(files[0], changed)
    assert readme.main([*files, "--check"]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "stands 0 times"),
        (README + readme.BEGIN, "stands 2 times"),
        (f"{readme.END}\n{readme.BEGIN}", "stands before"),
    ],
)
def test_wrong_marks(files: tuple[str, str], text: str, said: str, capsys: pytest.CaptureFixture) -> None:
    Path(files[1]).write_text(text)
    assert readme.main([*files]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert Path(files[1]).read_text() == text


def test_metrics_without_results_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "README.md").write_text(README)
    write_metrics(tmp_path / "m.json", {"reward/accuracy": 0.6})
    assert readme.main([str(tmp_path / "m.json"), str(tmp_path / "README.md")]) == 2
    assert readme.main([str(tmp_path / "m.json"), str(tmp_path / "none.md")]) == 2
    assert readme.main([str(tmp_path / "none.json"), str(tmp_path / "README.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_settings_and_times_of_a_run_stand_under_the_table(
    tmp_path: Path, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    for stage, seconds in (("sft", 120.0), ("evaluate", 60.0)):
        record = {"stage": stage, "recipe": stage, "state": "finished", "fingerprint": "0", "duration_seconds": seconds}
        (run_dir / stage).mkdir(parents=True)
        (run_dir / stage / "stage.json").write_text(json.dumps(record))
    settings = {"sft": {"num_beams": 1}, "ppo": {"num_beams": 1}, "dpo": {"num_beams": 4}}
    (run_dir / "evaluate" / "settings.json").write_text(json.dumps(settings))
    (run_dir / "run.json").write_text(json.dumps({"name": "demo", "stages": ["sft", "evaluate"]}))
    (run_dir / "metrics.json").write_text(Path(files[0]).read_text())
    (tmp_path / "stamp").write_text("90\n")
    facts = readme.facts_of([read_run(run_dir)], tmp_path / "stamp")
    assert facts["seconds"] == {"installation": 90.0, "sft": 120.0, "evaluate": 60.0}
    assert readme.facts_lines(facts)[:2] == [
        "Generation of sft, ppo: num_beams 1.\n",
        "Generation of dpo: num_beams 4.\n",
    ]
    assert "4.5 in all; installation 1.5, sft 2.0, evaluate 1.0." in readme.facts_lines(facts)[2]
    assert readme.main([*files, "--run", str(run_dir)]) == 0
    assert "3.0 in all; sft 2.0, evaluate 1.0." in Path(files[1]).read_text()
    assert readme.main([*files, "--check"]) == 0

"""What is kept of finished runs for the documents, and the blocks that are made of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import synthetic
from kept_blocks import block, cells, document

from pipelines.problems.exercise import Answer, ExerciseConfig
from pipelines.reporting import readme
from pipelines.reporting.pictures import LARGEST

UNNAMED = {"README.md": "demo", "docs/pretraining.md": "scratch_vs_finetuned"}
"""The documents with one block that goes without a name, and the file that it is made of."""


def test_every_documents_results_are_those_of_its_file(root: Path) -> None:
    found = []
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        relative = str(path.relative_to(root))
        for name in re.findall(r"^<!-- results:begin ?(\w*) -->$", path.read_text(encoding="utf-8"), flags=re.M):
            name = name or UNNAMED[relative]
            found.append(name)
            assert readme.main([str(root / "docs" / "results" / f"{name}.json"), str(path), "--check"]) == 0, relative
    drawn = {path.parent.name for path in (root / "docs" / "results").rglob("*.png")}
    assert drawn <= set(found)
    kept = [path.name.removesuffix("_run.json") for path in (root / "docs" / "results").glob("*_run.json")]
    assert sorted(found) == sorted(kept)  # each stands somewhere, and once


def test_every_kept_picture_is_small_and_stands_in_a_document(root: Path) -> None:
    shown = []
    for path in sorted((root / "docs").glob("*.md")):
        for alt, target in re.findall(r"!\[([^\]]*)\]\((results/[^)]+)\)", path.read_text(encoding="utf-8")):
            assert len(alt) > 10, target
            assert (path.parent / target).stat().st_size <= LARGEST, target
            shown.append((path.parent / target).resolve())
    assert sorted(shown) == sorted(path.resolve() for path in (root / "docs" / "results").rglob("*.png"))


def test_one_document_holds_the_results_of_several_runs(tmp_path: Path) -> None:
    page = document(tmp_path, "words", "summaries")
    words, summaries = (str(tmp_path / f"{name}.json") for name in ("words", "summaries"))
    run = synthetic.write_comparison(tmp_path / "a")
    assert readme.main([words, str(page), "--run", str(run)]) == 0
    assert block(page, "summaries") == "\nold\n"
    first = block(page, "words")
    run = synthetic.write_comparison(tmp_path / "b", metric="rouge1")
    assert readme.main([summaries, str(page), "--run", str(run)]) == 0
    assert block(page, "words") == first
    assert "ROUGE-1" in block(page, "summaries")
    for file in (words, summaries):
        assert readme.main([file, str(page), "--check"]) == 0
    page.write_text(page.read_text().replace("| 18.", "| 19.").replace("| 20.", "| 21."))
    for file in (words, summaries):
        assert readme.main([file, str(page), "--check"]) == 1


def test_a_comparison_of_prompts(tmp_path: Path) -> None:
    run, page = synthetic.write_comparison(tmp_path / "run"), document(tmp_path)
    file = tmp_path / "prompting.json"
    assert readme.main([str(file), str(page), "--run", str(run)]) == 0
    assert json.loads(file.read_text()) == json.loads((run / "compare" / "comparison.json").read_text())
    text = page.read_text()
    assert cells(text, "few shot 9 (the best)")[2:4] == ["9", "50.0 (45.0–55.0)"]
    assert cells(text, "full")[1:] == [
        "1,062,528",
        "852",
        "90.0 (81.0–99.0)",
        "+40.0 (+34.0 to +46.0)",
        "88.2, 90.0, 91.8",
    ]
    assert "All on the same 1,315 held-out examples." in text
    assert "resample seeds and examples" in text
    assert "2.0 in all; full 1.5, compare 0.5." in text
    assert "installation" not in text


def demo(folder: Path, seed: int) -> Path:
    """A run of the whole chain with a seed of its own, its models read from its own folder."""
    run = synthetic.write_run(folder, examples=4, hostile=False)
    for name, model in (("sft", None), ("reward", "sft"), ("evaluate", "dpo")):
        path = run / name / "stage.json"
        record = json.loads(path.read_text())
        record["config"] |= {"seed": seed, "model": model and str(run / model)}
        path.write_text(json.dumps(record | {"seed": seed, "fingerprint": f"{seed}" * 64}))
    return run


def test_summaries_of_several_seeds(tmp_path: Path) -> None:
    runs = [demo(tmp_path / f"s{seed}", seed) for seed in (0, 1)]
    better = json.loads((runs[1] / "metrics.json").read_text())
    better |= {"ppo/gold_win_rate": 0.61, "ppo/gold_win_rate_ci_low": 0.58, "ppo/gold_win_rate_ci_high": 0.64}
    (runs[1] / "metrics.json").write_text(json.dumps(better))
    file, page = tmp_path / "demo_seeds.json", document(tmp_path, "demo_seeds")
    words = [word for run in runs for word in ("--run", str(run))]
    assert readme.main([str(file), str(page), *words]) == 0
    text = block(page, "demo_seeds")
    rows = [line for line in text.splitlines() if line.startswith("| ") and ", seed " in line]
    assert [row.split("|")[1].strip() for row in rows] == [
        f"{system}, seed {seed}" for system in ("SFT", "PPO", "DPO") for seed in (0, 1)
    ]
    assert cells(text, "PPO, seed 1")[4] == "61.0 (58.0–64.0)"
    assert cells(text, "PPO, seed 0")[4] != cells(text, "PPO, seed 1")[4]
    assert "seed by seed: 61.3 % (59.5–63.1), 61.3 % (59.5–63.1)." in text
    assert readme.main([str(file), str(page), "--check"]) == 0
    other = json.loads((runs[1] / "reward" / "stage.json").read_text())
    other["config"]["model"] = str(tmp_path / "elsewhere")
    (runs[1] / "reward" / "stage.json").write_text(json.dumps(other))
    assert readme.main([str(file), str(page), *words]) == 2


def test_seeds_of_summaries_are_added_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [demo(tmp_path / f"s{seed}", seed) for seed in range(4)]
    found = []
    for name, groups in (("together", (runs[:3],)), ("added", (runs[:2], runs[2:3]))):
        (tmp_path / name).mkdir()
        file, page = tmp_path / name / "demo_seeds.json", document(tmp_path / name, "demo_seeds")
        for number, group in enumerate(groups):
            words = [word for run in group for word in ("--run", str(run))]
            assert readme.main([str(file), str(page), *words, *["--add"] * number]) == 0
        found.append(
            (file.read_text(), page.read_text(), json.loads(file.with_name("demo_seeds_run.json").read_text()))
        )
    assert found[0] == found[1]
    assert found[0][2]["runs"] == 3
    settings = json.loads((runs[3] / "evaluate" / "settings.json").read_text())
    settings["sft"]["num_beams"] = 8
    (runs[3] / "evaluate" / "settings.json").write_text(json.dumps(settings))
    assert readme.main([str(file), str(page), "--add", "--run", str(runs[3])]) == 2
    error = capsys.readouterr().err
    assert "has generation " in error
    assert error.endswith("give runs that differ in the seed alone\n")
    assert file.read_text() == found[1][0]


def test_an_older_file_of_summaries_says_that_no_field_was_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = [demo(tmp_path / f"s{seed}", seed) for seed in range(3)]
    file, page = tmp_path / "demo_seeds.json", document(tmp_path, "demo_seeds")
    assert readme.main([str(file), str(page), "--run", str(runs[0]), "--run", str(runs[1])]) == 0
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"runs": content["runs"]}))
    capsys.readouterr()
    assert readme.main([str(file), str(page), "--add", "--run", str(runs[2])]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "keeps no fields of the stages of seed 0, 1; those could not be compared" in error


def exercise(folder: Path, seeds: int, found: float = 1.0) -> Path:
    folder.mkdir()
    answer = Answer(ExerciseConfig(output_dir=str(folder)), "zeroth_order", "0th order")
    answer.value(train_images=60000, test_images=10000, seeds=seeds, none_accuracy=0.9)
    answer.table("methods", ["trained by", "accuracy"], [["supervised", "0.978 (0.973–0.983)"]], "Medians.")
    answer.table("scatter", ["step", "variance"], [[0, 1.0]])
    answer.check("one is one", found, 1.0, 0.0, "by hand")
    metrics = answer.write() | synthetic.mean("zeroth_order/none_accuracy", 0.9, 0.02)
    synthetic.write_stage(folder.parent, folder.name, metrics, recipe="problems/zeroth_order", duration_seconds=120.0)
    return folder


def test_an_exercise_that_was_run_by_itself(tmp_path: Path) -> None:
    folder, page = exercise(tmp_path / "out", 3), document(tmp_path, "zeroth_order")
    file = tmp_path / "zeroth_order.json"
    assert readme.main([str(file), str(page), "--run", str(folder)]) == 0
    assert json.loads(file.read_text())["metrics"]["zeroth_order/none_accuracy_ci_low"] == pytest.approx(0.88)
    text = block(page, "zeroth_order")
    assert cells(text, "supervised") == ["supervised", "0.978 (0.973–0.983)"]
    assert "variance" not in text  # not one of its headlines
    assert "60,000 training images, 10,000 test images, 3 seeds. In brackets: Student's 95 % intervals" in text
    assert "All 1 checks hold." in text
    assert text.rstrip().endswith("): 2.0.")
    assert readme.main([str(file), str(page), "--check"]) == 0


def test_one_seed_of_an_exercise_and_a_check_that_fails_are_told(tmp_path: Path) -> None:
    folder, page = exercise(tmp_path / "out", 1, found=2.0), document(tmp_path, "zeroth_order")
    assert readme.main([str(tmp_path / "zeroth_order.json"), str(page), "--run", str(folder)]) == 0
    text = block(page, "zeroth_order")
    assert "With one seed how much another would change is not known." in text
    assert "1 of 1 checked statements do not hold." in text


def two_comparisons(folder: Path) -> list[Path]:
    run = synthetic.write_comparison(folder / "run")
    shutil.copytree(run / "compare", run / "again")
    synthetic.write(run / "run.json", {"name": "x", "stages": ["full", "compare", "again"]})
    return [run]


def unmeasured(folder: Path) -> list[Path]:
    runs = [synthetic.write_images(folder / f"s{seed}", seed) for seed in range(2)]
    shutil.rmtree(runs[1] / "measure")
    return runs


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda at: [synthetic.write_images(at / name, 0) for name in "ab"], "b: is another run of the seed 0, which"),
        (lambda at: [synthetic.write_images(at / f"s{n}", n, 100 * n + 100) for n in (0, 1)], "vae.max_steps is 200"),
        (
            lambda at: [synthetic.write_images(at / f"s{n}", n, classifier_seed=n) for n in (0, 1)],
            "classifier.seed is 1 in it, not 0; give classifier.seed=0",
        ),
        (unmeasured, "s1: has measured no image models"),
        (lambda at: [synthetic.write_comparison(at / name) for name in "ab"], "a: has measured no summaries"),
        (lambda at: [synthetic.write_images(at / "a", 0), demo(at / "b", 1)], "b: has measured no image models"),
        (two_comparisons, "holds compare and again, two of a kind"),
        (lambda at: [at / "none"], "no such folder"),
    ],
)
def test_what_makes_no_table_is_one_line(made, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = document(tmp_path, "x")
    before = page.read_text()
    words = [word for run in made(tmp_path) for word in ("--run", str(run))]
    assert readme.main([str(tmp_path / "x.json"), str(page), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert page.read_text() == before
    assert not list(tmp_path.glob("*.json"))


def test_a_document_without_the_marks_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page, run = document(tmp_path, "other"), synthetic.write_comparison(tmp_path / "run")
    assert readme.main([str(tmp_path / "words.json"), str(page), "--run", str(run)]) == 2
    assert "<!-- results:begin words -->" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))

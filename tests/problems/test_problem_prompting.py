"""The prompting exercise on real stages of a tiny random model: counts, page, refusals."""

import json

import pytest
import yaml

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems.prompting import PromptingConfig
from pipelines.runner import Chain, run
from tests.problems.pages import assert_page_is_filled
from tests.prompting.tiny_causal import save, tiny_causal, tiny_tokenizer

NOUNS = "cat dog box city child wolf lens hat cup key tree house man woman foot bus table chair fox lamp".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run of every stage that the exercise reads, and of itself."""
    home = tmp_path_factory.mktemp("prompting")
    (home / "nouns.csv").write_text("word\n" + "\n".join(NOUNS * 2) + "\n")
    tokenizer = tiny_tokenizer()
    model = save(home / "model", tiny_causal("llama", len(tokenizer), positions=400), tokenizer)
    defaults = {"task": "words", "dataset": str(home / "nouns.csv"), "test_fraction": 0.4, "model": str(model)}
    defaults |= {"models": {"tiny": str(model)}, "precision": "fp32", "report_to": "none", "max_examples": None}
    defaults |= {"max_new_tokens": 3, "resamples": 100}
    shots = {"few_shot_1": {"like": "few_shot", "shots": 1}, "few_shot_5": {"like": "few_shot", "shots": 5}}
    wrong = {"few_shot_wrong_labels_5": {"like": "few_shot_wrong_labels", "shots": 5}}
    soft = {
        "recipe": "prompting/soft",
        "virtual_tokens": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "batch_size": 4,
        "repeats": 1,
    }
    one = {"few_shot": {"shots": 1}}
    sweep = {"strategies": one, "temperatures": [0.0, 2.0], "samples": 2, "digits_prompt": "", "views": 1}
    stages = {
        "hard": {"recipe": "prompting/hard", "strategies": shots | wrong},
        "explore": {"recipe": "prompting/explore"} | sweep,
        "learnt": soft,
        "compare": {"recipe": "prompting/compare", "hard": ["${hard}"], "learnt": {"soft": "${learnt}"}},
        "prompting": {
            "recipe": "problems/prompting", "hard": "${hard}", "explore": "${explore}", "compare": "${compare}",
        },
    }  # fmt: skip
    (home / "chain.yaml").write_text(
        yaml.safe_dump({"name": "tiny", "defaults": defaults, "stages": stages}, sort_keys=False)
    )
    run(Chain.load(home / "chain.yaml"), home / "run", [])
    return home / "run"


def test_the_page_and_its_counts(folder):
    assert_page_is_filled(folder / "prompting")
    values = json.loads((folder / "prompting" / "exercise.json").read_text())["values"]
    lines = [json.loads(line) for line in (folder / "hard" / "answers.jsonl").read_text().splitlines()]
    mine = [line["kind"] == "right" for line in lines if line["strategy"] == "few_shot_5"]
    assert values["asked"] == len(mine) > 5
    assert values["right_accuracy"] == sum(mine) / len(mine)
    wrong = [line["kind"] == "right" for line in lines if line["strategy"] == "few_shot_wrong_labels_5"]
    assert values["label_effect"] == pytest.approx(100 * (sum(wrong) - sum(mine)) / len(mine))
    assert "confidence in its answer" in (folder / "prompting" / "figures" / "confidence.svg").read_text()
    assert "Prompting" in (folder / "report.html").read_text()


def test_strategies_that_were_not_asked_are_refused(folder):
    from pipelines.problems.prompting import prompting

    given = {name: str(folder / name) for name in ("hard", "explore", "compare")}
    with pytest.raises(UserError, match="did you mean 'few_shot_5'"):
        prompting(validate(PromptingConfig, given | {"right": "few_shot_6", "output_dir": str(folder / "none")}))
    with pytest.raises(UserError, match=r"holds the result of prompting\.hard"):
        validate(PromptingConfig, given | {"explore": str(folder / "hard")})

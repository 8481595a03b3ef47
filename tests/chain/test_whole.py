"""A finished chain: its metrics are documented, its models are plain ones."""

import json
import re
import shutil

from tests.chain.conftest import CHAIN


def documented(root) -> list[re.Pattern]:
    """The keys that docs/metrics.md explains, a star standing for a system's or measure's name."""
    text = (root / "docs" / "metrics.md").read_text()
    cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    keys = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    return [re.compile(re.escape(key).replace(r"\*", r"[a-z0-9_]+")) for key in keys]


def test_every_metric_is_documented(uninterrupted, root):
    patterns = documented(root)
    assert len(patterns) > 50
    for key in json.loads((uninterrupted / "metrics.json").read_text()):
        plain = key.removesuffix("_ci_low").removesuffix("_ci_high")
        assert any(pattern.fullmatch(plain) for pattern in patterns), f"docs/metrics.md does not explain {plain}"


def test_every_mean_of_a_system_has_an_interval(uninterrupted):
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    for key, value in metrics.items():
        if key.split("/")[0] in ("sft", "ppo", "dpo", "lead1") and re.search(r"rouge|gold|proxy|/kl$|win_rate", key):
            if key.endswith(("_low", "_high")) or "train" in key:
                continue
            assert metrics[f"{key}_ci_low"] <= value <= metrics[f"{key}_ci_high"], key


def test_the_report_shows_what_ppo_wrote(uninterrupted):
    report = (uninterrupted / "report.html").read_text()
    lines = [json.loads(line) for line in (uninterrupted / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert "Samples of the first and the last rollout" in report
    for line in (lines[0], lines[-1]):
        assert line["document"] in report
        assert line["text"] in report


def test_aligned_models_are_plain_ones(uninterrupted):
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    for stage in ("sft", "ppo", "dpo"):
        model, loading = T5ForConditionalGeneration.from_pretrained(uninterrupted / stage, output_loading_info=True)
        assert not loading["missing_keys"], stage
        assert not loading["unexpected_keys"], stage
        assert model.config.architectures == ["T5ForConditionalGeneration"]
        assert len(AutoTokenizer.from_pretrained(uninterrupted / stage)) <= model.config.vocab_size


def test_own_preferences_train_a_reward_model(genalign, uninterrupted, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for n in range(40):
            row = {"prompt": f"oak elm {n} pine birch", "chosen": f"oak elm {n}", "rejected": "pine pine pine"}
            file.write(json.dumps(row) + "\n")
    out = tmp_path / "run"
    code, printed = genalign.run(
        "run",
        str(CHAIN),
        "--output_dir",
        str(out),
        "--until",
        "reward",
        f"preferences.preferences_file={pairs}",
        f"dataset={uninterrupted / 'corpus'}",
        "text_column=document",
        "summary_column=summary",
        "reward.max_steps=40",
        "reward.learning_rate=0.003",
    )
    assert code == 0, printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["preferences/train_pairs"] == 32
    assert metrics["reward/train_accuracy"] > 0.9


def test_the_other_methods_run_on_what_a_demo_left(genalign, uninterrupted, root, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "runs" / "demo")
    small = "max_source_length=40 max_target_length=12 precision=fp32 batch_size=8 logging_steps=2 save_steps=4 "
    small += "rollouts=2 sources_per_rollout=8 samples_per_source=2 mini_batch_size=8 listwise.max_steps=4 "
    small += "best_of_n.samples=4 evaluate.resamples=200 known_optimum.preference_steps=2 known_optimum.samples=8"
    code, _, errors = genalign.answer("run", "methods", *small.split(), cwd=tmp_path)
    assert code == 0, errors
    metrics = json.loads((tmp_path / "runs" / "methods" / "metrics.json").read_text())
    patterns = documented(root)
    for key in metrics:
        plain = key.removesuffix("_ci_low").removesuffix("_ci_high")
        assert any(pattern.fullmatch(plain) for pattern in patterns), f"docs/metrics.md does not explain {plain}"
    assert {f"{name}/gold_win_rate" for name in ("ppo", "dpo", "listwise", "grpo", "rloo")} <= set(metrics)
    report = (tmp_path / "runs" / "methods" / "report.html").read_text()
    assert "Best of n" in report
    assert "The known optimum" in report

"""Hard prompts through their real entry points: against brute force, killed, shared out, failing, wrongly called."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.prompting.backends_local import load_local
from pipelines.prompting.hard import HardConfig, hard
from pipelines.prompting.tasks_words import plural
from pipelines.seq2seq.metrics import wilson_interval
from pipelines.stage import execute
from tests.chain.test_whole import documented
from tests.prompting.conftest import KEY, KEY_NAME
from tests.prompting.faulty_proxy import FaultyProxy
from tests.prompting.tiny_causal import save, tiny_causal, tiny_tokenizer

SHARES = {"train": 0.5, "test": 0.4}


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    return save(
        tmp_path_factory.mktemp("other") / "m", tiny_causal("gpt2", len(tokenizer), 5, positions=400), tokenizer
    )


@pytest.fixture(scope="module")
def asked(tiny_folder, other_folder, questions_file, tmp_path_factory) -> tuple[Path, dict, HardConfig]:
    """A finished stage of two models on questions."""
    out = tmp_path_factory.mktemp("hard") / "hard"
    config = validate(
        HardConfig,
        {
            "models": {"small": str(tiny_folder), "other": str(other_folder)},
            "task": "multiple_choice",
            "dataset": str(questions_file),
            "test_fraction": 0.4,
            "strategies": {"simple_qa": None, "few_shot": {"shots": 2}, "few_shot_wrong_labels": {"shots": 2}},
            "max_new_tokens": 3,
            "output_dir": str(out),
            "shard_size": 5,
        },
    )
    return out, execute(hard, config, recipe="prompting/hard"), config


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_metrics_are_what_the_answers_say(asked, root):
    out, metrics, _ = asked
    lines = lines_of(out)
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["strategy"]), []).append(line)
    assert len(groups) == 2 * 3 * 2
    for (model, strategy), some in groups.items():
        prefix = f"hard/{model}/{strategy}"
        assert len(some) == metrics["hard/examples"] == metrics[f"{prefix}/answered"] == 12
        counts = Counter(line["kind"] for line in some)
        assert metrics[f"{prefix}/accuracy"] == pytest.approx(counts["right"] / 12)
        interval = metrics[f"{prefix}/accuracy_ci_low"], metrics[f"{prefix}/accuracy_ci_high"]
        assert interval == wilson_interval(counts["right"] / 12, 12)
        assert metrics[f"{prefix}/valid_rate"] == pytest.approx((counts["right"] + counts["plausible"]) / 12)
        for kind in ("plausible", "uninformative", "invalid"):
            assert metrics[f"{prefix}/{kind}_rate"] == pytest.approx(counts[kind] / 12)
        right = {line["id"]: line["kind"] == "right" for line in some}
        for other in [
            s for s in metrics if s.startswith(f"{prefix}/accuracy_minus_") and not s.endswith(("low", "high"))
        ]:
            name = other.rpartition("_minus_")[2]
            key = (name, strategy) if name in ("small", "other") else (model, name)
            theirs = {line["id"]: line["kind"] == "right" for line in groups[key]}
            assert metrics[other] == pytest.approx(np.mean([right[i] - theirs[i] for i in right]))
    expected = {f"hard/{m}/few_shot_wrong_labels/accuracy_minus_few_shot" for m in ("small", "other")}
    expected |= {
        f"hard/other/{name}/accuracy_minus_small" for name in ("simple_qa", "few_shot", "few_shot_wrong_labels")
    }
    suffixed = {
        re.sub(r"/(\w+)/accuracy_minus_(few_shot)?", r"/\1_likelihood/accuracy_minus_\2", key) for key in expected
    }
    suffixed = {key + "_likelihood" * key.endswith("_few_shot") for key in suffixed}
    assert {key for key in metrics if "_minus_" in key and not key.endswith(("low", "high"))} == expected | suffixed
    choices = [len(line["log_probs"]) for line in groups["small", "few_shot_likelihood"]]
    assert metrics["hard/chance/accuracy"] == pytest.approx(np.mean([1 / n for n in choices]))
    patterns = documented(root)
    for key in metrics:
        plain = key.removesuffix("_ci_low").removesuffix("_ci_high")
        assert any(pattern.fullmatch(plain) for pattern in patterns), f"docs/metrics.md does not explain {plain}"


@torch.no_grad()
def test_the_likeliest_choice_is_that_of_a_loop_over_prompts_and_choices(asked, questions_file):
    out, _, config = asked
    by_id = {row["id"]: row for row in map(json.loads, questions_file.read_text().splitlines())}
    for name, path in config.models.items():
        model, tokenizer = load_local(path, "model")
        for line in [x for x in lines_of(out) if (x["model"], x["strategy"]) == (name, "simple_qa_likelihood")]:
            question = by_id[line["id"]]["question"]
            prompt = f"Q: {question['stem']}\nA:"
            scores = {}
            for choice in question["choices"]:
                start = len(tokenizer(prompt)["input_ids"])
                ids = tokenizer(f"{prompt} {choice['text']}")["input_ids"]
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                scores[choice["label"]] = sum(log_probs[i - 1, ids[i]].item() for i in range(start, len(ids)))
                assert line["log_probs"][choice["text"]] == pytest.approx(scores[choice["label"]], abs=1e-5)
            assert line["answer"] == max(scores, key=scores.get)
            shares = np.exp(np.array(list(scores.values())))
            assert line["confidence"] == pytest.approx(shares.max() / shares.sum(), abs=1e-6)


def test_solved_examples_are_the_same_for_every_model_and_never_the_question(asked):
    out, _, _ = asked
    shots = {}
    for line in lines_of(out):
        assert line["id"] not in line["shots"]
        assert len(line["shots"]) == (0 if line["strategy"].startswith("simple") else 2)
        if line["shots"]:
            assert shots.setdefault(line["id"], line["shots"]) == line["shots"]
    assert len({tuple(s) for s in shots.values()}) > 5  # each question has its own


def words(tiny_folder, nouns_file, out, *more: str) -> list[str]:
    """The command line of a short stage."""
    fixed = [f"models={{small: {tiny_folder}}}", f"dataset={nouns_file}", "test_fraction=0.4", "strategies=[few_shot]"]
    return ["--recipe", "prompting/hard", *fixed, "max_new_tokens=4", "shard_size=2", f"output_dir={out}", *more]


def content(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    found = {str(p.relative_to(folder)): p.read_text() for p in files}
    found["stage.json"] = json.loads(found["stage.json"])["metrics"]
    return found


@pytest.fixture(scope="module")
def plain_run(prompting_cli, tiny_folder, nouns_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "hard"
    code, printed = prompting_cli.run(*words(tiny_folder, nouns_file, out, "shots=[0, 2]"))
    assert code == 0, printed
    assert "hard/small/few_shot_2/accuracy_irregular = " in printed
    return out


@pytest.mark.parametrize("kill", [(r"checkpoints/small\.few_shot_0/\.000002", 1), (r"answers\.jsonl", 1)])
def test_a_killed_stage_goes_on_and_ends_the_same(prompting_cli, tiny_folder, nouns_file, plain_run, tmp_path, kill):
    command = words(tiny_folder, nouns_file, tmp_path / "hard", "shots=[0, 2]")
    code, _ = prompting_cli.run(*command, kill=kill)
    assert code == -9
    kept = sorted((tmp_path / ".hard.partial" / "checkpoints").rglob("*.json"))
    assert kept
    stamps = [file.stat().st_mtime_ns for file in kept]
    code, printed = prompting_cli.run(*command, kill=(str(kept[0].name) + r"\.tmp", 9))
    assert code == 0, printed
    assert content(tmp_path / "hard") == content(plain_run)
    assert stamps == sorted(stamps)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "accelerate"])
def test_two_processes_end_as_one(prompting_cli, root, tiny_folder, nouns_file, plain_run, tmp_path, real):
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    command = ["--config_file", str(root / "accelerate_configs" / "cpu_ddp.yaml")]
    command += [
        str(root / "tests" / "chain" / "joined.py"),
        str(ranks),
        str(root / "recipes" / "prompting" / "hard.py"),
    ]
    command += words(tiny_folder, nouns_file, tmp_path / "hard", "shots=[0, 2]")[2:]
    variables = {"ACCELERATE_USE_CPU": "true"}
    if real:
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        done = subprocess.run(
            [*launcher, *command], capture_output=True, text=True, timeout=800, env=os.environ | variables
        )
        code, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        code, printed, errors = prompting_cli.answer("--launch", *command, env=variables)
    assert code == 0, errors[-3000:]
    assert sorted(path.name for path in ranks.iterdir()) == ["0-of-2", "1-of-2"]
    assert printed.count("finished: ") == 1
    mine, other = content(tmp_path / "hard"), content(plain_run)
    assert mine["stage.json"] == other["stage.json"]
    assert mine["answers.jsonl"] == other["answers.jsonl"]


# --- endpoints --------------------------------------------------------------------------------------------------------


def remote(url: str, nouns_file: Path, out: Path, cache: Path, *more: str) -> list[str]:
    table = (
        f"{{remote: {{url: '{url}', model: m, api_key_env: {KEY_NAME}, max_retries: 0, timeout: 20, concurrency: 2}}}}"
    )
    fixed = [f"endpoints={table}", f"dataset={nouns_file}", "test_fraction=0.4", "strategies=[few_shot]"]
    return ["--recipe", "prompting/hard", *fixed, f"response_cache={cache}", f"output_dir={out}", *more]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_served_model_is_measured_as_the_model_itself(served, tiny_folder, nouns_file, tmp_path, api):
    config = validate(
        HardConfig,
        {
            "models": {"here": str(tiny_folder)},
            "chat_models": ["here"] * (api == "chat"),
            "endpoints": {"far": {"url": served.url, "model": served.model, "api": api}},
            "dataset": str(nouns_file),
            "test_fraction": 0.4,
            "strategies": {"few_shot": {"shots": 2}},
            "max_new_tokens": 6,
            "response_cache": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "hard"),
        },
    )
    metrics = execute(hard, config)
    assert metrics["hard/far/few_shot/accuracy_minus_here"] == 0
    lines = {"here": [], "far": []}
    for line in lines_of(tmp_path / "hard"):
        assert (line.pop("confidence") is None) == (line["model"] == "far")  # it gives no log-probabilities
        lines[line.pop("model")].append(line)
    assert lines["here"] == lines["far"]
    assert len({line["text"] for line in lines["far"]}) > 1


def test_failed_answers_are_told_then_asked_for_again_and_the_key_is_nowhere(prompting_cli, nouns_file, tmp_path):
    def answer(body, before):
        word = body["prompt"].splitlines()[-1].removesuffix(" ->")
        return {"choices": [{"text": f" {plural(word)}\nnext ->", "finish_reason": "length"}]}

    out, cache = tmp_path / "hard", tmp_path / "cache"
    with FaultyProxy(None) as proxy:
        broken = {n: [500, 429, "drop"][n % 3] for n in range(2, 5)}
        proxy.plan = lambda body, before: broken.get(proxy.requests - 1) or answer(body, before)
        command = remote(proxy.url, nouns_file, out, cache)
        code, printed, errors = prompting_cli.answer(*command)
        assert code == 2, printed + errors
        (line,) = [text for text in errors.splitlines() if text.startswith("error:")]
        assert re.search(
            r"endpoints\.remote=3 of 8 answers: failed: .*give the same command again, which asks only", line
        )
        assert "Traceback" not in errors
        assert not out.exists()
        assert proxy.requests == 8
        broken.clear()
        before = proxy.requests
        code, printed, errors = prompting_cli.answer(*command)
        assert code == 0, printed + errors
        again = prompting_cli.answer(*command, f"output_dir={tmp_path / 'free'}")
        assert again[0] == 0
        assert proxy.requests - before <= 3
        assert proxy.keys == {f"Bearer {KEY}"}
    metrics = json.loads((out / "stage.json").read_text())["metrics"]
    assert metrics["hard/remote/few_shot/failed"] == 0
    assert metrics["hard/remote/few_shot/accuracy"] == 1
    assert (tmp_path / "free" / "answers.jsonl").read_text() == (out / "answers.jsonl").read_text()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        assert KEY.encode() not in file.read_bytes(), file
    for log in prompting_cli.logs.iterdir():
        assert KEY.encode() not in log.read_bytes(), log


def test_a_killed_stage_asks_an_endpoint_only_for_the_rest(prompting_cli, nouns_file, tmp_path):
    def right(body, before):
        word = body["prompt"].splitlines()[-1].removesuffix(" ->")
        return {"choices": [{"text": f" {plural(word)}", "finish_reason": "stop"}]}

    with FaultyProxy(None, right) as proxy:
        command = remote(proxy.url, nouns_file, tmp_path / "hard", tmp_path / "cache", "shots=[0, 1]")
        code, _ = prompting_cli.run(*command, kill=(r"/cache/.*\.tmp", 11))
        assert code == -9
        kept = len([file for file in (tmp_path / "cache").rglob("*.json") if not file.name.startswith(".")])
        assert kept == 10
        before = proxy.requests
        code, printed = prompting_cli.run(*command)
        assert code == 0, printed
        assert proxy.requests - before == 16 - kept
    assert json.loads((tmp_path / "hard" / "stage.json").read_text())["metrics"]["hard/remote/few_shot_1/accuracy"] == 1


def test_missing_answers_are_counted_and_left_out_where_that_is_allowed(nouns_file, tmp_path):
    with FaultyProxy(None) as proxy:
        proxy.plan = lambda body, before: (
            500 if "box" in body["prompt"] else {"choices": [{"text": " boxes", "finish_reason": "stop"}]}
        )
        config = validate(
            HardConfig,
            {
                "endpoints": {"remote": {"url": proxy.url, "model": "m", "max_retries": 0}},
                "dataset": str(nouns_file),
                "test_fraction": 0.8,
                "strategies": ["few_shot"],
                "shots": [0],
                "max_failed": 0.2,
                "response_cache": str(tmp_path / "cache"),
                "output_dir": str(tmp_path / "hard"),
            },
        )
        metrics = execute(hard, config)
    assert metrics["hard/remote/few_shot_0/failed"] == 1
    assert metrics["hard/remote/few_shot_0/answered"] == 15
    assert metrics["hard/remote/few_shot_0/accuracy"] == 0
    (lost,) = [line for line in lines_of(tmp_path / "hard") if line["kind"] == "failed"]
    assert lost["input"] == "box"
    assert lost["failure"].startswith("HTTP 500")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": {"few_shot": "gpt2"}, "strategies": ["few_shot"]}, "few_shot=few_shot: is the name of a model too"),
        ({"strategies": {"x_likelihood": {"like": "few_shot"}}}, "x_likelihood: ends in _likelihood"),
        (
            {"strategies": {"few_shot": None, "few_shot_2": {"like": "few_shot", "shots": 0}}, "shots": [2]},
            "few_shot_2: is the name of another one",
        ),
        ({"strategies": ["Few"]}, "strategies.Few=Few: cannot be part of a metric's name"),
        ({"shots": []}, r"shots=\[\]: is empty"),
        ({"shots": [-1]}, "shots=-1: input should be greater than or equal to 0"),
        ({"scoring": []}, r"scoring=\[\]: is empty"),
        ({"strategies": "few"}, "strategies=few"),
    ],
)
def test_names_that_would_hide_one_another_and_the_like_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        validate(HardConfig, {"models": {"small": "gpt2"}} | values)


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_told_in_one_line_before_anything_is_written(
    prompting_cli, tiny_folder, nouns_file, questions_file, tmp_path
):
    rows = [json.loads(line) for line in questions_file.read_text().splitlines()]

    def spoilt(name: str, change) -> str:
        some = json.loads(json.dumps(rows))
        change(some[4])
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        return f"dataset={file}"

    keyless = spoilt("keyless", lambda row: row.pop("answerKey"))
    twice = spoilt("twice", lambda row: row["question"]["choices"][1].update(label="A"))
    choose = ["task=multiple_choice", "strategies=[few_shot]"]
    with FaultyProxy(None, lambda body, before: 401) as refusing, FaultyProxy(None) as silent:
        silent.plan = lambda body, before: {"choices": [{"text": " B", "finish_reason": "stop"}]}

        def server(url, **more):
            table = ", ".join(
                f"{k}: {v}" for k, v in {"url": f"'{url}'", "model": "m", "max_retries": 0, **more}.items()
            )
            return f"endpoints={{far: {{{table}}}}}"

        cases = {
            "strategies={mine: {query: 'of {wrod}'}}": r"mine\.query=of \{wrod\}: unknown placeholder \{wrod\}",
            (*choose, keyless): r"keyless\.jsonl line 5: the answer key 'answerKey' is missing",
            (*choose, twice): r"twice\.jsonl line 5: the label 'A' stands twice",
            "shots=[50]": r"strategies\.few_shot_50\.shots=50: there are only \d+ examples to draw them from",
            "strategies={few_shot: {shots: 5, instruction: '" + "very " * 400 + "'}}": (
                r"few_shot: prompt=very .*a prompt takes \d+ tokens and 4 for the answer, small reads 400"
            ),
            ("models={}", server("http://127.0.0.1:9/v1")): r"endpoints\.far\.url=http://127.*nothing answers there",
            ("models={}", server(refusing.url, api_key_env=KEY_NAME)): (
                rf"endpoints\.far\.api_key_env={KEY_NAME}: the endpoint refuses the key \(HTTP 401"
            ),
            ("models={}", server(silent.url), *choose, f"dataset={questions_file}", "scoring=[likelihood]"): (
                r"endpoints\.far=http.*gives no token log-probabilities; scoring by likelihood needs"
            ),
            "scoring=[likelihood]": r"scoring=likelihood: words has no choices to compare; give scoring=\[generate\]",
            "models={small: ./nothing}": r"models\.small=\./nothing: no such file or folder",
            "split=validation": None,
        }
        for number, (change, message) in enumerate(cases.items()):
            out = tmp_path / f"out{number}" / "hard"
            change = [change] if isinstance(change, str) else list(change)
            command = words(tiny_folder, nouns_file, out, *change)
            code, printed, errors = prompting_cli.answer(*command)
            if message is None:
                assert code == 0, printed + errors
                continue
            told = [line for line in errors.splitlines() if line.startswith("error:")]
            assert code == 2, (change, printed + errors)
            assert len(told) == 1, errors
            assert re.search(message, told[0]), told[0]
            assert "Traceback" not in errors
            assert not out.parent.exists(), change
            assert KEY not in errors + printed

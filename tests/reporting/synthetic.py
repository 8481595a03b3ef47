"""A run folder with invented numbers, written in the same files and forms as the stages write."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image

RECIPES = {
    "corpus": "summarization/corpus",
    "tokenizer": "summarization/tokenizer",
    "sft": "summarization/sft",
    "preferences": "summarization/preferences",
    "reward": "summarization/reward",
    "ppo": "summarization/ppo",
    "dpo": "summarization/dpo",
    "evaluate": "summarization/evaluate",
}
VERSIONS = {"genalign": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"}
BASELINES = ("lead1", "name", "qualified_name", "random_summary")
HOSTILE = "Returns <script>alert('x')</script> & the <b>bold</b> value | of {{ 7 * 7 }}."
DOCUMENT = """pandas.core.reshape.concat.concatenate_block_managers_with_a_rather_long_name_here(frames, axis=0)
def concatenate_block_managers(frames, axis=0, *, join="outer", ignore_index=False):
    if not frames:
        raise ValueError("No objects to concatenate")
    return _Concatenator(frames, axis=axis, join=join, ignore_index=ignore_index).get_result()  # & <done>
"""


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def mean(key: str, value: float, half: float) -> dict[str, float]:
    return {key: value, f"{key}_ci_low": value - half, f"{key}_ci_high": value + half}


def evaluation() -> dict[str, float]:
    metrics: dict[str, float] = {}
    scores = {
        "lead1": 20.3,
        "name": 24.1,
        "qualified_name": 23.2,
        "random_summary": 11.9,
        "sft": 26.4,
        "ppo": 27.3,
        "dpo": 27.0,
    }
    for system, rouge in scores.items():
        metrics |= mean(f"{system}/rouge1", rouge, 0.9) | mean(f"{system}/rouge2", rouge / 3, 0.7)
        metrics |= mean(f"{system}/rougeL", rouge - 1.5, 0.9) | mean(f"{system}/rougeLsum", rouge - 1.4, 0.9)
        metrics |= mean(f"{system}/length", 8.2 + rouge / 20, 0.3) | mean(f"{system}/gold", rouge * 0.8, 0.8)
        metrics |= mean(f"{system}/novel_bigrams", 0.71, 0.02) | mean(f"{system}/repetition", 0.021, 0.004)
    for system, proxy in (("sft", -0.12), ("ppo", 0.88), ("dpo", 0.41)):
        metrics |= mean(f"{system}/proxy", proxy, 0.08)
    metrics |= mean("ppo/gold_win_rate", 0.563, 0.041) | mean("dpo/gold_win_rate", 0.524, 0.043)
    metrics |= mean("sft/rouge1_minus_lead1", 6.1, 0.8) | mean("sft/rouge1_minus_name", 0.4, 0.7)
    metrics |= mean("ppo/rouge1_minus_sft", 0.9, 0.4) | {"evaluate/examples": 800.0}
    return metrics | mean("ppo/kl", 3.42, 0.3) | mean("dpo/kl", 11.9, 0.8)


def ppo_history(rollouts: int, rng: random.Random) -> list[dict]:
    """Proxy reward that goes on rising while gold rises and then falls: over-optimisation."""
    history, coefficient = [], 0.05
    for n in range(1, rollouts + 1):
        t = n / rollouts
        kl = max(0.0, 6 * t**0.8 + rng.gauss(0, 0.3))
        coefficient *= 1.01 if kl > 4 else 0.995
        history.append(
            {
                "step": 4 * n,
                "objective/proxy_reward": 1.4 * t**0.6 + rng.gauss(0, 0.12),
                "objective/gold": 20 + 6 * t - 9 * t * t + rng.gauss(0, 0.6),
                "objective/kl": kl,
                "objective/kl_coefficient": coefficient,
                "objective/entropy": 30 - 12 * t + rng.gauss(0, 1),
                "objective/length": 9 + 3 * t + rng.gauss(0, 0.4),
                "policy/clip_fraction": 0.05 + 0.05 * t + rng.gauss(0, 0.01),
                "value/explained_variance": 0.8 * (1 - 2.7 ** (-6 * t)) + rng.gauss(0, 0.04),
            }
        )
    return history


def loss_history(steps: int, start: float, end: float, rng: random.Random, *, preference: bool = False) -> list[dict]:
    history = []
    for step in range(10, steps + 1, 10):
        t = step / steps
        entry = {"step": step, "epoch": 3 * t, "loss": end + (start - end) * 2.7 ** (-4 * t) + rng.gauss(0, 0.05)}
        if preference:
            entry |= {"rewards/accuracies": 0.5 + 0.15 * t + rng.gauss(0, 0.03), "rewards/margins": 0.6 * t}
        history.append(entry)
        if step % (steps // 8) < 10:
            entry = {"step": step, "eval_loss": end + 0.1 + (start - end) * 2.7 ** (-4 * t)}
            if preference:
                entry |= {"eval_rewards/accuracies": 0.5 + 0.1 * t, "eval_rewards/margins": 0.4 * t}
            history.append(entry)
    return history


def predictions(count: int, rng: random.Random) -> list[dict]:
    words = ["Return", "compute", "the", "a", "of", "array", "index", "frame", "parse", "config", "value", "path"]
    rows = []
    for n in range(count):
        texts = {
            s: " ".join(rng.choice(words) for _ in range(rng.randint(4, 12))) + "."
            for s in (*BASELINES, "sft", "ppo", "dpo")
        }
        rows.append(
            {
                "id": f"test-{n}",
                "name": f"pandas.core.reshape.concat.concatenate_block_{n}",
                "document": DOCUMENT,
                "references": ["Concatenate block managers into one.", "Joins managers <i>along</i> an axis."],
                "outputs": texts,
                "gold": {s: rng.uniform(5, 50) for s in texts},
                "proxy": {s: rng.gauss(0, 1) for s in ("sft", "ppo", "dpo")},
            }
        )
    return rows


def write_stage(folder: Path, name: str, metrics: dict[str, float], **changes: object) -> None:
    config = {
        "output_dir": str(folder / name),
        "seed": 7,
        "learning_rate": 1e-3,
        "dataset": "pydocs",
        "prefix": "",
        "limits": [1, 2],
    }
    record = {
        "stage": f"seq2seq.{name}.{name}",
        "recipe": RECIPES.get(name, ""),
        "state": "finished",
        "config": config,
        "fingerprint": "0123456789abcdef" * 4,
        "inputs": {"dataset": "fedcba9876543210" * 4},
        "versions": VERSIONS,
        "seed": 7,
        "duration_seconds": 75.3,
        "metrics": metrics,
    }
    write(folder / name / "stage.json", record | changes)


def write_run(folder: Path, *, rollouts: int = 150, examples: int = 60, hostile: bool = True) -> Path:
    """Writes a finished run of the whole chain and returns its folder.

    Args:
        folder: where.
        rollouts: how many PPO logged.
        examples: held-out documents.
        hostile: whether model texts hold markup.
    """
    rng = random.Random(0)
    metrics = {
        "corpus": {"corpus/train": 16213, "corpus/leaked_share": 0.0021},
        "tokenizer": {"tokenizer/vocabulary": 8192},
        "sft": {"sft/eval_loss": 2.31, "sft/truncated_sources": 0.0731, "sft/truncated_targets": 0.0002},
        "preferences": {"preferences/pairs": 11520, "preferences/ties": 0.08},
        "reward": mean("reward/accuracy", 0.613, 0.018) | {"reward/eval_loss": 0.66},
        "ppo": {"ppo/rollouts": rollouts},
        "dpo": {"dpo/eval_loss": 0.62},
        "evaluate": evaluation(),
    }
    merged = {k: v for stage in metrics.values() for k, v in stage.items()}
    write(folder / "metrics.json", dict(sorted(merged.items())))
    command = "genalign run demo --output_dir runs/demo sft.learning_rate=1e-3"
    about = "The whole chain on docstrings of installed packages: from raw text to aligned models."
    write(folder / "run.json", {"name": "demo", "about": about, "command": command, "stages": list(RECIPES)})
    for name, values in metrics.items():
        write_stage(folder, name, values)
    write(folder / "sft" / "log_history.json", loss_history(1200, 6.2, 2.2, rng))
    write(folder / "reward" / "log_history.json", loss_history(400, 0.72, 0.62, rng, preference=True))
    write(folder / "dpo" / "log_history.json", loss_history(400, 0.693, 0.6, rng, preference=True))
    write(folder / "ppo" / "log_history.json", ppo_history(rollouts, rng))
    bins = [
        {"predicted": p, "observed": p - 0.6 * (p - 0.5), "low": p - 0.6 * (p - 0.5) - 0.06}
        | {"high": min(1.0, p - 0.6 * (p - 0.5) + 0.06), "count": int(400 * (1.02 - p))}
        for p in (0.52, 0.58, 0.66, 0.74, 0.83, 0.92)
    ]
    write(folder / "reward" / "calibration.json", bins)
    words = {"mean": 61.24, "median": 50, "p95": 160, "largest": 256}
    splits = {s: {"examples": n, "document_words": words} for s, n in (("train", 16213), ("test", 800))}
    packages = {f"package-{n}": {"version": "1.0", "split": "train", "kept": n} for n in range(40)}
    write(folder / "corpus" / "stats.json", {"splits": splits, "packages": packages, "leaked_share": 0.0021})
    rows = predictions(examples, rng)
    if hostile:
        for row in rows[::6]:
            row["outputs"]["sft"] = HOSTILE
            row["outputs"]["dpo"] = "x" * 120
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "evaluate" / "predictions.jsonl").write_text(text, encoding="utf-8")
    settings = {"decoding": "beam search", "num_beams": 4, "max_new_tokens": 48, "length_penalty": 1.0}
    write(folder / "evaluate" / "settings.json", dict.fromkeys(("sft", "ppo", "dpo"), settings))
    return folder


def write_comparison(folder: Path, name: str = "prompting", metric: str = "accuracy") -> Path:
    """Writes a finished run that compared written with learnt prompts and returns its folder."""
    scale = 1 if metric == "accuracy" else 100
    points = [
        point(0, shots, scale * value, "hard", f"few_shot_{shots}") | {"best": shots == 9}
        for shots, value in ((0, 0.2), (9, 0.5))
    ]
    for label, trained, value in (("prompt_tuning", 6912, 0.8), ("full", 1_062_528, 0.9)):
        gain = [scale * (value - 0.5 + shift) for shift in (0, -0.06, 0.06)]
        learnt = point(trained, 852, scale * value, "learnt", label)
        points.append(learnt | {"gain": gain, "whole": True})
    comparison = {"metric": metric, "task": "words", "examples": 1315, "best": "few_shot_9", "points": points}
    for stage, seconds in (("full", 90.0), ("compare", 30.0)):
        write_stage(folder, stage, {}, recipe=f"prompting/{stage}", duration_seconds=seconds)
    write(folder / "compare" / "comparison.json", comparison)
    write(folder / "run.json", {"name": name, "stages": ["full", "compare"]})
    write(folder / "metrics.json", {"compare/examples": 1315})
    return folder


def point(trained: int, examples: int, value: float, kind: str, label: str) -> dict:
    seeds = [value * share for share in (0.98, 1.0, 1.02)]
    entry = {"trained": trained, "examples": examples, "value": value, "low": 0.9 * value, "high": 1.1 * value}
    return entry | {"seeds": seeds, "kind": kind, "label": label}


def write_images(folder: Path, seed: int, steps: int = 2000, classifier_seed: int = 0) -> Path:
    """Writes a finished run of two image models, trained and measured with a seed, and returns its folder.

    Its data lies in a folder of its own, and the classifier in whose features they are measured has a seed of its own.
    """
    rng, judging = random.Random(seed), random.Random(1000 + classifier_seed)
    nats_a_bit = 784 * math.log(2)
    metrics = {"vae/steps": steps, "bitflip/steps": steps, "bitflip/reconstruction": 0.39, "bitflip/bound": 78.5}
    metrics |= {"measure/test_examples": 10000, "measure/samples": 1000, "vae/bound": 82 + rng.random()}
    metrics |= mean("vae/negative_elbo", 86 + rng.random(), 0.5) | mean("vae/kl", 25 + rng.random(), 0.1)
    metrics |= mean("vae/reconstruction", 61 + rng.random(), 0.5)
    metrics |= {
        "vae/bits_per_pixel": metrics["vae/negative_elbo"] / nats_a_bit,
        "bitflip/bits_per_pixel": 78.5 / nats_a_bit,
    }
    metrics |= {"vae/test_examples": 10000, "bitflip/test_examples": 10000, "vae/parameters": 1_182_096}
    metrics |= {"classifier/accuracy": judging.random(), "classifier/loss": judging.random()}
    for system in ("vae", "bitflip", "training_images"):
        metrics |= {f"{system}/frechet_distance": 10 * rng.random()} | mean(f"{system}/precision", rng.random(), 0.01)
        metrics |= {f"{system}/nearest_ratio": 1.0 + rng.random()} if system != "training_images" else {}
    data = {"dataset": "digest of the images"}
    made = {"classifier": f"classifier{classifier_seed}"} | {
        name: f"{name}{seed}{steps}" for name in ("vae", "bitflip")
    }
    for name, fingerprint in made.items():
        own = classifier_seed if name == "classifier" else seed
        config = {"output_dir": str(folder / name), "seed": own, "dataset": str(folder / "images"), "eval_images": 1000}
        config |= {"max_steps": steps} if name != "classifier" else {"epochs": 5.0, "model": None}
        config |= {"importance_samples": 50} if name == "vae" else {}
        record = {"recipe": f"images/{name}", "seed": own, "config": config, "fingerprint": fingerprint}
        write_stage(folder, name, {}, **record, inputs=data, duration_seconds=60.0 * (seed + 1))
    for name in ("vae", "bitflip"):
        timing = [(1, 1.0, 1.5), (steps // 2, 50.0, 60.0), (steps, 90.0, 120.0)]
        keys = ("step", "train_runtime", "train_cpu_runtime")
        write(folder / name / "timing.json", [dict(zip(keys, entry, strict=True)) for entry in timing])
        bound = "eval_negative_elbo" if name == "vae" else "eval_bound"
        history = [{"step": step, bound: 2 * 80.0 - 20 * seed - seconds / 2} for step, _, seconds in timing[1:]]
        write(folder / name / "log_history.json", history)
    systems = {name: str(folder / name) for name in ("vae", "bitflip")}
    config = {"seed": seed, "samples": 1000, "systems": systems, "classifier": str(folder / "classifier")}
    config |= {"dataset": str(folder / "images"), "output_dir": str(folder / "measure")}
    inputs = data | {f"systems.{name}": made[name] for name in systems} | {"classifier": made["classifier"]}
    record = {"recipe": "images/measure", "seed": seed, "config": config, "inputs": inputs}
    write_stage(folder, "measure", {}, **record, fingerprint=f"measure{seed}{steps}")
    settings = {"binarize": "bernoulli", "samples": 1000, "neighbours": 3, "families": {s: s for s in systems}}
    write(folder / "measure" / "settings.json", settings)
    write(folder / "measure" / "timing.json", {"seconds_a_sample": {"vae": 1.7e-5, "bitflip": 0.0036}})
    for name in systems:
        noise = Image.frombytes("L", (581, 291), rng.randbytes(581 * 291))
        noise.save(folder / "measure" / f"{name}.png")
    write(folder / "run.json", {"name": "mnist", "stages": [*made, "measure"]})
    write(folder / "metrics.json", metrics)
    return folder


def write_sweep(folder: Path) -> Path:
    """Writes the folder of a finished sweep of autoencoders that blur, run by itself, and returns it."""
    rows = [
        {"likelihood": likelihood, "beta": beta, "sharpness": sharpness, "kl": kl, "error": 0.1 - kl / 1000}
        for likelihood, beta, sharpness, kl in (
            ("bernoulli", 0.1, 0.9, 30.0),
            ("bernoulli", 1.0, 0.5, 4.0),
            ("gaussian", 0.1, 0.8, 64.0),
            ("gaussian", 1.0, 0.6, 16.0),
            ("gaussian", 10.0, 0.2, 1.0),
        )
    ]
    config = {"output_dir": str(folder), "seed": 3, "max_steps": 1000, "dataset": "digits", "variance": 0.05}
    record = {"recipe": "images/vae_blur", "seed": 3, "config": config, "duration_seconds": 120.0}
    write_stage(folder.parent, folder.name, {"vae_blur/rank_correlation": 0.9}, **record)
    write(folder / "sweep.json", rows)
    Image.new("L", (60, 40), 128).save(folder / "reconstructions.png")
    return folder

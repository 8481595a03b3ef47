"""Estimates: exact where they can be, near what a run measures, and the shipped files carry what the command says."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from pipelines.cli import main
from pipelines.errors import UserError
from pipelines.estimate import GIB, Launch, estimate_chain, load
from pipelines.estimate_count import TensorMemory
from pipelines.estimate_models import KNOWN, empty_model, model_config
from pipelines.estimate_step import Shape, cache_bytes, forward_peak, measure, measure_whole

TINY = T5Config(
    vocab_size=500, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("google-t5/t5-small", 60_506_624),
        ("google-t5/t5-base", 222_903_552),
        ("google/flan-t5-small", 60_511_616),
        ("google/flan-t5-base", 222_903_552),
        ("google/flan-t5-large", 750_251_008),
        ("google/mt5-small", 172_119_424),
        ("facebook/bart-large-cnn", 406_290_432),
        ("google/t5gemma-s-s-prefixlm", 312_500_000),
        ("google/t5gemma-b-b-ul2", 591_500_000),
        ("google/t5gemma-l-l-ul2", 1_241_800_000),
    ],
)
def test_known_models_have_the_parameters_of_their_checkpoints(name, parameters):
    # As transformers builds them: it ties the head of T5 v1.1 to its embedding. T5Gemma's are published in millions.
    count = sum(p.numel() for p in empty_model(model_config(name)).parameters())
    assert count == (pytest.approx(parameters, rel=1e-3) if "gemma" in name else parameters)


def test_a_folder_goes_before_a_known_name(tiny_t5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5-base").symlink_to(tiny_t5)
    assert model_config("t5-base").d_model == 32
    with pytest.raises(UserError, match="model=nobody/none: its sizes are not known here"):
        model_config("nobody/none")


def test_memory_of_tensors_is_counted_to_the_byte():
    memory = TensorMemory()
    with memory:
        first = torch.zeros(100)
        second = first + 1
        view = second[:50]
        assert memory.now == 800
        del second
        assert memory.now == 800
        del view
        assert memory.now == 400
        first.add_(1)
        assert memory.now == 400
    assert memory.peak == 800


def test_flops_are_those_of_the_products():
    shape = Shape("sft", sources=3, rows=3, source_length=10, target_length=5, device="cuda")
    cost = measure(TINY, shape)
    model = T5ForConditionalGeneration(TINY)
    assert cost.parameters == cost.trained == sum(p.numel() for p in model.parameters())
    d, inner, ff, v, s, t, b = 32, 32, 64, 500, 10, 5, 3
    attend = lambda q, k: 2 * b * q * k * inner * 2  # noqa: E731 - scores and values
    encoder = 2 * (2 * b * s * (4 * d * inner + 2 * d * ff) + attend(s, s))
    decoder = 2 * (2 * b * t * (6 * d * inner + 2 * d * ff) + 2 * b * s * 2 * d * inner + attend(t, t) + attend(t, s))
    forward = encoder + decoder + 2 * b * t * d * v
    assert forward_peak(TINY, shape)[1] == forward
    assert cost.flops == pytest.approx(3 * forward, rel=0.02)


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_shrink_when_recomputed():
    sizes = {"source_length": 64, "target_length": 16}
    one, four = (measure(TINY, Shape("sft", n, n, **sizes)) for n in (1, 4))
    assert four.forward_bytes == pytest.approx(4 * one.forward_bytes, rel=0.1)
    again = measure(TINY, Shape("sft", 4, 4, **sizes, checkpointing=True))
    assert again.forward_bytes < 0.6 * four.forward_bytes
    assert again.flops > 1.1 * four.flops
    fused = measure(TINY, Shape("sft", 4, 4, **sizes, device="cuda", precision="bf16"))
    assert fused.forward_bytes < four.forward_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rows"), [("sft", 2), ("dpo", 4), ("ppo", 4)])
@pytest.mark.parametrize("layers", [(7, 7), (8, 6)])
def test_what_deep_models_take_follows_from_shallow_ones(kind, rows, layers):
    sizes = {"num_layers": layers[0], "num_decoder_layers": layers[1]}
    config = T5Config(**{**TINY.to_dict(), **sizes})
    shape = Shape(kind, 2, rows, 64, 16, device="cuda", precision="bf16")
    short, whole = measure(config, shape), measure_whole(config, shape)
    for name in ("parameters", "trained", "frozen_bytes", "largest_block", "outside_blocks", "flops", "factored"):
        assert getattr(short, name) == getattr(whole, name), name
    assert short.forward_bytes == pytest.approx(whole.forward_bytes, rel=0.01)
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.03)


_OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("listwise", "grpo", "rloo", "pretrain", "dpo")]


@pytest.mark.parametrize("kind", ["reward", "ppo", *_OTHERS])
def test_every_stage_has_a_step(kind):
    rows = 8 if kind in ("ppo", "grpo", "rloo", "listwise") else 4 if kind in ("reward", "dpo") else 2
    cost = measure(TINY, Shape(kind, 2, rows, source_length=12, target_length=6))
    assert cost.flops > 0
    assert cost.peak_bytes >= 4 * cost.trained


def test_adapters_are_what_is_trained_and_a_reference_online_costs_a_forward_pass():
    cost = measure(TINY, Shape("dpo", 2, 4, 12, 6, lora_r=4))
    assert 0 < cost.trained < 0.5 * cost.parameters
    shape = Shape("dpo", 2, 4, 12, 6, lora_r=4, online_reference=True)
    assert measure(TINY, shape).flops == pytest.approx(cost.flops + forward_peak(TINY, shape)[1], rel=0.02)


def test_keys_and_values_are_those_of_a_real_cache():
    model = T5ForConditionalGeneration(TINY).eval()
    found = model(input_ids=torch.ones(2, 9, dtype=torch.long), decoder_input_ids=torch.ones(2, 5, dtype=torch.long))
    cache = found.past_key_values
    held = sum(
        layer.keys.nbytes + layer.values.nbytes
        for part in (cache.self_attention_cache, cache.cross_attention_cache)
        for layer in part.layers
    )
    assert cache_bytes(TINY, 2, 2, 9, 5, 4) == held


def _estimate(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *words])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_a_chain_is_estimated_without_data_weights_or_network(capsys):
    code, out, _ = _estimate(capsys, "demo", "--device", "cpu", "--documents", "17800", "--json")
    assert code == 0
    stages = {each["stage"]: each for each in json.loads(out)}
    assert list(stages) == ["sft", "reward", "ppo", "dpo"]
    assert stages["sft"]["parameters"] == stages["dpo"]["parameters"] == 7_344_384
    assert stages["ppo"]["others"].keys() == {"reference", "reward model"}
    assert stages["ppo"]["cache"] > 0
    assert stages["sft"]["steps"] == 400
    for each in stages.values():
        assert each["total"] >= each["weights"] + each["optimizer"] + each["gradients"]
        assert each["seconds"] > 0


def test_parts_are_cut_as_the_launcher_cuts_them():
    chain = load("summarization/sft", None)
    from pipelines.estimate import DEVICES

    words = ["model=google-t5/t5-small", "max_steps=10", "batch_size=1", "max_source_length=16", "max_target_length=8"]
    words += ["precision=fp32"]
    found = {}
    for kind in ("single", "ddp", "fsdp", "zero2", "zero3"):
        launch = Launch(kind, 1 if kind == "single" else 8)
        (found[kind],) = estimate_chain(chain, words, DEVICES["a100-80gb"], launch)
    one = 4 * 60_506_624
    assert found["single"].weights == one
    assert found["single"].optimizer == 2 * one
    assert found["ddp"].total == pytest.approx(found["single"].total + one, rel=1e-6)
    assert found["fsdp"].weights == one / 8
    assert found["fsdp"].optimizer == found["zero2"].optimizer == found["zero3"].optimizer == 2 * one / 8
    assert found["fsdp"].total < found["ddp"].total
    assert found["zero3"].weights < found["zero2"].weights


def test_what_is_measured_whole_and_the_reference_in_parts_are_counted():
    from pipelines.estimate import DEVICES

    words = ["model=google-t5/t5-small", "max_steps=10", "batch_size=1", "max_source_length=16", "max_target_length=8"]
    words += ["precision=fp32", "preferences=p", "precompute_ref_log_probs=false"]
    chain, one = load("summarization/dpo", None), 4 * 60_506_624
    (single,) = estimate_chain(chain, words, DEVICES["a100-80gb"], Launch("single", 1))
    (parts,) = estimate_chain(chain, words, DEVICES["a100-80gb"], Launch("fsdp", 8))
    assert single.others == {"reference": one}
    assert parts.others == {"reference": one / 8}
    assert parts.after == single.after + one == 2 * one


def test_copy_steps_come_on_top_of_epochs():
    from pipelines.estimate import DEVICES

    words = ["model=google-t5/t5-small", "batch_size=1", "max_source_length=16", "max_target_length=8", "epochs=2"]
    words += ["precision=fp32", "copy_steps=5"]
    chain = load("summarization/sft", None)
    (found,) = estimate_chain(chain, words, DEVICES["a100-80gb"], Launch("ddp", 2), documents=11)
    assert found.steps == 2 * (11 // 2) + 5


def test_a_launcher_file_says_how_the_work_is_shared(root, tmp_path):
    files = root / "accelerate_configs"
    kinds = {"single_gpu": ("single", 1), "ddp": ("ddp", 8), "fsdp": ("fsdp", 8), "zero3": ("zero3", 8)}
    assert {name: Launch.of(str(files / f"{name}.yaml"), None) for name in kinds} == {
        name: Launch(*kind) for name, kind in kinds.items()
    }
    assert Launch.of(str(files / "single_gpu.yaml"), 4) == Launch("ddp", 4)
    (tmp_path / "mine.yaml").write_text("distributed_type: FSDP\nnum_processes: null\n")
    with pytest.raises(UserError, match=r"num_processes=None: not a number from 1 in .*mine.yaml"):
        Launch.of(str(tmp_path / "mine.yaml"), None)
    assert Launch.of(str(tmp_path / "mine.yaml"), 2) == Launch("fsdp", 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "chain=nothing: no such chain"),
        (["demo", "--device", "a100"], "--device=a100: is not known"),
        (["demo", "--launcher", "fsdp3"], "--launcher=fsdp3: no such launcher; give one of single, ddp"),
        (["demo", "--utilization", "40"], "--utilization=40.0: is no share of the peak; give a number up to 1"),
        (["demo", "--processes", "0"], "--processes=0: is no number of devices"),
        (["demo", "sft.batchsize=3"], "sft.batchsize=3: unknown key"),
        (
            ["demo", "--device", "cpu", "--processes", "3", "--launcher", "ddp"],
            "ppo.mini_batch_size=64: cannot be shared",
        ),
        (["images"], "CONFIG=images: trains nothing that can be estimated"),
    ],
)
def test_wrong_input_is_one_line(capsys, words, says):
    code, out, err = _estimate(capsys, *words)
    assert code == 2
    assert says in err
    assert out == ""


# --- against what is measured -----------------------------------------------------------------------------------------

_MEASURE = """
import gc, json, re, sys
from pipelines.config import validate
from pipelines.runner import load_recipe

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

recipe = load_recipe(sys.argv[1])
# A tiny run first: whatever is imported, started or taken once is there then.
recipe.function(validate(recipe.config_class, json.loads(sys.argv[2])))
gc.collect()
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew
recipe.function(validate(recipe.config_class, json.loads(sys.argv[3])))
print("MEASURED", resident("VmHWM") - before)
"""

# Large in one thing each, and quick: weights, or activations.
_SIZES = {
    "weights": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 3, "num_heads": 8, "batch": 1, "source": 24},
    "activations": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 256,
        "num_layers": 3,
        "num_heads": 8,
        "batch": 12,
        "source": 512,
    },
}


def _measured(recipe, first, second):
    command = [sys.executable, "-c", _MEASURE, recipe, json.dumps(first), json.dumps(second)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.rpartition("MEASURED ")[2])


def _long_rows(kind, count):
    import random

    draw = random.Random(0)
    words = "file list table image server matrix token graph".split()  # noqa: SIM905
    for number in range(count):
        document, summary = (" ".join(draw.choices(words, k=n)) for n in (520, 60))
        if kind == "sft":
            yield {"document": f"{number} {document}", "summary": summary}
        else:
            yield {"prompt": f"{number} {document}", "chosen": summary, "rejected": " ".join(draw.choices(words, k=60))}


@pytest.mark.slow
@pytest.mark.parametrize("large", _SIZES)
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_estimate_is_within_15_percent_of_a_run_on_the_cpu(tiny_t5, tokenizer, tmp_path, stage, large):
    from pipelines.estimate import DEVICES
    from tests.scale.conftest import write_lines

    sizes = dict(_SIZES[large])
    batch, source = sizes.pop("batch"), sizes.pop("source")
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "rows.jsonl", _long_rows(stage, 100))
    values = {
        ("dataset" if stage == "sft" else "preferences"): str(path),
        "model": str(tmp_path / "model"),
        "max_source_length": source,
        "max_target_length": 16,
        "batch_size": batch,
        "eval_batch_size": 1,
        "precision": "fp32",
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 100,
        "report_to": "none",
        "max_train": 50,
        "max_validation": 1,
        "max_test": 1,
    }
    small = {"model": str(tiny_t5), "max_source_length": 16, "batch_size": 1, "output_dir": str(tmp_path / "small")}
    whole = values | {"output_dir": str(tmp_path / "out")}
    measured = _measured(f"summarization/{stage}", values | small, whole)
    words = [f"{key}={value}" for key, value in values.items()]
    (found,) = estimate_chain(load(f"summarization/{stage}", None), words, DEVICES["cpu"], Launch())
    print(f"{stage} {large}: estimated {found.total / GIB:.3f} GiB, measured {measured / GIB:.3f} GiB")
    assert found.total == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_estimate_is_within_15_percent_of_a_run_on_a_gpu(tokenizer, tmp_path, stage):
    from pipelines.config import validate
    from pipelines.estimate import DEVICES
    from pipelines.runner import load_recipe
    from tests.scale.conftest import write_lines

    sizes = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu"}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "rows.jsonl", _long_rows(stage, 400))
    values = {
        ("dataset" if stage == "sft" else "preferences"): str(path),
        "model": str(tmp_path / "model"),
        "max_source_length": 256,
        "max_target_length": 48,
        "batch_size": 64,
        "precision": "bf16",
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 100,
        "report_to": "none",
    }
    torch.cuda.reset_peak_memory_stats()
    recipe = load_recipe(f"summarization/{stage}")
    recipe.function(validate(recipe.config_class, values | {"output_dir": str(tmp_path / "out")}))
    measured = torch.cuda.max_memory_allocated()
    chain = load(f"summarization/{stage}", None)
    (found,) = estimate_chain(chain, [f"{k}={v}" for k, v in values.items()], DEVICES["a100-80gb"], Launch())
    assert found.total == pytest.approx(measured, rel=0.15)


def test_the_table_is_of_models_that_can_be_made():
    for name in KNOWN:
        assert model_config(name).is_encoder_decoder

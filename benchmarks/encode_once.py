"""What encoding the source once is worth: a DPO training step against one that repeats the source for each completion.

    python benchmarks/encode_once.py [--shapes 16x128x32x2 16x512x64x2] [--rounds 20] [--seconds 12] [--bf16]

Both sides train the same random T5 on the same batch (forward, sigmoid DPO loss against cached reference
log-probabilities, backward, AdamW step) and reach the same loss; one repeats each source K times through the model's
own forward, the other encodes it once through the view. They take turns within one process, so that a machine that
slows down slows both; what is quoted is the median of the ratios of neighbours. Writes results/encode_once.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

from pipelines.seq2seq.losses import dpo_loss, sequence_sum, token_log_probs
from pipelines.seq2seq.view import as_view, decoder_inputs, encode, sequence_log_probs

RESULTS = Path(__file__).resolve().parent / "results" / "encode_once.json"


def small_t5(d_model: int, layers: int, vocabulary: int) -> T5ForConditionalGeneration:
    """A random T5 of the given size (heads of 32, feed-forward 4·d_model), the same at every call."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=d_model,
        d_kv=32,
        d_ff=4 * d_model,
        num_layers=layers,
        num_heads=d_model // 32,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).train()


def make_batch(sources: int, source: int, target: int, samples: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Ragged rows: lengths from half the shape to all of it, as length-grouped batches of real text have."""
    generator = torch.Generator().manual_seed(1)

    def ragged(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.randint(width // 2, width + 1, (rows, 1), generator=generator)
        lengths[0] = width
        mask = (torch.arange(width) < lengths).long()
        return torch.randint(3, vocabulary, (rows, width), generator=generator) * mask, mask

    source_ids, source_mask = ragged(sources, source)
    ids, mask = ragged(sources * samples, target)
    reference = torch.full((sources * samples,), -3.0 * target)
    return {"source": source_ids, "source_mask": source_mask, "ids": ids, "mask": mask, "reference": reference}


def mean_dpo_loss(log_probs: torch.Tensor, reference: torch.Tensor, samples: int) -> torch.Tensor:
    """The sigmoid loss of the first completion against each of the others (rows sample-major)."""
    policy, cached = log_probs.view(samples, -1), reference.view(samples, -1)
    return torch.stack([dpo_loss(policy[0], policy[k], cached[0], cached[k]) for k in range(1, samples)]).mean()


def repeated(model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor], samples: int) -> torch.Tensor:
    """Log-probabilities by the model's own forward, each source repeated for each completion."""
    logits = model(
        input_ids=batch["source"].repeat(samples, 1),
        attention_mask=batch["source_mask"].repeat(samples, 1),
        decoder_input_ids=decoder_inputs(model, batch["ids"]),
        use_cache=False,
    ).logits
    return sequence_sum(token_log_probs(logits, batch["ids"]), batch["mask"])


def once(model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor], samples: int) -> torch.Tensor:
    """Log-probabilities through the view: each source encoded once."""
    states = encode(model, batch["source"], batch["source_mask"])
    found = sequence_log_probs(model, states, batch["source_mask"], batch["ids"], batch["mask"], order="sample-major")
    return sequence_sum(found, batch["mask"])


def training_step(
    log_probs: Callable, model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor], samples: int, bf16: bool
) -> Callable[[], tuple[float, float]]:
    """A function that takes one optimizer step and returns (seconds, loss)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = mean_dpo_loss(log_probs(model, batch, samples), batch["reference"], samples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, loss.item()

    return step


def measure(shape: tuple[int, int, int, int], options: argparse.Namespace) -> dict[str, float | int]:
    """Time both sides at one shape (sources, source length, target length, completions a source)."""
    sources, source, target, samples = shape
    batch = make_batch(sources, source, target, samples, options.vocabulary)
    plain = small_t5(options.d_model, options.layers, options.vocabulary)
    view = as_view(small_t5(options.d_model, options.layers, options.vocabulary))
    slow = training_step(repeated, plain, batch, samples, options.bf16)
    fast = training_step(once, view, batch, samples, options.bf16)
    first, second = slow()[1], fast()[1]  # warm-up, and proof that both compute the same
    if abs(first - second) > (5e-2 if options.bf16 else 1e-3) * max(1.0, abs(first)):
        raise RuntimeError(f"the two sides differ: loss {first} and {second}")
    pairs = []
    end = time.perf_counter() + options.seconds
    for turn in range(options.rounds):
        if turn >= 4 and time.perf_counter() > end:
            break
        # Who goes first alternates: neither side always runs on the warmer machine.
        order = (slow, fast) if turn % 2 == 0 else (fast, slow)
        times = {side: side()[0] for side in order}
        pairs.append((times[slow], times[fast]))
    ratios = sorted(a / b for a, b in pairs)
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "sources": sources,
        "source_length": source,
        "target_length": target,
        "completions": samples,
        "repeated_pairs_per_second": sources / statistics.median(a for a, _ in pairs),
        "once_pairs_per_second": sources / statistics.median(b for _, b in pairs),
        "rounds": len(pairs),
        "ratio": statistics.median(ratios),
        "ratio_quarter": quarters[0],
        "ratio_three_quarters": quarters[2],
    }


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """``16x128x32x2``: sources, source length, target length, completions a source (at least 2)."""
    try:
        sources, source, target, samples = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 16x128x32x2") from None
    if min(sources, source, target) < 1 or samples < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes must be positive, completions at least 2")
    return sources, source, target, samples


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["16x128x32x2", "16x128x32x4", "8x512x64x2"]
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[parse_shape(text) for text in default])
    parser.add_argument("--rounds", type=int, default=20, help="turns of both sides at a shape, at most")
    parser.add_argument("--seconds", type=float, default=12.0, help="time for a shape, after four rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print("sources  source  target  completions   repeated       once    ratio (quartiles)")
    rows = []
    for shape in options.shapes:
        row = measure(shape, options)
        rows.append(row)
        print(
            f"{row['sources']:7}{row['source_length']:8}{row['target_length']:8}{row['completions']:13}"
            f"{row['repeated_pairs_per_second']:9.1f}/s{row['once_pairs_per_second']:9.1f}/s"
            f"{row['ratio']:9.2f} ({row['ratio_quarter']:.2f} to {row['ratio_three_quarters']:.2f})",
            flush=True,
        )
    settings = {name: getattr(options, name) for name in ("threads", "d_model", "layers", "vocabulary", "bf16")}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        # Above the number of threads others were computing too, and the figures are worth little.
        "load_average": round(os.getloadavg()[0], 1),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"unit": "sources a second, one DPO training step", **settings, **versions, "rows": rows}
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the pretraining recipe's trainer costs: its steps against a bare loop of forward, backward, step.

    python benchmarks/pretrain_throughput.py [--shapes 32x64x24 16x128x32] [--rounds 30] [--clock process]

The real trainer trains a random T5 on random tokens through the real objectives: packed span corruption and pairs of
like lengths, with logging and clipping. After each of its steps two bare loops take one on the same batch, ready-made:
one with transformers' model and loss as they are, one with the same faster layers and loss as the trainer. They take
turns within one process, so that a machine that slows down slows all; what is quoted is the median of the ratios of
neighbours, in tokens a second: 1 is as fast as the bare loop. Writes results/pretrain_throughput.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration, TrainerCallback

from pipelines.config import validate
from pipelines.precision import choose_precision
from pipelines.seq2seq.pretrain import PretrainConfig, arguments_of, as_it_is
from pipelines.seq2seq.pretrain_data import IGNORED, Mixture, PairObjective, SpanObjective, TokenRows
from pipelines.seq2seq.pretrain_spans import PackedText, packed_length
from pipelines.seq2seq.pretrain_speed import SummedCrossEntropy, train_fast_on_cpu
from pipelines.seq2seq.pretrain_trainer import PretrainTrainer
from pipelines.seq2seq.training import optimizer_choice

RESULTS = Path(__file__).resolve().parent / "results" / "pretrain_throughput.json"
SENTINELS = 100
PAD, END = 0, 1


def small_t5(options: argparse.Namespace) -> T5ForConditionalGeneration:
    """A random T5, the same at every call."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=options.vocabulary,
        d_model=options.d_model,
        d_kv=64,
        d_ff=4 * options.d_model,
        num_layers=options.layers,
        num_decoder_layers=options.decoder_layers,
        num_heads=options.d_model // 64,
        decoder_start_token_id=PAD,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).train()


def random_mixture(shape: tuple[int, int, int], steps: int, vocabulary: int) -> Mixture:
    """Span corruption and pairs, half and half, of random tokens; lengths of pairs as ragged as those of real text."""
    rows, source, target = shape
    generator = np.random.default_rng(0)

    def ragged(width: int, count: int) -> TokenRows:
        lengths = np.minimum(generator.integers(width // 4, 2 * width, count), width)
        return TokenRows(generator.integers(3, vocabulary - SENTINELS, lengths.sum()).astype(np.uint16), lengths)

    count = rows * (steps + 1)
    length = packed_length(source, 0.15, 3.0)
    stream = generator.integers(3, vocabulary - SENTINELS, count * length).astype(np.uint16)
    marks = np.arange(vocabulary - 1, vocabulary - 1 - SENTINELS, -1)
    objectives = {
        "span": SpanObjective(PackedText(stream, length), marks, 0.15, 3.0, PAD, END),
        "supervised": PairObjective(ragged(source, count), ragged(target, count), PAD),
    }
    return Mixture(objectives, {"span": 1.0, "supervised": 1.0}, steps, 1, rows, 0, PAD, PAD)


def bare_loop(
    model: PreTrainedModel, config: PretrainConfig, fast: bool, bf16: bool
) -> Callable[[dict[str, torch.Tensor]], None]:
    """A function that takes one optimizer step on a batch."""
    cls, settings = optimizer_choice(config) or (torch.optim.AdamW, {"lr": config.learning_rate})
    optimizer = cls(model.parameters(), **settings)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if fast:
                logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
                loss = SummedCrossEntropy.apply(logits, batch["labels"]) / (batch["labels"] != IGNORED).sum()
            else:
                loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


class TakeTurns(TrainerCallback):
    """After each of the trainer's steps, one step of each bare loop on the same batch."""

    def __init__(self, loops: dict[str, Callable], mixture: Mixture, clock: Callable[[], float]):
        self.loops, self.mixture, self.clock = loops, mixture, clock
        self.times: list[dict[str, float]] = []
        self._since = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the trainer's time, which covers making the batch; then time the others."""
        turn = {"trainer": self.clock() - self._since}
        number = state.global_step - 1
        batch = self.mixture.__getitems__(range(number * self.mixture.size, (number + 1) * self.mixture.size))
        # Who goes first alternates.
        for name in list(self.loops)[:: 1 if number % 2 else -1]:
            start = self.clock()
            self.loops[name](batch)
            turn[name] = self.clock() - start
        self.times.append(turn)
        self._since = self.clock()


def measure(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, float | int]:
    """Time the trainer and both loops at one shape (rows, source length, target length)."""
    rows, source, target = shape
    warm_up = 3
    clock = time.process_time if options.clock == "process" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        config = validate(
            PretrainConfig,
            {
                "output_dir": folder,
                "tokenizer": "none",
                "batch_size": rows,
                "max_steps": options.rounds + warm_up,
                "optimizer": options.optimizer,
                "learning_rate": 1e-3,
                "precision": options.precision,
                "report_to": "none",
                "logging_steps": 10,
                "save_steps": 10 * (options.rounds + warm_up),
            },
        )
        precision = choose_precision(config.precision)
        mixture = random_mixture(shape, config.max_steps, options.vocabulary)
        models = {name: small_t5(options) for name in ("trainer", "bare")}
        for model in models.values():
            train_fast_on_cpu(model, precision)
        bf16 = precision == "bf16"
        loops = {
            "bare": bare_loop(models["bare"], config, True, bf16),
            "plain": bare_loop(small_t5(options), config, False, bf16),
        }
        turns = TakeTurns(loops, mixture, clock)
        trainer = PretrainTrainer(
            model=models["trainer"],
            args=arguments_of(config, mixture.steps, save_strategy="no"),
            train_dataset=mixture,
            data_collator=as_it_is,
            callbacks=[turns],
        )
        trainer.optimizer_cls_and_kwargs = optimizer_choice(config)
        trainer.schedule, trainer.settings = mixture, argparse.Namespace(precision=precision)
        trainer.train()
        tokens = trainer.count_tokens() / mixture.steps
    times = turns.times[warm_up:]
    found: dict[str, float | int] = {"rows": rows, "source_length": source, "target_length": target}
    for name in ("trainer", "bare", "plain"):
        found[f"{name}_tokens_per_second"] = round(tokens / statistics.median(t[name] for t in times), 1)
    for name in ("bare", "plain"):
        ratios = [t[name] / t["trainer"] for t in times]
        low, _, high = statistics.quantiles(ratios, n=4)
        found |= {f"to_{name}": statistics.median(ratios), f"to_{name}_quarter": low}
        found[f"to_{name}_three_quarters"] = high
    return found | {"rounds": len(times)}


def parse_shape(text: str) -> tuple[int, int, int]:
    """``32x64x24``: rows, source length, target length."""
    try:
        rows, source, target = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 32x64x24") from None
    if rows < 1 or min(source, target) < 8:
        raise argparse.ArgumentTypeError(f"{text!r}: at least one row, and 8 tokens of source and target")
    return rows, source, target


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [parse_shape(text) for text in ("32x64x24", "16x128x32")]
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=default)
    parser.add_argument("--rounds", type=int, default=30, help="turns of all three at a shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decoder_layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--optimizer", choices=["adafactor", "adamw"], default="adafactor")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument(
        "--clock",
        choices=["wall", "process"],
        default="wall",
        help="process: processor time, for a machine with others",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()

    print("rows  source  target     trainer   bare loop  plain model   to bare (quartiles)   to plain (quartiles)")
    rows = []
    for shape in options.shapes:
        row = measure(shape, options)
        rows.append(row)
        print(
            f"{row['rows']:4}{row['source_length']:8}{row['target_length']:8}"
            + "".join(f"{row[f'{name}_tokens_per_second']:10.0f}/s" for name in ("trainer", "bare", "plain"))
            + "".join(
                f"{row[f'to_{name}']:10.2f} ({row[f'to_{name}_quarter']:.2f} to {row[f'to_{name}_three_quarters']:.2f})"
                for name in ("bare", "plain")
            ),
            flush=True,
        )
    settings = ("threads", "d_model", "layers", "decoder_layers", "vocabulary", "optimizer", "clock")
    written = {
        "unit": "tokens a second, source and target, one training step",
        **{name: getattr(options, name) for name in settings},
        "precision": choose_precision(options.precision),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        # Above the number of threads others were computing too, and wall-clock figures are worth little.
        "load_average": round(os.getloadavg()[0], 1),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

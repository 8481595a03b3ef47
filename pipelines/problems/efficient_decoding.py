"""Efficient decoding: what a decoder's key/value cache computes, and what it saves over source and target length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.errors import Problem
from pipelines.problems.exercise import Answer, ExerciseConfig, Figure

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import T5ForConditionalGeneration

    from pipelines.problems.decoding_transformer import EncoderDecoder, Sizes

LABELS = {
    "naive": "all anew",
    "encode_once": "encoded once",
    "cached": "cached",
    "t5_anew": "T5 anew",
    "t5_cached": "T5 cached",
}


@config
class EfficientDecodingConfig(ExerciseConfig):
    """Measure naive and cached generation of a small transformer and of T5, over source and target length."""

    output_dir: str = Field(
        "runs/efficient_decoding", description="folder the stage writes into", json_schema_extra=INERT
    )
    vocabulary: int = Field(256, ge=8, le=100_000, description="tokens")
    width: int = Field(96, ge=4, le=4096, description="of the states: even, and a multiple of heads")
    heads: int = Field(4, ge=1, le=64, description="of each attention")
    inner: int = Field(384, ge=4, le=16384, description="units of the feed-forward networks")
    layers: int = Field(2, ge=1, le=24, description="of the encoder, and of the decoder")
    batch_size: int = Field(4, ge=1, description="sources that are generated from together")
    source_length: int = Field(16, ge=1, description="tokens of the source while the target's length varies")
    target_length: int = Field(32, ge=1, description="tokens generated while the source's length varies")
    source_lengths: list[int] = Field(
        [32, 64, 128, 256, 512], min_length=3, max_length=20, description="source lengths that are measured, rising"
    )
    target_lengths: list[int] = Field(
        [12, 24, 48, 96, 192], min_length=3, max_length=20, description="target lengths that are measured, rising"
    )
    repeats: int = Field(3, ge=1, description="times that each is timed; the least counts")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.width % self.heads or self.width % 2:
            mend = f"give an even multiple of {self.heads}"
            found.append(Problem("width", self.width, f"is odd, or does not split into {self.heads} heads", mend))
        for name in ("source_lengths", "target_lengths"):
            values = getattr(self, name)
            if values != sorted(set(values)) or values[0] < 1:
                found.append(Problem(name, values, "do not rise from 1 or more", "give rising lengths, each once"))
        return found


def efficient_decoding(config: EfficientDecodingConfig) -> dict[str, float]:
    """Check that cached decoding equals teacher forcing, count and time generation, and fit exponents.

    Returns:
        ``efficient_decoding/HOW_target_exponent`` and ``…_source_exponent``: slope of log seconds on log length, with
        its interval, for naive, encode_once and cached; ``efficient_decoding/speedup``: seconds of naive over cached at
        the longest target; ``…/checks`` and ``…/checks_failed``.

    Raises:
        UserError: several processes.
    """
    import torch

    from pipelines.problems.decoding_transformer import EncoderDecoder, Sizes
    from pipelines.problems.machine import own_device

    device = own_device()
    torch.manual_seed(config.seed)
    model = EncoderDecoder(config.vocabulary, config.width, config.heads, config.inner, config.layers).to(device).eval()
    size = Sizes(config.vocabulary, config.width, config.inner, config.layers)
    longest = max(config.source_length, *config.source_lengths)
    generator = torch.Generator().manual_seed(config.seed)
    sources = torch.randint(2, config.vocabulary, (config.batch_size, longest), generator=generator).to(device)
    targets = torch.randint(2, config.vocabulary, (config.batch_size, 24), generator=generator).to(device)
    t5 = small_t5(config).to(device)

    answer = Answer(config, "efficient_decoding", "Efficient decoding: keys and values that are kept")
    source = sources[:, : config.source_length]
    _check_own(answer, model, source, targets)
    _check_t5(answer, t5, source, targets)
    _check_counts(answer, model, size, source)
    metrics = _measure(answer, model, t5, size, sources, config)
    answer.value(
        width=config.width,
        layers=config.layers,
        batch_size=config.batch_size,
        source_length=config.source_length,
        target_length=config.target_length,
        cache_kib=4 * 2 * config.layers * config.width * (config.target_lengths[-1] + config.source_length) / 1024,
    )
    return answer.write() | metrics


def small_t5(config: EfficientDecodingConfig) -> T5ForConditionalGeneration:
    """A random T5 of the same sizes, in evaluation mode."""
    from transformers import T5Config, T5ForConditionalGeneration

    made = T5Config(
        vocab_size=config.vocabulary,
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.inner,
        num_layers=config.layers,
        num_heads=config.heads,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(made).eval()


def t5_one_by_one(t5: T5ForConditionalGeneration, source: Tensor, target: Tensor) -> Tensor:
    """Logits (n, t, vocabulary) of T5 fed one token of the target (n, t) at a time, its cache handed on."""
    import torch

    with torch.no_grad():
        states = t5.get_encoder()(source)
        past, found = None, []
        for place in range(target.shape[1]):
            step = t5(
                encoder_outputs=states,
                decoder_input_ids=target[:, place : place + 1],
                past_key_values=past,
                use_cache=True,
            )
            past = step.past_key_values
            found.append(step.logits)
    return torch.cat(found, dim=1)


def _check_own(answer: Answer, model: EncoderDecoder, source: Tensor, target: Tensor) -> None:
    import torch

    from pipelines.problems.decoding_transformer import GENERATORS

    with torch.no_grad():
        forced = model(source, target)
        cache = model.start(model.encode(source))
        found = torch.cat([model.decode(target[:, [i]], cache) for i in range(target.shape[1])], dim=1)
        cache = model.start(model.encode(source))
        uneven = torch.cat([model.decode(part, cache) for part in target.split([5, 1, target.shape[1] - 6], 1)], dim=1)
    route = f"{target.shape[1]} tokens of {len(target)} random targets, float32"
    apart = float((found - forced).abs().max())
    answer.check("logits one token at a time − logits by teacher forcing", apart, 0.0, 1e-5, route)
    apart = float((uneven - forced).abs().max())
    answer.check("logits in parts of 5, 1 and the rest − logits by teacher forcing", apart, 0.0, 1e-5, route)
    texts = [generate(model, source, target.shape[1]) for generate in GENERATORS.values()]
    different = sum(int((text != texts[0]).sum()) for text in texts[1:])
    answer.check("tokens that differ between the three ways to generate", different, 0, 0, "greedy generation by each")


def _check_t5(answer: Answer, t5: T5ForConditionalGeneration, source: Tensor, target: Tensor) -> None:
    import torch

    with torch.no_grad():
        forced = t5(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    apart = float((t5_one_by_one(t5, source, target) - forced).abs().max())
    route = f"{target.shape[1]} tokens of {len(target)} random targets, transformers' cache, float32"
    answer.check("T5: logits one token at a time − logits by teacher forcing", apart, 0.0, 1e-5, route)


def _check_counts(answer: Answer, model: EncoderDecoder, size: Sizes, source: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from pipelines.problems.decoding_transformer import GENERATORS, generation_macs

    for how, generate in GENERATORS.items():
        counter = FlopCounterMode(display=False)
        with counter:
            generate(model, source[:1], 9)
        statement = f"multiply-accumulates of 9 tokens from {source.shape[1]}, {LABELS[how]} = the formula's"
        expected = generation_macs(size, how, source.shape[1], 9)
        route = "torch.utils.flop_counter while it ran, 2 operations for each"
        answer.check(statement, counter.get_total_flops() / 2, expected, 0, route)


def _measure(
    answer: Answer,
    model: EncoderDecoder,
    t5: T5ForConditionalGeneration,
    size: Sizes,
    sources: Tensor,
    config: EfficientDecodingConfig,
) -> dict[str, float]:
    from pipelines.problems.decoding_transformer import generation_macs
    from pipelines.problems.fits import power_law

    fixed = config.source_length
    scans = {
        "target": [(fixed, t) for t in config.target_lengths],
        "source": [(s, config.target_length) for s in config.source_lengths],
    }
    rows, metrics, longest = [], {}, {}
    for what, places in scans.items():
        lengths = [place[0] if what == "source" else place[1] for place in places]
        seconds: dict[str, list[float]] = {}
        for s, t in places:
            for how, value in _seconds(model, t5, sources[:, :s], t, config.repeats).items():
                seconds.setdefault(how, []).append(value)
        for how, values in seconds.items():
            fitted = power_law(lengths, values)
            counted = "–"
            if how in ("naive", "encode_once", "cached"):
                macs = [generation_macs(size, how, s, t) for s, t in places]
                counted = power_law(lengths, macs).shown(2)
                key = f"efficient_decoding/{how}_{what}_exponent"
                metrics |= {key: fitted.value, f"{key}_ci_low": fitted.low, f"{key}_ci_high": fitted.high}
            rows.append([LABELS[how], f"{what}, {lengths[0]} to {lengths[-1]}", fitted.shown(2), counted])
            answer.value(**{f"{how}_{what}_exponent": fitted.value})
        _draw(answer, what, lengths, seconds, [[generation_macs(size, how, s, t) for s, t in places] for how in _OWN])
        longest[what] = {how: values[-1] for how, values in seconds.items()}
    answer.table(
        "exponents",
        ["generation", "length that varies", "exponent of the seconds (95 %)", "of the multiply-accumulates"],
        rows,
        "Slope of log cost on log length by least squares, over the lengths measured.",
    )
    metrics["efficient_decoding/speedup"] = longest["target"]["naive"] / longest["target"]["cached"]
    ends = [
        [LABELS[how], f"{1000 * longest['target'][how]:,.0f}", f"{1000 * longest['source'][how]:,.0f}"]
        for how in LABELS
    ]
    columns = ["generation", f"{config.target_lengths[-1]} tokens from {fixed}, ms"]
    columns.append(f"{config.target_length} tokens from {config.source_lengths[-1]}, ms")
    answer.table(
        "seconds",
        columns,
        ends,
        f"{config.batch_size} sources together, one thread, processor time, the least of {config.repeats}.",
    )
    target, most = config.target_lengths[-1], config.source_length
    counts = {how: generation_macs(size, how, most, target) for how in _OWN}
    answer.value(
        longest_target=target,
        speedup=metrics["efficient_decoding/speedup"],
        counted_speedup=counts["naive"] / counts["cached"],
        once_speedup=longest["target"]["encode_once"] / longest["target"]["cached"],
        t5_speedup=longest["target"]["t5_anew"] / longest["target"]["t5_cached"],
    )
    return metrics


_OWN = ("naive", "encode_once", "cached")


def _seconds(
    model: EncoderDecoder, t5: T5ForConditionalGeneration, source: torch.Tensor, length: int, repeats: int
) -> dict[str, float]:
    """Seconds of the processor (of a GPU: the wall's) of generating ``length`` tokens in every way."""
    from functools import partial

    from pipelines.problems.decoding_transformer import GENERATORS
    from pipelines.problems.machine import least_seconds

    actions = {how: [partial(generate, model, source, length)] for how, generate in GENERATORS.items()}
    fixed = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False, "num_beams": 1}
    for how, kept in (("t5_anew", False), ("t5_cached", True)):
        actions[how] = [partial(t5.generate, input_ids=source, use_cache=kept, **fixed)]
    return {how: seconds.processor for how, seconds in least_seconds(actions, repeats).items()}


def _draw(
    answer: Answer, what: str, lengths: list[int], seconds: dict[str, list[float]], macs: list[list[int]]
) -> None:
    from pipelines.reporting import plots
    from pipelines.reporting.plots import Panel, Series

    times = [Series(LABELS[how], lengths, values, colour=i) for i, (how, values) in enumerate(seconds.items())]
    counts = [Series("", lengths, [m / 1e6 for m in macs[i]], colour=i) for i in range(len(macs))]
    last = {how: values[-1] for how, values in seconds.items()}
    alt = ", ".join(f"{LABELS[how]} {value:.3g} s" for how, value in last.items()) + f" at the longest {what}"
    answer.figure(
        Figure(
            f"over_{what}",
            svg=plots.lines(
                f"efficient_decoding-{what}",
                [Panel(times, "seconds (processor)", log=True), Panel(counts, "10⁶ MACs a text", log=True)],
                f"tokens of the {what}",
                alt,
                logx=True,
            ),
            caption={
                "target": "With a cache the cost grows about as the text's length; anew, the faster the longer it is.",
                "source": "Encoding the source anew for every token is what a longer source makes dear.",
            }[what],
            title=f"Cost over the {what}'s length",
        )
    )

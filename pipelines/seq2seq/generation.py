"""Writing summaries with a model: beam search, greedy, or sampling that no batching or interruption changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import config
from pipelines.errors import Problem, UserError
from pipelines.seq2seq.training import LengthConfig, tokenize_sources

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@config
class GenerationConfig(LengthConfig):
    """How summaries are written."""

    num_beams: int = Field(1, ge=1, description="beams of the beam search; 1 is greedy")
    do_sample: bool = Field(False, description="sample instead of searching")
    temperature: float = Field(1.0, gt=0, description="of sampling: the logits are divided by it")
    top_k: int = Field(0, ge=0, description="sampling: only the k likeliest tokens; 0 takes all")
    top_p: float = Field(1.0, gt=0, le=1, description="sampling: only the likeliest tokens that hold this probability")
    length_penalty: float = Field(1.0, description="beam search: above 0 favours long summaries, below 0 short ones")
    no_repeat_ngram_size: int = Field(0, ge=0, description="n-grams of this many tokens may not recur; 0 allows all")
    generation_batch_size: int = Field(64, ge=1, description="documents summarized at a time")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic; auto takes bf16 where it is measured to be faster on this device"
    )

    def problems(self) -> list[Problem]:
        """What beam search and sampling cannot be together, after what the stage's class finds."""
        parent = getattr(super(), "problems", None)  # a mixin: the stage's class brings the rest
        found: list[Problem] = parent() if parent is not None else []
        if self.do_sample and self.num_beams > 1:
            found.append(Problem("num_beams", self.num_beams, "do_sample=true does not search", "give num_beams=1"))
        if not self.do_sample:
            for name, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
                if getattr(self, name) != neutral:
                    mend = f"give do_sample=true, or leave {name} out"
                    found.append(Problem(name, getattr(self, name), "it acts on sampling only", mend))
        return found


GENERATION_FIELDS = (
    "num_beams",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "length_penalty",
    "no_repeat_ngram_size",
    "max_source_length",
    "max_target_length",
    "prefix",
)


def settings_of(settings: GenerationConfig) -> dict[str, Any]:
    """The settings that decide what is written, as shown beside results; those that do not act are left out."""
    inactive = {"temperature", "top_k", "top_p"} if not settings.do_sample else {"num_beams", "length_penalty"}
    if settings.num_beams == 1:
        inactive.add("length_penalty")
    return {name: getattr(settings, name) for name in GENERATION_FIELDS if name not in inactive}


def check_lengths(model: PreTrainedModel, lengths: LengthConfig) -> None:
    """Refuse lengths that the model has no positions for (BART reads 1,024 tokens; T5 has no such limit).

    Raises:
        UserError: naming the field and the model's limit.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    for name in ("max_source_length", "max_target_length") if limit else ():
        if getattr(lengths, name) > limit:
            what = "reads" if name == "max_source_length" else "writes"
            problem = f"{type(model).__name__} {what} at most {limit} tokens"
            raise UserError(name, getattr(lengths, name), problem, f"give {name}={limit} or less")


@contextlib.contextmanager
def inference(model: torch.nn.Module, precision: str = "fp32") -> Iterator[None]:
    """Evaluation mode, no gradients, autocast to ``precision`` (``auto`` as elsewhere); the mode is restored after."""
    import torch

    from pipelines.precision import choose_precision

    chosen = choose_precision(precision)
    device = next(model.parameters()).device.type
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[chosen]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=chosen != "fp32"):
            yield
    finally:
        model.train(was_training)


def _search_config(model: PreTrainedModel, settings: GenerationConfig, sequences: int) -> Any:
    """Every setting said outright: a checkpoint's own generation_config would silently fill in what is left open."""
    from transformers import GenerationConfig as HFGenerationConfig

    own = model.generation_config
    return HFGenerationConfig(
        **HFGenerationConfig._get_default_generation_params()
        | {
            "max_length": None,
            "max_new_tokens": settings.max_target_length,
            "num_beams": settings.num_beams,
            "num_return_sequences": sequences,
            "do_sample": False,
            "length_penalty": settings.length_penalty,
            "no_repeat_ngram_size": settings.no_repeat_ngram_size,
            # What the checkpoint's language or format needs is not a choice of the user's.
            "forced_bos_token_id": own.forced_bos_token_id,
            "suppress_tokens": own.suppress_tokens,
            "begin_suppress_tokens": own.begin_suppress_tokens,
            "decoder_start_token_id": own.decoder_start_token_id,
            "bos_token_id": own.bos_token_id,
            "eos_token_id": own.eos_token_id,
            "pad_token_id": own.pad_token_id,
        }
    )


def _sampler(settings: GenerationConfig, seed: int, keys: torch.Tensor, numbers: torch.Tensor) -> Any:
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    from pipelines.seq2seq.sampling import GumbelSampler

    warpers = LogitsProcessorList()
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))

    class TruncatedSampler(GumbelSampler):
        """Gumbel noise on the logits that top-k and top-p leave over, after the temperature."""

        def at(self, position, logits, rows=None):
            return super().at(position, warpers(None, logits.float() / settings.temperature), rows)

    return TruncatedSampler(seed, keys, numbers)


def sample_ids(
    model: PreTrainedModel,
    source_ids: torch.Tensor,
    source_mask: torch.Tensor,
    settings: GenerationConfig,
    keys: torch.Tensor,
    numbers: torch.Tensor,
    *,
    seed: int,
    eos_token_id: int,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled completions of a batch; every source is encoded once for all its samples.

    Args:
        model: an encoder-decoder (its class is swapped for the view).
        source_ids: (B, S).
        source_mask: (B, S).
        settings: temperature, top_k, top_p, no_repeat_ngram_size and max_target_length are used.
        keys: (B·K,) int64, the prompt key of each row, source-major.
        numbers: (B·K,) int64, which sample of its prompt each row is.
        seed: of the draws.
        eos_token_id: what ends a completion.
        pad_token_id: what stands after it.

    Returns:
        completion_ids and completion_mask (B·K, T), without the decoder's start token.
    """
    import torch
    from transformers import LogitsProcessorList
    from transformers.modeling_outputs import BaseModelOutput

    from pipelines.seq2seq.sampling import sample_completions
    from pipelines.seq2seq.view import as_view, encode

    model = as_view(model)
    sampler = _sampler(settings, seed, keys.to(source_ids.device), numbers.to(source_ids.device))
    samples = len(keys) // len(source_ids)
    states = encode(model, source_ids, source_mask)
    own = model.generation_config
    if not (
        settings.no_repeat_ngram_size
        or own.forced_bos_token_id is not None
        or own.suppress_tokens
        or own.begin_suppress_tokens
    ):
        return sample_completions(
            model,
            states,
            source_mask,
            sampler,
            samples=samples,
            max_new_tokens=settings.max_target_length,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
    rows = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.repeat_interleave(samples, 0)),
        attention_mask=source_mask.repeat_interleave(samples, 0),
        generation_config=_search_config(model, settings, 1),
        logits_processor=LogitsProcessorList([sampler]),
    )[:, 1:]
    ended = (rows == eos_token_id).long().cumsum(1)
    mask = ((ended - (rows == eos_token_id).long()) == 0).long()
    return torch.where(mask.bool(), rows, pad_token_id), mask


def length_sorted_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Positions in batches of ``size``, longest first, equal ones in order: little padding, the largest batch first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def source_batches(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    settings: GenerationConfig,
    *,
    progress: str | None = None,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Documents tokenized, in padded batches of like length on the model's device.

    Args:
        model: whose device it is.
        tokenizer: its tokenizer.
        documents: texts, without the prefix.
        settings: prefix, length and batch size are used.
        progress: what the progress bar says; no bar without it.

    Yields:
        The positions of B documents, their ids (B, S) and their mask (B, S).
    """
    from tqdm.auto import tqdm

    from pipelines.seq2seq.collators import pad_rows

    device = next(model.parameters()).device
    sources = tokenize_sources(tokenizer, list(documents), settings)["input_ids"] if len(documents) else []
    with tqdm(total=len(sources), desc=progress, unit="doc", disable=progress is None) as bar:
        for batch in length_sorted_batches([len(row) for row in sources], settings.generation_batch_size):
            ids, mask = pad_rows([sources[i] for i in batch], tokenizer.pad_token_id)
            yield batch, ids.to(device), mask.to(device)
            bar.update(len(batch))


def generate_summaries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    settings: GenerationConfig,
    *,
    ids: Sequence[str] | None = None,
    num_return_sequences: int = 1,
    seed: int = 0,
    progress: str | None = None,
) -> list[list[str]]:
    """Summaries of every document, in the documents' order.

    Sampling draws from softmax(logits / temperature) with noise that depends on (seed, document id, sample number,
    position) alone, so neither the batching nor an earlier interruption changes what is written.

    Args:
        model: an encoder-decoder on the device that is to be used.
        tokenizer: its tokenizer.
        documents: N texts, without the prefix.
        settings: how they are written.
        ids: N ids that name the documents in the noise; their texts by default.
        num_return_sequences: K summaries for each document: samples, or the best of the beam.
        seed: of the sampling.
        progress: what the progress bar says; no bar without it.

    Returns:
        N lists of K texts.

    Raises:
        UserError: a search with fewer beams than K, or lengths the model has no positions for.
    """
    import torch

    from pipelines.seq2seq.sampling import prompt_keys

    check_lengths(model, settings)
    if not settings.do_sample and num_return_sequences > settings.num_beams:
        mend = f"give do_sample=true, or num_beams={num_return_sequences}"
        raise UserError("num_beams", settings.num_beams, f"cannot give {num_return_sequences} summaries each", mend)
    keys = prompt_keys(documents if ids is None else ids) if settings.do_sample else None
    found: list[list[str]] = [[] for _ in documents]
    batches = source_batches(model, tokenizer, documents, settings, progress=progress)
    with inference(model, settings.precision):
        for batch, source_ids, source_mask in batches:
            if keys is not None:
                rows, _ = sample_ids(
                    model,
                    source_ids,
                    source_mask,
                    settings,
                    keys[batch].repeat_interleave(num_return_sequences),
                    torch.arange(num_return_sequences).repeat(len(batch)),
                    seed=seed,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            else:
                rows = model.generate(
                    input_ids=source_ids,
                    attention_mask=source_mask,
                    generation_config=_search_config(model, settings, num_return_sequences),
                )
            texts = [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
            for place, index in enumerate(batch):
                found[index] = texts[place * num_return_sequences : (place + 1) * num_return_sequences]
    return found

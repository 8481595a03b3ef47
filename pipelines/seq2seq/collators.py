"""Batches of preference pairs in the decoder-side layout, and the order in which they come.

A batch of B pairs has 2·B decoder rows, ``[chosen; rejected]``, and B sources as side inputs, each encoded once.
Nothing is ever cut here and no boundary between source and completion is looked for: they are different tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from pipelines.corpus.token_cache import CACHED_FROM, made_once, token_folder
from pipelines.errors import UserError
from pipelines.seq2seq.stacks import source_name, unwrap
from pipelines.seq2seq.streamed import StreamedExamples
from pipelines.seq2seq.training import LengthConfig, tokenize_sources, tokenize_targets
from pipelines.stage import write_json

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of a tokenized preference set: lists of ids; completions without a start token, with the end token. A set
whose sources are not text has no ``prompt_ids``."""


class SourceExample(TypedDict):
    """What PPO's trainer knows of a source: its tokens, and texts for the reward functions.

    A source that is not text holds its array under the encoder's name for it, or what ``collate_sources`` needs.
    """

    id: str
    input_ids: NotRequired[list[int]]
    document: str
    references: list[str]


CollateSources = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
"""Makes a batch of B sources from examples: tensors (B, …) under the encoder's own argument names."""


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Ragged rows of ids, padded on the right.

    Args:
        rows: R lists of ids.
        value: the padding id.

    Returns:
        ids (R, T) and their mask (R, T), both int64.
    """
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    ids = np.full((len(rows), lengths.max()), value, dtype=np.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def join_rows(parts: Sequence[Tensor], value: float) -> Tensor:
    """Batches of unlike lengths, one below the other.

    Args:
        parts: tensors (Rᵢ, Tᵢ, …), such as tokens, or frames of speech.
        value: what the shorter ones are filled up with, behind their last place.

    Returns:
        (Σ Rᵢ, max Tᵢ, …).
    """
    longest = max(part.shape[1] for part in parts)
    # `pad` counts from the last dimension.
    filled = (pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1]), value=value) for part in parts)
    return torch.cat(list(filled))


@dataclass
class TextSources:
    """Sources that are token ids: pads a column on the right, to ``input_ids`` and ``attention_mask`` (B, S).

    Args:
        pad_id: the encoder's padding id.
        column: where an example holds its ids.
    """

    pad_id: int
    column: str = "prompt_ids"

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (B, S) int64 of B examples, the mask 1 on real tokens."""
        ids, mask = pad_rows([example[self.column] for example in examples], self.pad_id)
        return {"input_ids": ids, "attention_mask": mask}


@dataclass
class FeatureSources:
    """Sources that are arrays of one shape, such as log-mel features or pixels: stacks a column to (B, …) fp32.

    Args:
        name: the column, and what the encoder calls it.
    """

    name: str

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The arrays of B examples, (B, …) fp32 under their name."""
        arrays = [torch.as_tensor(np.asarray(example[self.name]), dtype=torch.float32) for example in examples]
        return {self.name: torch.stack(arrays)}


def sources_of(model: Any, pad_id: int, column: str = "prompt_ids") -> CollateSources:
    """How a model's sources are collated where nothing else is said: by what its encoder calls them.

    Args:
        model: an encoder-decoder.
        pad_id: padding id of token ids.
        column: where an example holds its token ids.
    """
    name = source_name(model)
    return TextSources(pad_id, column) if name == "input_ids" else FeatureSources(name)


def check_reads_text(model: Any, takes: str) -> None:
    """Refuse a model of speech or images where sources are token ids and nothing else.

    Args:
        model: an encoder-decoder.
        takes: who takes what, for the message: ``GRPO takes``.

    Raises:
        UserError: the model's encoder reads something else.
    """
    name = source_name(model)
    if name != "input_ids":
        problem = f"reads {name}, and {takes} sources of text only"
        mend = "give a model that reads text, or align this one by DPO or PPO"
        raise UserError("model", type(unwrap(model)).__name__, problem, mend)


@dataclass
class PairCollator:
    """Collates preference pairs for TRL's DPOTrainer and for the reward trainer.

    Args:
        pad_id: padding id of encoder and decoder.
        start_id: the token every decoder row begins with.
        collate_sources: makes the batch of sources; by default of the token ids in ``prompt_ids``.

    A call takes B examples with ``PAIR_COLUMNS`` (and, where present, ``ref_chosen_logps``, ``ref_rejected_logps``,
    ``margin``, each a number) and returns

    - ``input_ids``, ``attention_mask`` (2·B, 1 + T): ``[start; completion]``, chosen rows first;
    - ``completion_mask`` (2·B, 1 + T): 1 on the completion's tokens, its end token included, 0 on the start token;
    - ``encoder_input_ids``, ``encoder_attention_mask`` (B, S): the sources, once; sources of another kind likewise
      under ``encoder_`` and their own name;
    - the numbers as (B,) fp32.
    """

    pad_id: int
    start_id: int
    collate_sources: CollateSources | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        completions = [example[side] for side in ("chosen_ids", "rejected_ids") for example in examples]
        ids, mask = pad_rows([[self.start_id, *completion] for completion in completions], self.pad_id)
        completion_mask = mask.clone()
        completion_mask[:, 0] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion_mask}
        sources = (self.collate_sources or TextSources(self.pad_id))(examples)
        batch |= {f"encoder_{name}": value for name, value in sources.items()}
        for name in ("ref_chosen_logps", "ref_rejected_logps", "margin"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch


class LengthGroupedSampler(Sampler[int]):
    """A random order in which the examples of a step are of like length, so that little is padded.

    Indices are shuffled, cut into pools of 50 steps, sorted by length within a pool, and the steps shuffled. Examples
    that make no whole step (fewer than ``step_size``, others in every epoch) are left out of an epoch.
    The order depends on ``seed`` and ``epoch`` alone. (transformers' sampler of the same name draws from the global
    generator, so a run resumed in the middle of an epoch sees other batches than the uninterrupted one.)

    Args:
        lengths: a length for each example.
        step_size: examples of one optimizer step over all processes.
        seed: of the order.
    """

    _STEPS_IN_POOL = 50

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int = 0):
        self.lengths = list(lengths)
        self.step_size = max(1, step_size)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths) // self.step_size * self.step_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the same epoch always has the same order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool_size = self.step_size * self._STEPS_IN_POOL
        steps: list[list[int]] = []
        for start in range(0, len(shuffled), pool_size):
            # The shuffled position breaks ties, so equal lengths do not fall back into the order of the file.
            pool = sorted(shuffled[start : start + pool_size], key=lambda index: self.lengths[index])
            steps.extend(pool[i : i + self.step_size] for i in range(0, len(pool), self.step_size))
        # A step that is not full would weigh its examples more, and be filled up where several processes share it.
        full = [step for step in steps if len(step) == self.step_size]
        for number in torch.randperm(len(full), generator=generator).tolist():
            yield from full[number]


class SetEpoch(TrainerCallback):
    """Tells a sampler which epoch begins, also where accelerate's wrappers do not pass it on (mid-epoch resume)."""

    def __init__(self, sampler: LengthGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class GroupedByLength:
    """Mixin for a Trainer over tokenized pairs: takes its examples in the order of ``LengthGroupedSampler``, of a
    stream in the stream's own.

    Raises:
        ValueError: when training begins, if there are fewer examples than one step takes.
    """

    def __init__(self, *given: Any, args: TrainingArguments, **options: Any):
        # The sampler gives whole steps only; unless it is told so, accelerate cuts what is logged of the last one.
        args.dataloader_drop_last = True
        self._counted: list[int] | None = None
        super().__init__(*given, args=args, **options)

    def _lengths(self, dataset: Dataset) -> list[int]:
        """Tokens of each example."""
        return pair_lengths(dataset)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StreamedExamples):
            return SequentialSampler(dataset)
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if len(dataset) < step_size:
            raise ValueError(f"{len(dataset)} examples are fewer than the {step_size} of one step")
        sampler = LengthGroupedSampler(self._lengths(dataset), step_size, seed)
        self.remove_callback(SetEpoch)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6·(parameters × tokens), forward and backward, of encoder and decoder each (Kaplan et al. 2020, section 2.1).

        The Trainer's own count is of the decoder's tokens alone, and goes over every module at each step.

        Args:
            inputs: a batch; a source that is not text counts with its first length.
        """
        if self._counted is None:
            inner = unwrap(self.model)
            stacks = inner.get_encoder(), inner.get_decoder()
            embeddings = {id(p) for m in inner.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
            self._counted = [sum(p.numel() for p in m.parameters() if id(p) not in embeddings) for m in stacks]
        sources = next((v for name, v in inputs.items() if name.startswith("encoder_") and v.dim() > 1), None)
        tokens = 0 if sources is None else len(sources) * sources.shape[1], inputs["input_ids"].numel()
        return 6 * sum(count * read for count, read in zip(self._counted, tokens, strict=True))


def pair_lengths(pairs: Dataset) -> list[int]:
    """Tokens of each tokenized pair: of its source, where that is text, and of both completions."""
    columns = [column for column in PAIR_COLUMNS if column in pairs.column_names]
    return token_counts(pairs, columns).tolist()


def token_counts(examples: Dataset, columns: Sequence[str]) -> np.ndarray:
    """(N,) ids that each example has in these columns, none of which becomes a list of Python's.

    Args:
        examples: N of them.
        columns: of lists of ids, or of lists of such lists.
    """
    table = examples.with_format("arrow").select_columns(list(columns))[:]
    counts = np.zeros(len(examples), dtype=np.int64)
    for column in columns:
        lists = table[column].combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy()
        if pa.types.is_list(lists.type.value_type):
            ends = np.concatenate([[0], np.cumsum(pc.list_value_length(pc.list_flatten(lists)).to_numpy())])
            places = np.concatenate([[0], np.cumsum(lengths)])
            lengths = np.diff(ends[places])
        counts += lengths
    return counts


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    lengths: LengthConfig,
    *,
    keep: Sequence[str] = (),
    with_sources: bool = True,
) -> tuple[Dataset, dict[str, int]]:
    """Token ids of preference pairs: in memory, those of a large set in the cache; no file is written beside the data.

    Args:
        dataset: with the text columns ``prompt``, ``chosen`` and ``rejected``.
        tokenizer: of the model that will read them.
        lengths: prefix and lengths; what is longer is cut, its end token kept.
        keep: further columns to keep.
        with_sources: False where sources are not text; then there is no ``prompt`` and no ``prompt_ids``.

    Returns:
        The set with ``PAIR_COLUMNS`` and those kept, and how many ``documents`` and ``summaries`` were cut.
    """
    cut = {"documents": 0, "summaries": 0}

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        columns = {}
        if with_sources:
            sources = tokenize_sources(tokenizer, batch["prompt"], lengths)
            cut["documents"] += sources["truncated"]
            columns["prompt_ids"] = sources["input_ids"]
        for side in ("chosen", "rejected"):
            targets = tokenize_targets(tokenizer, batch[side], lengths)
            cut["summaries"] += targets["truncated"]
            columns[f"{side}_ids"] = targets["input_ids"]
        return columns

    ids = List(Value("int32"))
    features = Features(
        {name: dataset.features[name] for name in keep if name in dataset.features}
        | dict.fromkeys(PAIR_COLUMNS if with_sources else PAIR_COLUMNS[1:], ids)
    )

    def tokenized(**where: Any) -> Dataset:
        return dataset.map(
            tokenize,
            batched=True,
            load_from_cache_file=False,
            features=features,
            remove_columns=[name for name in dataset.column_names if name not in features],
            new_fingerprint=f"{dataset._fingerprint[:48]}-pairs",
            desc="tokenizing pairs",
            **where,
        )

    if len(dataset) < CACHED_FROM or not with_sources or set(features) != set(PAIR_COLUMNS):
        return tokenized(keep_in_memory=True), cut
    settings = [lengths.max_source_length, lengths.max_target_length, lengths.prefix]
    folder = token_folder("preferences", dataset, ("prompt", "chosen", "rejected"), tokenizer, settings)

    def make(partial: Path) -> None:
        tokenized(cache_file_name=str(partial / "pairs.arrow"))
        write_json(partial / "cut.json", cut)

    made_once(folder, make)
    cut = json.loads((folder / "cut.json").read_text(encoding="utf-8"))
    return Dataset.from_file(str(folder / "pairs.arrow")), cut

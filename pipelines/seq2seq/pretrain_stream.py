"""Pretraining on a stream: a pool of documents is tokenized, becomes a small mixture of objectives, and is left behind.

Training begins when the first pool is there, and memory holds one pool however long the text is. A pool gives as many
batches as the objective that is first through its part of the pool, by the weights; so no text of a pool is seen twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from pipelines.config import config
from pipelines.corpus.fields import CorpusFields, StreamFields
from pipelines.corpus.stream import Cursor, MixedStream, corpus_stream, limits_of, text_stream
from pipelines.errors import UserError
from pipelines.seq2seq.pretrain_data import Mixture, Objective, TokenRows, model_inputs, seed_of
from pipelines.seq2seq.pretrain_text import FILES, rows_of_pairs, rows_of_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipelines.seq2seq.pretrain import PretrainConfig
    from pipelines.seq2seq.pretrain_trainer import HeldOut

_KEPT = 3

Examples = Sequence[dict[str, Any]]


@config
class _Pairs(StreamFields, CorpusFields):
    """The stream of documents with summaries beside the text."""

    seed: int = 0


class _Begin(NamedTuple):
    """Where a pool begins: its first batch, and where each set of the text and of the pairs stands."""

    batch: int
    texts: list[Cursor]
    pairs: list[Cursor]


class StreamedMixture(Dataset):
    """All batches of a run, as ``Mixture``, made a pool of documents at a time; to be read from the front to the back.

    Args:
        texts: the raw documents.
        pairs: documents with summaries, or None.
        objectives_of: (texts, pairs) -> objectives over them.
        weights: of the objectives; shares of the batches.
        steps: optimizer steps.
        batches_a_step: batches of one optimizer step (gradient accumulation).
        size: rows of a batch, over all devices.
        seed: of every choice.
        pad: padding id.
        start: id of the decoder's start token.
        copy_steps: the first steps have the objective ``copy`` alone.
    """

    def __init__(
        self,
        texts: MixedStream,
        pairs: MixedStream | None,
        objectives_of: Callable[[Examples, Examples], Mapping[str, Objective]],
        weights: Mapping[str, float],
        *,
        steps: int,
        batches_a_step: int,
        size: int,
        seed: int,
        pad: int,
        start: int,
        copy_steps: int = 0,
    ):
        self.texts, self.pairs, self.objectives_of, self.weights = texts, pairs, objectives_of, dict(weights)
        self.steps, self.batches_a_step, self.size, self.seed = steps, batches_a_step, size, seed
        self.pad, self.start, self.copy_steps = pad, start, copy_steps
        self._begins: dict[int, _Begin] = {0: _Begin(0, texts.start(), [] if pairs is None else pairs.start())}
        self._pool: tuple[int, Mixture] | None = None

    def __len__(self) -> int:
        return self.steps * self.batches_a_step * self.size

    def _mixture(self, number: int) -> Mixture:
        """The batches of pool ``number``; notes where the next pool begins."""
        begin = self._begins[number]
        texts = self.texts.pool(number, begin.texts)
        pairs = None if self.pairs is None else self.pairs.pool(number, begin.pairs)
        objectives = self.objectives_of(texts.examples, [] if pairs is None else pairs.examples)
        passes = {name: objective.batches_a_pass(self.size) for name, objective in objectives.items()}
        copied = self.copy_steps * self.batches_a_step - begin.batch
        weights = {"copy": 1.0} if copied > 0 else self.weights
        whole = sum(weights.values())
        count = int(min(passes[name] * whole / weight for name, weight in weights.items()))
        count = (min(count, copied) if copied > 0 else count) // self.batches_a_step
        if not count:
            least = min(weights, key=lambda name: passes[name] / weights[name])
            problem = f"so many documents give {passes[least]} batches of {least}, and one step takes more"
            raise UserError("shuffle_buffer", self.texts.pool_size, problem, "raise it, or lower batch_size")
        mixture = Mixture(
            {name: objectives[name] for name in weights},
            weights,
            count,
            self.batches_a_step,
            self.size,
            seed_of(self.seed, number),
            self.pad,
            self.start,
        )
        after = _Begin(begin.batch + count * self.batches_a_step, texts.after, [] if pairs is None else pairs.after)
        self._begins[number + 1] = after
        for old in [key for key in self._begins if 0 < key <= number - _KEPT]:
            del self._begins[old]
        return mixture

    def _found(self, batch: int) -> tuple[Mixture, int]:
        """The pool that has a batch, and the batch's number in it."""
        number = max(pool for pool, begin in self._begins.items() if begin.batch <= batch)
        while True:
            if self._pool is None or self._pool[0] != number:
                self._pool = number, self._mixture(number)
            if batch < self._begins[number + 1].batch:
                return self._pool[1], batch - self._begins[number].batch
            number += 1

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any]:
        batch = positions[0] // self.size
        mixture, number = self._found(batch)
        sources, targets = mixture.arrays(number)
        within = np.asarray(positions) - batch * self.size
        return model_inputs(sources[within], targets[within], self.pad, self.start)

    def passes(self, step: int) -> dict[str, float]:
        """Nothing: a stream is not known to have been gone through."""
        return {}

    def epoch_at(self, step: int) -> float:
        """The share of the run that is done."""
        return step / self.steps

    def skipped(self) -> int:
        """Rows left out so far because they could not be used."""
        last = self._begins[max(self._begins)]
        return sum(cursor.skipped for cursor in (*last.texts, *last.pairs))

    def state(self) -> dict[str, Any]:
        """Where the latest pools begin."""
        return {
            "begins": {
                str(pool): [begin.batch, [list(c) for c in begin.texts], [list(c) for c in begin.pairs]]
                for pool, begin in self._begins.items()
            }
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._begins |= {
            int(pool): _Begin(batch, [Cursor(*c) for c in texts], [Cursor(*c) for c in pairs])
            for pool, (batch, texts, pairs) in state["begins"].items()
        }


def _token_rows(rows: Sequence[Sequence[int]]) -> TokenRows:
    flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=sum(map(len, rows)))
    return TokenRows(flat, np.array([len(row) for row in rows], dtype=np.int64))


def streamed_mixture(
    settings: PretrainConfig, tokenizer: PreTrainedTokenizerBase, start: int
) -> tuple[StreamedMixture, HeldOut]:
    """What a stage trains on and measures where its text is streamed.

    Args:
        settings: of the stage.
        tokenizer: of the model.
        start: id of the decoder's start token.

    Raises:
        UserError: from the data; no held-out documents.
    """
    from accelerate import PartialState

    from pipelines.seq2seq.pretrain import held_out_of, objectives_of, sentinel_ids, token_settings

    chosen, names = token_settings(settings), list(settings.weights())
    sentinel = next(iter(sentinel_ids(tokenizer)), -1)

    def objectives(texts: Examples, pairs: Examples, where: str = "a pool of the stream") -> dict[str, Objective]:
        found: dict[str, list[list[int]]] = {name: [] for name in FILES}
        raw = [example["text"] for example in texts]
        documents, summaries = ([example[name] for example in pairs] for name in ("document", "summary"))
        for rows in (
            rows_of_texts(raw, tokenizer, chosen, names, sentinel, not pairs),
            rows_of_pairs(documents, summaries, tokenizer, chosen, names) if pairs else {},
        ):
            for name, ids in rows.items():
                found[name] += ids
        return objectives_of(settings, tokenizer, lambda name: _token_rows(found[name]), where)

    texts, pairs, held_out_pairs = text_stream(settings, step_size=1), None, []
    if settings.pairs is not None:
        shared = {name: getattr(settings, name) for name in ("seed", "shuffle_buffer", "bad_rows")}
        pairs = corpus_stream(_Pairs(dataset=settings.pairs, streaming=True, **shared), step_size=1)
        wanted = max(settings.rouge_examples, settings.eval_examples)
        (held_out_pairs,) = pairs.held_out({"validation": wanted})["validation"]
    size = settings.batch_size * PartialState().num_processes
    mixture = StreamedMixture(
        texts,
        pairs,
        objectives,
        settings.weights(),
        steps=settings.max_steps,
        batches_a_step=settings.gradient_accumulation,
        size=size,
        seed=settings.seed,
        pad=tokenizer.pad_token_id,
        start=start,
        copy_steps=settings.copy_steps,
    )
    limits = {"validation": min(settings.eval_examples, *limits_of(settings, ("validation",)).values())}
    of_sets = texts.held_out(limits)["validation"]
    measured = objectives([row for rows in of_sets for row in rows], held_out_pairs, "its held-out part")
    if len(of_sets) > 1:
        for name, rows in zip(settings.set_names(), of_sets, strict=True):
            alone = objectives(rows, held_out_pairs, f"the held-out part of {name}")
            measured |= {f"{kind}_{name}": alone[kind] for kind in ("span", "gap") if kind in alone}
    return mixture, held_out_of(settings, tokenizer, measured, held_out_pairs[: settings.rouge_examples])

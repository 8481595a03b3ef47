"""A transformers model in this process as a backend: causal or encoder-decoder, batched, its padding never seen.

Prompts of one batch are padded on the left with their true positions given, so that what a row gets does not depend on
its neighbours. A model whose soft prompt takes no positions (PEFT's prompt learning) gets batches of equally long
prompts instead, which need no padding at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutput

from pipelines.errors import UserError
from pipelines.prompting.backends import ChoiceScore, Generation, Sampling, TokenProbability
from pipelines.prompting.backends_fields import adapter_config, check_local
from pipelines.prompting.backends_text import Reader
from pipelines.seq2seq.generation import inference, length_sorted_batches
from pipelines.seq2seq.models import loading_error
from pipelines.seq2seq.sampling import gumbel_noise, prompt_keys, stream_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_local(path: str, field: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal or encoder-decoder model, or one with a PEFT adapter, and its tokenizer, on this process's device.

    Args:
        path: folder or hub id.
        field: the configuration field that named it, for messages.

    Raises:
        UserError: missing, without weights or tokenizer, not a language model, or not loadable without remote code.
    """
    from accelerate import PartialState
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    check_local(path, field)
    adapter = adapter_config(path)
    if adapter is not None:
        from peft import PeftModel

        base, tokenizer = load_local(str(adapter["base_model_name_or_path"]), field)
        try:
            model = PeftModel.from_pretrained(base, str(Path(path).expanduser()))
        except Exception as error:
            raise loading_error(field, path, "adapter", error) from error
        return model.to(PartialState().device).eval(), tokenizer
    found = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
    try:
        config = AutoConfig.from_pretrained(found)
        cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        # safetensors only: a pickle could run code.
        model, loading = cls.from_pretrained(found, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(found)
    except Exception as error:
        raise loading_error(field, path, "model", error) from error
    if loading["missing_keys"]:
        problem = f"its weights are not those of a language model ({min(loading['missing_keys'])} is missing)"
        raise UserError(field, path, problem, "give one that writes text")
    return model.to(PartialState().device).eval(), tokenizer


class LocalBackend:
    """A model and its tokenizer.

    Args:
        model: causal or encoder-decoder, on its device; a PEFT model around one as well.
        tokenizer: its tokenizer.
        name: what it is called in results and messages.
        batch_size: rows in one forward pass.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto``.
        chat: put every prompt into the tokenizer's chat template as the user's message.

    Raises:
        UserError: ``chat`` with a tokenizer that has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "model",
        batch_size: int = 16,
        precision: str = "fp32",
        chat: bool = False,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.batch_size, self.precision = batch_size, precision
        self.device = next(model.parameters()).device
        own = getattr(model, "active_peft_config", None)
        learns_prompt = own is not None and own.is_prompt_learning
        self.pads = not learns_prompt
        self.virtual_tokens = own.num_virtual_tokens if learns_prompt else 0
        self.reader = Reader(
            tokenizer,
            model.config,
            name=name,
            chat=chat,
            virtual_tokens=self.virtual_tokens,
            ends=getattr(model.generation_config, "eos_token_id", None),
        )
        self.ends = self.reader.ends
        pad = tokenizer.pad_token_id
        # Only masked places hold it, so any token will do.
        self.pad = pad if pad is not None else (self.ends[0] if self.ends else 0)
        inner = model.get_base_model() if own is not None else model
        self.arguments = set(inspect.signature(inner.forward).parameters)

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Positions of rows that go through the model together."""
        if self.pads:
            yield from length_sorted_batches([len(row) for row in rows], self.batch_size)
            return
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(index)
        for length in sorted(by_length, reverse=True):
            same = by_length[length]
            yield from (same[start : start + self.batch_size] for start in range(0, len(same), self.batch_size))

    def _padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """ids and mask (B, longest)."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids[number, place] = torch.tensor(row, dtype=torch.int64)
            mask[number, place] = 1
        return ids.to(self.device), mask.to(self.device)

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, *, samples: int = 1, progress: str | None = None
    ) -> list[list[Generation]]:
        """``samples`` answers to each prompt.

        At temperature 0 each is the likeliest token at every place, all samples alike. Above it the noise depends on
        (seed, prompt, sample, position) alone, so neither the batch nor an interruption changes an answer.

        Raises:
            UserError: a prompt that is too long for the model.
        """
        answers = self._answers(prompts, sampling, samples, 0, progress)
        return [[generation for generation, _ in row] for row in answers]

    def token_probabilities(
        self, prompts: Sequence[str], sampling: Sampling, *, alternatives: int = 5
    ) -> list[list[TokenProbability]]:
        """The tokens of one answer to each prompt, the likeliest ``alternatives`` beside each."""
        return [row[0][1] for row in self._answers(prompts, sampling, 1, alternatives, None)]

    def _answers(
        self, prompts: Sequence[str], sampling: Sampling, samples: int, alternatives: int, progress: str | None
    ) -> list[list[tuple[Generation, list[TokenProbability]]]]:
        # What no noise tells apart is generated once.
        drawn = samples if sampling.temperature > 0 else 1
        ids = self.reader.prompts(prompts, sampling.max_new_tokens)
        keys = prompt_keys(prompts) if prompts else torch.zeros(0, dtype=torch.int64)
        rows = [row for row in ids for _ in range(drawn)]
        found: list[Any] = [None] * len(rows)
        bar = tqdm(total=len(rows), desc=progress, unit="answer", disable=progress is None)
        with bar, inference(self.model, self.precision):
            for batch in self._batches(rows):
                numbers = torch.tensor([index % drawn for index in batch])
                mine = stream_keys(sampling.seed, keys[[index // drawn for index in batch]], numbers, 0)
                made = self._generate_batch([rows[index] for index in batch], sampling, mine, alternatives)
                for index, answer in zip(batch, made, strict=True):
                    found[index] = answer
                bar.update(len(batch))
        each = [found[start : start + drawn] for start in range(0, len(found), drawn)]
        return each if drawn == samples else [row * samples for row in each]

    def _generate_batch(
        self, rows: Sequence[Sequence[int]], sampling: Sampling, keys: Tensor, alternatives: int
    ) -> list[tuple[Generation, list[TokenProbability]]]:
        ids, mask = self._padded(rows, left=not self.reader.encodes)
        start = 1 if self.reader.encodes else ids.shape[1]
        draw = _Draw(keys.to(self.device), sampling, start, alternatives)
        stop = [_Stop(self.tokenizer, sampling.stop, start)] if sampling.stop else []
        own = self.model.generation_config
        # Every setting said outright: a checkpoint's own generation_config would silently fill in what is left open.
        settings = GenerationConfig(
            **GenerationConfig._get_default_generation_params()
            | {
                "max_length": None,
                "max_new_tokens": sampling.max_new_tokens,
                "do_sample": False,
                "decoder_start_token_id": own.decoder_start_token_id,
                "forced_bos_token_id": own.forced_bos_token_id,
                "bos_token_id": own.bos_token_id,
                "eos_token_id": self.ends or None,
                "pad_token_id": self.pad,
            }
        )
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList(stop),
        )
        new = made[:, start:].tolist()
        return [self._answer(new[i], draw, i, sampling, alternatives) for i in range(len(rows))]

    def _answer(
        self, tokens: list[int], draw: _Draw, row: int, sampling: Sampling, alternatives: int
    ) -> tuple[Generation, list[TokenProbability]]:
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        kept = tokens if end is None else tokens[:end]
        text, finished = self.tokenizer.decode(kept, skip_special_tokens=True), end is not None
        if sampling.stop and sampling.stop in text:
            text, finished = text[: text.index(sampling.stop)], True
            end = next(
                n
                for n in range(len(kept))
                if sampling.stop in self.tokenizer.decode(kept[: n + 1], skip_special_tokens=True)
            )
        used = len(kept) if end is None else end + 1
        log_probs = [draw.chosen[place][row].item() for place in range(used)]
        seen = []
        for place in range(used) if alternatives else ():
            likely = zip(draw.top_ids[place][row].tolist(), draw.top[place][row].exp().tolist(), strict=True)
            named = tuple((self._token_text(token), probability) for token, probability in likely)
            probability = draw.chosen[place][row].exp().item()
            seen.append(TokenProbability(self._token_text(tokens[place]), probability, named))
        return Generation(text, tuple(log_probs), finished), seen

    def _token_text(self, token: int) -> str:
        """A token as text, its leading space kept where the vocabulary marks it."""
        raw = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token])
        # Decoders drop the space that begins a text; `▁` and `Ġ` mark it in the vocabularies that have one.
        return f" {text}" if isinstance(raw, str) and raw[:1] in "▁Ġ" and not text.startswith(" ") else text

    # --- scores of given continuations --------------------------------------------------------------------------------

    def choice_log_probs(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, progress: str | None = None
    ) -> list[list[ChoiceScore]]:
        """log p(choice | prompt) of every choice, summed over its tokens, without an end mark.

        Of a causal model prompt and choice are one text (``Reader.with_choices`` says where it is cut); of an
        encoder-decoder the encoder reads the prompt and the decoder the choice.

        Raises:
            UserError: a prompt that is too long with its choice, or an empty choice.
        """
        for prompt, some in zip(prompts, choices, strict=True):
            if any(not choice.strip() for choice in some):
                raise UserError("choice", prompt, "an empty choice cannot be scored", "give each choice a text")
        score = self._encoder_decoder_scores if self.reader.encodes else self._causal_scores
        bar = tqdm(total=sum(map(len, choices)), desc=progress, unit="choice", disable=progress is None)
        with bar, inference(self.model, self.precision):
            return score(prompts, choices, bar)

    def _causal_scores(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], bar: tqdm
    ) -> list[list[ChoiceScore]]:
        rows: list[list[int]] = []
        tails: list[int] = []  # of each row: how many of its last places are looked at
        readers: list[list[tuple[int, int, int, list[int]]]] = []  # of each row: (prompt, choice, start, tokens)
        for number, (prompt, some) in enumerate(zip(prompts, choices, strict=True)):
            wholes, start = self.reader.with_choices(prompt, some)
            first = len(rows)
            # A context that begins another one of the same prompt is read from it: choices of one token each, the
            # labels of multiple choice, share a single row.
            for choice in sorted(range(len(wholes)), key=lambda c: -len(wholes[c])):
                context = wholes[choice][:-1]
                host = next((r for r in range(first, len(rows)) if rows[r][: len(context)] == context), len(rows))
                if host == len(rows):
                    rows.append(context)
                    tails.append(len(context) - start + 1)
                    readers.append([])
                readers[host].append((number, choice, start, wholes[choice][start:]))
        found: list[list[Any]] = [[None] * len(some) for some in choices]
        for batch in self._batches(rows):
            tail = max(tails[row] for row in batch)
            log_probs = self._tail_log_probs([rows[row] for row in batch], tail)
            for place, row in enumerate(batch):
                for number, choice, start, tokens in readers[row]:
                    # The token at place p is predicted at place p − 1; place p is `tail − len + p` in the tail.
                    at = torch.arange(start - 1, start - 1 + len(tokens)) + tail - len(rows[row])
                    picked = log_probs[place, at.to(self.device), torch.tensor(tokens, device=self.device)]
                    found[number][choice] = ChoiceScore(picked.double().sum().item(), len(tokens))
                    bar.update()
        return found

    def _tail_log_probs(self, rows: Sequence[Sequence[int]], tail: int) -> Tensor:
        """Log-probabilities of what follows the last ``tail`` places of each row: (B, tail, V)."""
        ids, mask = self._padded(rows, left=True)
        more: dict[str, Any] = {}
        if self.pads and "position_ids" in self.arguments:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in self.arguments:
            more["logits_to_keep"] = tail
        logits = self.model(input_ids=ids, attention_mask=mask, **more).logits[:, -tail:]
        return logits.float().log_softmax(-1)

    def _encoder_decoder_scores(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], bar: tqdm
    ) -> list[list[ChoiceScore]]:
        sources = self.reader.prompts(prompts, 0)
        found: list[list[ChoiceScore]] = [[] for _ in prompts]
        for batch in self._batches(sources):
            counts = torch.tensor([len(choices[index]) for index in batch], device=self.device)
            rows = self.reader.decoder_choices([choice for index in batch for choice in choices[index]])
            ids, mask = self._padded([sources[index] for index in batch], left=False)
            labels, labels_mask = self._padded(rows, left=False)
            log_probs = self._decoder_log_probs(ids, mask, counts, labels, labels_mask)
            picked = log_probs.gather(-1, labels[..., None]).squeeze(-1).double() * labels_mask
            scores = iter(zip(picked.sum(1).tolist(), map(len, rows), strict=True))
            for index in batch:
                found[index] = [ChoiceScore(*next(scores)) for _ in choices[index]]
                bar.update(len(choices[index]))
        return found

    def _decoder_log_probs(
        self, ids: Tensor, mask: Tensor, counts: Tensor, labels: Tensor, labels_mask: Tensor
    ) -> Tensor:
        """(R, T, V) log-probabilities of the decoder under teacher forcing, source b being read by counts[b] rows."""
        own = self.model.generation_config.decoder_start_token_id
        start = self.model.config.decoder_start_token_id if own is None else own
        inputs = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
        given = {
            "attention_mask": mask.repeat_interleave(counts, 0),
            "decoder_input_ids": inputs,
            "decoder_attention_mask": labels_mask,
        }
        if self.virtual_tokens:
            # A soft prompt goes in with the source's ids, so the source is read anew for each choice.
            given["input_ids"] = ids.repeat_interleave(counts, 0)
        else:
            states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=states.repeat_interleave(counts, 0))
        return self.model(**given).logits.float().log_softmax(-1)


class _Draw(LogitsProcessor):
    """Last processor of a greedy ``generate``: above temperature 0 it draws by Gumbel noise; it notes what it saw.

    Attributes:
        chosen: of each place, (B,) log-probability of the token taken, before temperature and top-p.
        top, top_ids: of each place, (B, K) log-probabilities and ids of the likeliest tokens.
    """

    def __init__(self, keys: Tensor, sampling: Sampling, start: int, alternatives: int):
        self.keys, self.sampling, self.start, self.alternatives = keys, sampling, start, alternatives
        self.nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.chosen: list[Tensor] = []
        self.top: list[Tensor] = []
        self.top_ids: list[Tensor] = []

    def __deepcopy__(self, memo: dict) -> _Draw:
        """Itself: PEFT copies the arguments of an encoder-decoder's ``generate``, and what is noted must come back."""
        return self

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        log_probs = scores.log_softmax(-1)
        if self.sampling.temperature > 0:
            scores = scores / self.sampling.temperature
            if self.nucleus is not None:
                scores = self.nucleus(input_ids, scores)
            scores = gumbel_noise(self.keys, input_ids.shape[1] - self.start, scores.shape[-1]) + scores
        self.chosen.append(log_probs.gather(1, scores.argmax(-1, keepdim=True)).squeeze(1))
        if self.alternatives:
            top = log_probs.topk(min(self.alternatives, log_probs.shape[-1]), dim=-1)
            self.top.append(top.values)
            self.top_ids.append(top.indices)
        return scores


class _Stop(StoppingCriteria):
    """Ends a row once the stop text stands in what it has generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str, start: int):
        self.tokenizer, self.stop, self.start = tokenizer, stop, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)

"""GRPO and RLOO of an encoder-decoder on TRL's trainers: groups of samples of one source are compared with each other.

TRL's trainers join prompt and completion into one row. Here the models are views, and four seams keep the two apart:
prompts come tokenized with the data set, completions come from ``sampling`` (they depend on seed, source, sample number
and rollout alone), log-probabilities are taken decoder-side with each source encoded once for its K rows, and the
rollout in progress goes into every checkpoint. Advantages, losses, clipping, importance sampling stay TRL's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.models.utils import prepare_fsdp
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, split_tensor_dict

from pipelines.errors import UserError
from pipelines.seq2seq.annotators import Annotator
from pipelines.seq2seq.collators import SetEpoch, check_reads_text, pad_rows
from pipelines.seq2seq.guard import check_rows
from pipelines.seq2seq.losses import sequence_sum
from pipelines.seq2seq.rewards import Rewards
from pipelines.seq2seq.sampling import GumbelSampler, prompt_keys, sample_completions
from pipelines.seq2seq.sharded import InParts, share_embedding, whole
from pipelines.seq2seq.view import as_view, decoder_start_id, encode, silence_dropout

# TRL's names for what our other trainers log, and theirs.
_LOGGED = {
    "reward_std": "objective/total_deviation",
    "entropy": "objective/entropy",
    "completions/mean_length": "objective/length",
    "completions/clipped_ratio": "objective/cut",
    "frac_reward_zero_std": "objective/groups_alike",
    "clip_ratio/region_mean": "policy/clip_fraction",
    "loss": "policy/loss",
}


class GroupSampler(RepeatSampler):
    """TRL's sampler, but an epoch's order depends on (seed, epoch) alone: a resumed run sees what it would have."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return super().__iter__()


class _Groups(InParts):
    """The seams, in front of TRL's trainer."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: GRPOConfig | RLOOConfig,
        sources: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        rewards: Rewards,
        *,
        gold: Annotator | None = None,
        missing_eos_penalty: float = 0.0,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizer_choice: tuple[type, dict[str, Any]] | None = None,
    ):
        if args.per_device_train_batch_size % args.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={args.per_device_train_batch_size} must be a multiple of "
                f"num_generations={args.num_generations}: a source's samples stay together"
            )
        self.rewards, self.gold, self.missing_eos_penalty = rewards, gold, missing_eos_penalty
        self._rows: list[dict[str, Any]] = []
        self._passes: list[tuple[tuple, Tensor]] = []
        self._unchecked = True
        check_reads_text(as_view(model), "GRPO and RLOO take")
        silence_dropout(model)
        # TRL would load its reference by the checkpoint's name, as a plain class.
        beta, args.beta = args.beta, 0.0
        reference = copy.deepcopy(model) if beta and peft_config is None else None
        super().__init__(
            model=model,
            reward_funcs=self._score,
            args=args,
            train_dataset=sources,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        self.beta = args.beta = beta
        self.optimizer_cls_and_kwargs = optimizer_choice
        if reference is not None:
            reference.requires_grad_(False).eval()
            add_fused_lm_head(reference, temperature=self.temperature)
            if self.is_fsdp_enabled:
                share_embedding(reference)
                self.ref_model = prepare_fsdp(reference, self.accelerator)
            else:
                self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    @property
    def _steps_a_rollout(self) -> int:
        """Micro-batches that a rollout is trained on."""
        return self.args.steps_per_generation * self.num_iterations

    def _get_train_sampler(self, dataset: Dataset | None = None) -> GroupSampler:
        sampler = GroupSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self._steps_a_rollout,
            seed=self.args.seed,
        )
        self.remove_callback(SetEpoch)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        # TRL shuffles the rows of a rollout with the global generator. Here a source's rows stay together, and part j
        # of M takes every M-th source: the same ones however many processes share the rollout.
        if self._step % self._steps_a_rollout == 0:
            rollout = self._generate_and_score_completions(generation_batch)
            parts, samples = self.args.steps_per_generation, self.num_generations
            rows = torch.arange(len(generation_batch)).view(-1, parts, samples).transpose(0, 1).flatten()
            rollout = {name: value if value.dim() == 0 else value[rows] for name, value in rollout.items()}
            self._buffered_inputs = split_tensor_dict(rollout, parts)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # --- the rollout ---

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        self._rows, self._passes = inputs, []
        with whole(self.model):
            found = super()._generate_and_score_completions(inputs)
        self._passes = []
        return found

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return [row["input_ids"] for row in self._rows], None, {}

    @torch.no_grad()
    def _sample(self) -> list[list[int]]:
        """Completions of this process's rows, each ending with its end token where one came."""
        samples, device, pad = self.num_generations, self.accelerator.device, self.processing_class.pad_token_id
        sources = self._rows[::samples]
        keys = prompt_keys([row["id"] for row in sources])
        order = sorted(range(len(sources)), key=lambda index: len(sources[index]["input_ids"]))
        size = max(1, self.args.per_device_train_batch_size // samples)
        completions: list[list[int]] = [[]] * len(self._rows)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        for chosen in (order[start : start + size] for start in range(0, len(order), size)):
            ids, mask = (tensor.to(device) for tensor in pad_rows([sources[i]["input_ids"] for i in chosen], pad))
            step = self._step // self._steps_a_rollout
            sampler = GumbelSampler.of_samples(
                self.args.seed, keys[chosen].to(device), samples, step=step, temperature=self.temperature
            )
            with self.accelerator.autocast():
                found, found_mask = sample_completions(
                    model,
                    encode(model, ids, mask),
                    mask,
                    sampler,
                    samples=samples,
                    max_new_tokens=self.max_completion_length,
                    eos_token_id=self.processing_class.eos_token_id,
                    pad_token_id=pad,
                )
            lengths = found_mask.sum(dim=1).tolist()
            for place, (row, length) in enumerate(zip(found.tolist(), lengths, strict=True)):
                completions[chosen[place // samples] * samples + place % samples] = row[:length]
        return completions

    def _score(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        references: list[list[str]],
        log_metric: Any,
        **_: Any,
    ) -> list[float]:
        """The reward function that TRL calls: the weighted sum of ours, less the penalty for a missing end."""
        texts = [text.strip() for text in completions]
        scores = self.rewards(prompts, texts, references)
        terms = [f"reward/{name}" for name in self.rewards.names] if len(self.rewards.names) > 1 else []
        for name, column in zip(["objective/proxy_reward", *terms], zip(*scores, strict=True), strict=False):
            for score in column:
                log_metric(name, score)
        if self.gold is not None:
            first = slice(None, None, self.num_generations)
            for score in self.gold(prompts[first], texts[first], references[first]):
                log_metric("objective/gold", score)
        end = self.processing_class.eos_token_id
        return [
            row[0] - self.missing_eos_penalty * (ids[-1] != end)
            for row, ids in zip(scores, completion_ids, strict=True)
        ]

    def _sequence_kl(self) -> Tensor | None:
        """(rows of this process,) log π − log π_ref of the rollout's completions; None without a reference."""
        if not self.beta:
            return None
        arguments, reference = self._passes[-1]
        if len(self._passes) > 1:
            policy = self._passes[0][1]
        else:
            # TRL leaves this pass out where no sample is learned from twice.
            with torch.no_grad():
                policy = self._get_per_token_logps_and_entropies(self.model, *arguments)[0]
        return sequence_sum(policy - reference, arguments[1][:, -arguments[2] :])

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        found = super()._calculate_rewards(*arguments)
        kl = self._sequence_kl()
        if kl is not None:
            kl = self.accelerator.gather(kl)
            self._metrics["train"]["objective/kl"].append(kl.mean().item())
            found = self._charged(found, kl)
        return found

    def _charged(self, rewards: Tensor, kl: Tensor) -> Tensor:
        return rewards

    # --- log-probabilities ---

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probabilities (and entropies) of completions, TRL's joined rows taken apart again.

        Args:
            model: policy or reference.
            input_ids: (R, S + T), source padded on the left, completion on the right; rows source-major, K a source.
            attention_mask: (R, S + T).
            logits_to_keep: T.
            batch_size: rows in one pass, a multiple of K; None takes all.
            compute_entropy: also give entropies.

        Returns:
            (R, T) fp32, 0 where the mask is 0; entropies of the same shape or None; None.
        """
        samples, rows = self.num_generations, len(input_ids)
        source_ids, source_mask = (t[::samples, :-logits_to_keep] for t in (input_ids, attention_mask))
        source_ids, source_mask = _right_padded(source_ids, source_mask)
        ids, mask = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:]
        ids = torch.cat([ids.new_full((rows, 1), decoder_start_id(model)), ids], dim=1)
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        size = (batch_size or rows) // samples * samples
        found, entropies = [], []
        for start in range(0, rows, size):
            part, sources = slice(start, start + size), slice(start // samples, (start + size) // samples)
            labels = ids[part].masked_fill(mask[part] == 0, -100)
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=ids[part],
                    attention_mask=mask[part],
                    encoder_input_ids=source_ids[sources],
                    encoder_attention_mask=source_mask[sources],
                    encoder_rows="source-major",
                    labels=labels,
                    fused_lm_head=True,
                )
            found.append(outputs.log_probs)
            if compute_entropy:
                entropies.append(outputs.entropy)
        log_probs = torch.cat(found)
        if self._unchecked and model is not self.ref_model:
            self._check_log_probs(model, input_ids, attention_mask, log_probs)
        if not compute_entropy:
            self._passes.append(((input_ids, attention_mask, logits_to_keep, batch_size), log_probs))
        if not torch.isfinite(log_probs.detach()).all():
            rate = self.args.learning_rate
            raise UserError(
                "learning_rate", rate, f"the policy diverged to NaN by step {self.state.global_step}", "lower it"
            )
        return log_probs, torch.cat(entropies) if compute_entropy else None, None

    def _check_log_probs(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, found: Tensor) -> None:
        """Compare the first batch with the plain class: first and last completion of the first and the last source.

        Each goes beside the source that stands in its own row of TRL's.

        Raises:
            RuntimeError: they differ.
        """
        samples, (count, length) = self.num_generations, found.shape
        rows = sorted({0, samples - 1, count - samples, count - 1})
        ids, mask = input_ids[rows, -length:], attention_mask[rows, -length:]
        source_ids, source_mask = _right_padded(input_ids[rows, :-length], attention_mask[rows, :-length])
        with self.accelerator.autocast():
            sources = {"input_ids": source_ids, "attention_mask": source_mask}
            check_rows(model, sources, ids, mask, found[rows].detach(), temperature=self.temperature)
        self._unchecked = False

    # --- logs, checkpoints ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log under the names that all our trainers share; TRL's others are left out, some of them are times."""
        for key in list(self._metrics["train"]):
            if key not in _LOGGED and not key.startswith(("objective/", "reward/")):
                del self._metrics["train"][key]
        for old, new in _LOGGED.items():
            if old in self._metrics["train"]:
                self._metrics["train"][new] = self._metrics["train"].pop(old)
            if old in logs:
                logs[new] = logs.pop(old)
        super().log(logs, start_time)

    def _state_file(self, folder: str) -> str:
        return os.path.join(folder, f"rollout-{self.accelerator.process_index}.pt")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        within = self._step % self._steps_a_rollout != 0
        buffered = [{k: v.cpu() for k, v in part.items()} for part in self._buffered_inputs] if within else []
        os.makedirs(output_dir, exist_ok=True)
        torch.save({"step": self._step, "rollout": buffered}, self._state_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        saved = torch.load(self._state_file(checkpoint), map_location=self.accelerator.device, weights_only=True)
        self._step, self._buffered_inputs = saved["step"], saved["rollout"]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card is written when the model is published, not into every checkpoint."""

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


class EncoderDecoderGRPOTrainer(_Groups, GRPOTrainer):
    """Group-relative policy optimization (Shao et al. 2024) of an encoder-decoder.

    Args:
        model: an encoder-decoder; its class is swapped for its view, its dropout switched off.
        args: TRL's configuration.
        sources: columns ``id``, ``prompt``, ``input_ids`` and ``references``, as ``training_sources`` makes them.
        tokenizer: the model's.
        rewards: what a completion is worth.
        kl_in: charge β log π/π_ref in the reward of the whole completion, or β times TRL's per-token divergence in the
            loss, as the paper does. Only the first has π* ∝ π_ref e^{r/β} as its optimum: the second does not see that
            a token also decides how far later ones must go.
        gold: a judge that is logged beside the reward and never trained on; it sees one completion a source.
        missing_eos_penalty: taken off the reward of a completion that was cut.
        peft_config: LoRA settings, or None.
        callbacks: of the Trainer.
        optimizer_choice: class and options of an optimizer other than AdamW.

    Raises:
        UserError: the model is no encoder-decoder that a view can be made of, or reads speech or images.
        ValueError: a micro-batch that would cut a source's samples.
    """

    def __init__(self, *arguments: Any, kl_in: str = "loss", **options: Any):
        self.kl_in = kl_in
        super().__init__(*arguments, **options)

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self._sample(), None

    def _charged(self, rewards: Tensor, kl: Tensor) -> Tensor:
        return rewards - self.beta * kl[:, None] if self.kl_in == "reward" else rewards

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if self.kl_in == "loss":
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta


class EncoderDecoderRLOOTrainer(_Groups, RLOOTrainer):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024) of an encoder-decoder; arguments as for GRPO."""

    def _generate_single_turn(self, *_: Any, **__: Any) -> list[list[int]]:
        return self._sample()


def _right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, padded on the right: what models with absolute positions were sampled with."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)

"""Proximal policy optimization of an encoder-decoder, inside ``transformers.Trainer.train()``.

One *rollout* takes a batch of sources, samples K completions of each, scores them, and is then trained on for some
epochs of mini-batches. The Trainer sees nothing but numbered micro-batches; the number says which rollout, epoch and
part of it is meant, so the Trainer's own loop gives optimizer, schedule, clipping, checkpoints, callbacks, DDP.

Three things make a run repeatable to the bit. Which sources a rollout takes, how its epochs are shuffled and what is
sampled are functions of (seed, rollout, epoch, source) alone. Every process holds the whole rollout, gathered, so what
is computed from it (whitening, statistics, the coefficient) is the same everywhere. And a checkpoint holds the rollout
in progress, which cannot be made again because the weights that sampled it are gone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from pipelines.errors import UserError
from pipelines.seq2seq import ppo_math
from pipelines.seq2seq.actor_critic import ActorCritic, Reference
from pipelines.seq2seq.annotators import Annotator
from pipelines.seq2seq.collators import CollateSources, SourceExample, join_rows, sources_of
from pipelines.seq2seq.guard import check_batch
from pipelines.seq2seq.losses import kl_estimate, masked_mean, sequence_sum
from pipelines.seq2seq.ppo_arguments import PPOArguments
from pipelines.seq2seq.rewards import Rewards
from pipelines.seq2seq.sample_table import SampleTable
from pipelines.seq2seq.sampling import GumbelSampler, prompt_keys, sample_completions
from pipelines.seq2seq.sharded import share_embedding, whole
from pipelines.seq2seq.stacks import source_name, unwrap
from pipelines.seq2seq.view import as_view, encode, silence_dropout

STATE_FILE = "ppo_state.pt"
Rollout = dict[str, Tensor]


class _EndOfRollout(TrainerCallback):
    """Logs a rollout after its last step, before a checkpoint of that step is written."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.halted:
            control.should_training_stop = True
        if trainer.halted or state.global_step % args.steps_per_rollout == 0:
            trainer.log_rollout()


class PPOTrainer(Trainer):
    """PPO with a critic (Schulman et al. 2017; Ziegler et al. 2019) for encoder-decoder models.

    Args:
        policy: an encoder-decoder (it becomes a view, its dropout is switched off), or a PEFT model around one.
        args: see ``ppo.PPOConfig``.
        sources: what completions are sampled of; at least ``args.sources_per_rollout``, with distinct ids.
        tokenizer: the policy's.
        rewards: what a completion is worth.
        collate_sources: makes the encoder's input and, or not, ``attention_mask`` of sources; by default as DPO's.
        gold: a judge that is logged beside the reward and never trained on; it sees one completion a source.
        separate_critic: give the critic a trunk of its own.
        train_encoder: False trains the decoder only.
        samples_file: JSON lines with some completions of every rollout; None keeps none.
        optimizer_choice: class and options of an optimizer other than AdamW.

    Raises:
        ValueError: too few sources, or batch sizes that do not divide over the processes.
    """

    loss_is_scaled_for_ga = True
    _STATISTICS = ("policy_loss", "value_loss", "clipped", "ratio", "kl", "tokens")

    def __init__(
        self,
        policy: Any,
        args: PPOArguments,
        sources: Sequence[SourceExample],
        tokenizer: PreTrainedTokenizerBase,
        rewards: Rewards,
        *,
        collate_sources: CollateSources | None = None,
        gold: Annotator | None = None,
        separate_critic: bool = False,
        train_encoder: bool = True,
        samples_file: str | Path | None = None,
        optimizer_choice: tuple[type, dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        silence_dropout(as_view(policy))
        super().__init__(
            model=ActorCritic(policy, separate_critic=separate_critic, train_encoder=train_encoder),
            args=args,
            train_dataset=sources,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=optimizer_choice,
            callbacks=[_EndOfRollout(self), *(callbacks or [])],
        )
        world, accumulation = self.accelerator.num_processes, args.gradient_accumulation_steps
        if len(sources) < args.sources_per_rollout:
            raise ValueError(f"{len(sources)} sources are fewer than sources_per_rollout={args.sources_per_rollout}")
        if args.sources_per_rollout % world or args.mini_batch_size % (args.samples_per_source * world * accumulation):
            raise ValueError(
                f"sources_per_rollout={args.sources_per_rollout} must be a multiple of {world} processes, and "
                f"mini_batch_size={args.mini_batch_size} one of samples_per_source × processes × "
                f"gradient_accumulation_steps = {args.samples_per_source * world * accumulation}"
            )
        for trunk in filter(None, (policy, self.model.critic) if self.is_fsdp_enabled else ()):
            share_embedding(unwrap(trunk))
        self.reference = Reference(policy)
        self.reference.model.to(args.device)
        self.rewards, self.gold = rewards, gold
        self.collate_sources = collate_sources or sources_of(unwrap(policy), tokenizer.pad_token_id, "input_ids")
        self.samples = SampleTable(samples_file, writes=self.is_world_process_zero())
        self.kl_coefficient = args.kl_coefficient
        self.score_moments = ppo_math.RunningMoments()
        self.rollout: Rollout | None = None
        self.record: dict[str, float] = {}
        self.statistics = torch.zeros(len(self._STATISTICS), dtype=torch.float64)
        self.stopped = self.halted = False
        self._checked: set[str] = set()
        self._keys = prompt_keys([source["id"] for source in sources])

    # --- the schedule: everything is a function of the micro-batch's number ---

    def get_train_dataloader(self) -> DataLoader:
        """Numbers of micro-batches, the same on every process: each takes its own part of the one that is meant."""
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(range(count), batch_size=1, collate_fn=lambda items: {"number": items[0]})

    def _permutation(self, size: int, *key: int) -> Tensor:
        seed = int.from_bytes(repr((self.args.seed, *key)).encode(), "little") % (2**63 - 25)
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))

    def sources_of(self, rollout: int) -> list[int]:
        """Indices of the sources that a rollout takes: passes over the set, each shuffled anew, remainders dropped."""
        size = self.args.sources_per_rollout
        pass_number, part = divmod(rollout, len(self.train_dataset) // size)
        return self._permutation(len(self.train_dataset), 0, pass_number)[part * size : (part + 1) * size].tolist()

    def micro_batch(self, number: int) -> dict[str, Tensor]:
        """This process's part of a numbered micro-batch, cut to its own longest source and completion."""
        args, samples = self.args, self.args.samples_per_source
        rollout_number, within = divmod(number, args.steps_per_rollout * args.gradient_accumulation_steps)
        step, micro = divmod(within, args.gradient_accumulation_steps)
        epoch, part = divmod(step, args.mini_batches)
        size = args.mini_batch_size // samples
        chosen = self._permutation(args.sources_per_rollout, 1, rollout_number, epoch)[part * size : (part + 1) * size]
        rows = (chosen[:, None] * samples + torch.arange(samples)).flatten()
        tokens = self.rollout["completion_mask"][rows.to(args.device)].sum()
        world = self.accelerator.num_processes
        share = chosen.view(args.gradient_accumulation_steps, world, -1)[micro, self.accelerator.process_index]
        rows = (share[:, None] * samples + torch.arange(samples)).flatten()
        share, rows = share.to(args.device), rows.to(args.device)
        batch = {k: v[share if k.startswith("source_") else rows] for k, v in self.rollout.items()}
        for prefix, names in (("source_", ("ids", "mask")), ("", [k for k in batch if not k.startswith("source_")])):
            mask = batch.get(f"{prefix or 'completion_'}mask")
            if mask is None or batch[f"{prefix or 'completion_'}ids"].is_floating_point():
                continue  # of one size in the whole rollout, as in `_sample`
            longest = int(mask.sum(1).max())
            batch |= {prefix + name: batch[prefix + name][:, :longest] for name in names}
        # Processes average their gradients; the loss is a mean over the tokens of the whole mini-batch.
        return batch | {"weight": world / tokens}

    # --- the rollout ---

    @torch.no_grad()
    def make_rollout(self, number: int) -> Rollout:
        """Sample, score and judge rollout ``number``; logs go into ``self.record``.

        Returns:
            The whole rollout on every process: source_ids and source_mask (B, S); completion_ids, completion_mask,
            log_probs, reference, values, advantages and returns (B·K, T), rows source-major.
        """
        args, samples = self.args, self.args.samples_per_source
        indices = self.sources_of(number)
        part = len(indices) // self.accelerator.num_processes
        mine = indices[self.accelerator.process_index * part :][:part]
        examples = [self.train_dataset[i] for i in mine]
        with self.accelerator.autocast(), whole(self.model):
            data = self._sample(examples, self._keys[mine], number)
        texts = self.processing_class.batch_decode(data["completion_ids"].tolist(), skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        documents = [e["document"] for e in examples for _ in range(samples)]
        references = [e["references"] for e in examples for _ in range(samples)]
        scores = self.rewards(documents, texts, references)
        gold = [0.0] * part
        if self.gold is not None:
            gold = self.gold(documents[::samples], texts[::samples], references[::samples])
        data["scores"] = torch.tensor(scores, dtype=torch.float64, device=args.device)
        data["gold"] = torch.tensor(gold, dtype=torch.float64, device=args.device)[:, None]
        pads = {"source_ids": self.processing_class.pad_token_id, "completion_ids": self.processing_class.pad_token_id}
        data = {
            name: self.accelerator.gather(self.accelerator.pad_across_processes(t, dim=1, pad_index=pads.get(name, 0)))
            for name, t in data.items()
        }
        scores, gold = data.pop("scores"), data.pop("gold")
        self._keep_samples(number, [self.train_dataset[i] for i in indices], data, scores, gold)
        return self._estimate(data, scores, gold, number)

    def _sample(self, examples: list[SourceExample], keys: Tensor, number: int) -> Rollout:
        """Completions of this process's sources with their log-probabilities and values, in chunks of like length."""
        args, samples, pad = self.args, self.args.samples_per_source, self.processing_class.pad_token_id
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].get("input_ids", ())))
        size = max(1, args.rollout_batch_size // samples)
        name, chunks = source_name(self.model.policy), []
        # Text is padded chunk by chunk. An encoder of speech may see where padding ends: one length for the rollout.
        every = None if name == "input_ids" else self.accelerator.pad_across_processes(self._collate(examples), dim=1)
        for chosen in (order[i : i + size] for i in range(0, len(order), size)):
            if every is None:
                sources = self._collate([examples[i] for i in chosen])
            else:
                sources = {key: tensor[chosen] for key, tensor in every.items()}
            ids, mask = sources[name], sources.get("attention_mask")
            states = encode(self.model.policy, ids, mask)
            sampler = GumbelSampler.of_samples(
                args.seed, keys[chosen].to(args.device), samples, step=number, temperature=args.temperature
            )
            completion_ids, completion_mask = sample_completions(
                self.model.policy,
                states,
                mask,
                sampler,
                samples=samples,
                max_new_tokens=args.max_new_tokens,
                eos_token_id=self.processing_class.eos_token_id,
                pad_token_id=pad,
            )
            batch = (ids, mask, completion_ids, completion_mask)
            # Not what sampling saw: with a cache the same numbers come in another order of additions, and the first
            # ratio would not be 1.
            found = self.model(*batch, encoder_states=states, temperature=args.temperature, with_entropy=True)
            self._check("rollout", sources, completion_ids, completion_mask, found["log_probs"])
            found["reference"] = self.reference.log_probs(*batch, temperature=args.temperature)
            names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
            chunks.append({k: v for k, v in zip(names, batch, strict=True) if v is not None} | found)
        back = torch.tensor(order).argsort()
        rows = (back[:, None] * samples + torch.arange(samples)).flatten()
        return {
            name: join_rows([chunk[name] for chunk in chunks], pad if name.endswith("_ids") else 0)[
                back if name.startswith("source_") else rows
            ]
            for name in chunks[0]
        }

    def _collate(self, examples: list[SourceExample]) -> dict[str, Tensor]:
        return {name: tensor.to(self.args.device) for name, tensor in self.collate_sources(examples).items()}

    def _check(self, what: str, sources: dict[str, Tensor | None], *rows: Tensor) -> None:
        """Compare the first log-probabilities of a rollout, and of a batch in training, with the plain class's."""
        if what not in self._checked:
            with self.accelerator.autocast():  # which, within a step, only the model's own forward is in
                check_batch(self.model.policy, sources, *rows, order="source-major", temperature=self.args.temperature)
            self._checked.add(what)

    def _keep_samples(
        self, number: int, examples: list[SourceExample], data: Rollout, scores: Tensor, gold: Tensor
    ) -> None:
        """The first completion of the first sources of a gathered rollout, for people to read."""
        rows = torch.arange(min(self.args.samples_kept, len(examples))) * self.args.samples_per_source
        mask = data["completion_mask"][rows]
        kl = sequence_sum(data["log_probs"][rows] - data["reference"][rows], mask).tolist()
        ids = data["completion_ids"][rows].tolist()
        texts = [self.processing_class.decode(row, skip_special_tokens=True) for row in ids]
        found = []
        for i, (text, row) in enumerate(zip(texts, rows.tolist(), strict=True)):
            line = {"rollout": number, "id": examples[i]["id"], "document": examples[i]["document"]}
            line |= {"text": text.strip(), "reward": scores[row, 0].item(), "kl": kl[i]}
            found.append(line | ({"gold": gold[i, 0].item()} if self.gold is not None else {}))
        self.samples.add(found)

    def _estimate(self, data: Rollout, scores: Tensor, gold: Tensor, number: int) -> Rollout:
        """Rewards, advantages and returns of a gathered rollout; moves the KL coefficient; fills ``self.record``."""
        args, mask, entropy = self.args, data["completion_mask"], data.pop("entropy")
        ended = (data["completion_ids"] * mask == self.processing_class.eos_token_id).any(1)
        shaped = ppo_math.penalize_missing_end(scores[:, 0], ended, args.missing_eos_penalty)
        if args.scale_rewards:
            self.score_moments.update(shaped)
            shaped = shaped / self.score_moments.deviation
        if args.reward_clip is not None:
            shaped = shaped.clamp(-args.reward_clip, args.reward_clip)
        if not torch.isfinite(data["log_probs"]).all():
            rate = self.args.learning_rate
            raise UserError("learning_rate", rate, f"the policy diverged to NaN before rollout {number}", "lower it")
        in_reward = self.kl_coefficient if args.kl_in == "reward" else 0.0
        token_kl = kl_estimate(data["log_probs"], data["reference"], args.kl_estimator)
        token_rewards = ppo_math.token_rewards(shaped, token_kl, mask, in_reward)
        advantages, returns = ppo_math.gae(token_rewards, data["values"], mask, args.gamma, args.lam)
        data["advantages"] = ppo_math.whiten(advantages, mask) if args.whiten_advantages else advantages
        data["returns"] = returns
        kl = float(sequence_sum(data["log_probs"] - data["reference"], mask).mean())
        self.record = {
            "rollout": number,
            "objective/proxy_reward": float(scores[:, 0].mean()),
            "objective/proxy_reward_deviation": float(scores[:, 0].std(correction=0)),
            "objective/kl": kl,
            "objective/kl_coefficient": self.kl_coefficient,
            "objective/entropy": float(masked_mean(entropy, mask)),
            "objective/length": float(mask.sum(1).double().mean()),
            "objective/ended": float(ended.double().mean()),
            "value/explained_variance": float(ppo_math.explained_variance(data["values"], returns, mask)),
        }
        if len(self.rewards.names) > 1:
            means = scores[:, 1:].mean(0).tolist()
            self.record |= {f"reward/{name}": mean for name, mean in zip(self.rewards.names, means, strict=True)}
        if self.gold is not None:
            self.record["objective/gold"] = float(gold.mean())
        if args.kl_target is not None:
            self.kl_coefficient = ppo_math.adapt_kl_coefficient(
                self.kl_coefficient, kl, args.kl_target, len(mask), args.kl_horizon
            )
        self.halted = args.max_kl is not None and kl > args.max_kl
        return data

    # --- the optimizer's steps ---

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: make the rollout if it is due, then the loss and its gradient."""
        number = inputs["number"]
        rollout, within = divmod(number, self.args.steps_per_rollout * self.args.gradient_accumulation_steps)
        model.train()
        if within == 0:
            self.rollout, self.stopped = self.make_rollout(rollout), False
            self.statistics.zero_()
        if self.stopped or self.halted:
            # Without gradients the optimizer leaves the weights and its own averages as they are.
            return torch.zeros((), device=self.args.device)
        before = self.statistics.clone()
        loss = super().training_step(model, self.micro_batch(number), num_items_in_batch)
        self.statistics = before + self.accelerator.reduce((self.statistics - before).to(self.args.device)).cpu()
        added = dict(zip(self._STATISTICS, (self.statistics - before).tolist(), strict=True))
        if self.args.stop_kl is not None and added["kl"] > self.args.stop_kl * added["tokens"]:
            self.stopped = True
            model.zero_grad()
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Clipped surrogate + value loss − entropy bonus (+ KL) of this process's rows (Schulman et al. 2017, eq. 9).

        Args:
            model: the actor-critic, perhaps wrapped.
            inputs: a micro-batch of a rollout: its B sources, and (R, T) of everything that belongs to R = K·B rows.
            return_outputs: not read, like ``num_items_in_batch``: the micro-batch brings its own weight.

        Returns:
            A scalar; a mean over the tokens of the whole mini-batch once processes have averaged.
        """
        args, mask = self.args, inputs["completion_mask"]
        names = ("source_ids", "source_mask", "completion_ids", "completion_mask")
        now = model(
            *(inputs.get(name) for name in names),
            temperature=args.temperature,
            with_entropy=args.entropy_coefficient != 0,
        )
        sources = {source_name(self.model.policy): inputs["source_ids"], "attention_mask": inputs.get("source_mask")}
        self._check("batch", sources, inputs["completion_ids"], mask, now["log_probs"].detach())
        policy = ppo_math.policy_loss(now["log_probs"], inputs["log_probs"], inputs["advantages"], args.clip_range)
        value = ppo_math.value_loss(now["values"], inputs["values"], inputs["returns"], args.value_clip_range)
        loss = policy.loss + args.value_coefficient * value
        if args.entropy_coefficient:
            loss = loss - args.entropy_coefficient * now["entropy"]
        if args.kl_in == "loss":
            penalty = ppo_math.loss_kl(now["log_probs"], inputs["log_probs"], inputs["reference"], args.kl_estimator)
            loss = loss + self.record["objective/kl_coefficient"] * penalty
        with torch.no_grad():
            kl = kl_estimate(inputs["log_probs"], now["log_probs"], "k3")
            terms = (policy.loss, value, policy.clipped, policy.ratio, kl, torch.ones_like(kl))
            self.statistics += torch.stack([(term * mask).sum() for term in terms]).double().cpu()
        return (loss * mask).sum() * inputs["weight"]

    def log_rollout(self) -> None:
        """Log what the rollout was and how it was learned from."""
        sums = dict(zip(self._STATISTICS, self.statistics.tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        learned = {
            "policy/loss": sums["policy_loss"] / tokens,
            "policy/ratio": sums["ratio"] / tokens,
            "policy/clip_fraction": sums["clipped"] / tokens,
            "policy/approx_kl": sums["kl"] / tokens,
            "value/loss": sums["value_loss"] / tokens,
            "learning_rate": self._get_learning_rate(),
        }
        self.log({**self.record, **({} if self.halted else learned)})

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, the critic's own parameters in a group with a rate of theirs."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.args.value_learning_rate is not None:
            own = {id(p): p for p in self.model.value_parameters()}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            options = {"lr": self.args.value_learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group({"params": list(own.values()), **options})
        return optimizer

    # --- saving and resuming ---

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_policy(folder, state_dict if self.is_fsdp_enabled else None)
        self.model.save_critic(folder, state_dict if self.is_fsdp_enabled else None)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.policy)
        self.model.load_critic(resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        finished = self.state.global_step % self.args.steps_per_rollout == 0
        torch.save(
            {
                "rollout": None if finished else {k: v.cpu() for k, v in self.rollout.items()},
                "next_rollout": -(-self.state.global_step // self.args.steps_per_rollout),
                "record": self.record,
                "statistics": self.statistics,
                "stopped": self.stopped,
                "kl_coefficient": self.kl_coefficient,
                "score_moments": self.score_moments.state(),
            },
            os.path.join(output_dir, STATE_FILE),
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        saved = torch.load(os.path.join(checkpoint, STATE_FILE), map_location="cpu", weights_only=True)
        if saved["rollout"] is not None:
            self.rollout = {k: v.to(self.args.device) for k, v in saved["rollout"].items()}
        self.record, self.statistics, self.stopped = saved["record"], saved["statistics"], saved["stopped"]
        self.kl_coefficient = saved["kl_coefficient"]
        self.score_moments = ppo_math.RunningMoments(*saved["score_moments"])
        self.samples.rewind(saved["next_rollout"])

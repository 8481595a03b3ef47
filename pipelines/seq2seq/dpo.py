"""The DPO stage: align a model directly on preference pairs and measure it on held-out ones."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.config import INERT, Problem, config
from pipelines.corpus.fields import PreferenceFields, StreamFields
from pipelines.distributed import Strategy
from pipelines.errors import UserError
from pipelines.seq2seq.direct import DirectFields, scored_and_saved, tokenized_splits, train_directly
from pipelines.seq2seq.lora import load_policy

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
# The losses that read label_smoothing (of TRL's all but sigmoid, see `dpo_trainer.smoothed`), and as TRL has them those
# that an f-divergence other than reverse KL is valid for.
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
_ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


@config
class DPOStageConfig(StreamFields, PreferenceFields, DirectFields):
    """Direct Preference Optimization of an encoder-decoder, on TRL's trainer."""

    output_dir: str = Field("runs/dpo", description="folder the stage writes into", json_schema_extra=INERT)
    loss_type: LossType | list[LossType] = Field("sigmoid", description="which of TRL's DPO losses, or a list of them")
    loss_weights: list[float] | None = Field(None, description="weights of a list of losses; null: all 1")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="assumed share of flipped preferences (losses sigmoid: cDPO, robust, exo_pair, aot, aot_unpaired)",
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="divergence that ties the policy to the reference"
    )
    f_alpha: float = Field(0.5, gt=0, description="α of f_divergence=alpha_divergence; near 1 it is reverse KL")
    sync_ref_model: bool = Field(
        False, description="move the reference after the policy now and then (TR-DPO); it is then computed online"
    )
    ref_model_sync_steps: int = Field(512, ge=1, description="steps between two moves of the reference")
    ref_model_mixup_alpha: float = Field(
        0.6, gt=0, le=1, description="a move takes the reference this share of the way to the policy; 1: all of it"
    )

    _stream_field: ClassVar[str] = "preferences"

    @property
    def loss_types(self) -> list[str]:
        """The losses as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    def problems(self) -> list[Problem]:
        """What the losses, the divergence from the reference and its moving cannot be together."""
        found = super().problems()
        types = self.loss_types
        if self.label_smoothing and not set(types) & set(_SMOOTHED):
            mend = f"give label_smoothing=0, or loss_type one of {', '.join(_SMOOTHED)}"
            problem = f"{', '.join(types)} does not read it"
            found.append(Problem("label_smoothing", self.label_smoothing, problem, mend))
        if "exo_pair" in types and not self.label_smoothing:
            found.append(Problem("label_smoothing", 0.0, "exo_pair needs one above 0", "give label_smoothing=1e-3"))
        bare = [name for name in types if name not in _ANY_DIVERGENCE]
        if self.f_divergence != "reverse_kl" and bare:
            mend = f"give f_divergence=reverse_kl, or loss_type one of {', '.join(_ANY_DIVERGENCE)}"
            found.append(Problem("f_divergence", self.f_divergence, f"is not defined for {bare[0]}", mend))
        if not types:
            found.append(Problem("loss_type", [], "names no loss", "give at least one, such as sigmoid"))
        elif self.loss_weights is not None and len(self.loss_weights) != len(types):
            problem = f"{len(self.loss_weights)} weights for {len(types)} losses"
            found.append(Problem("loss_weights", self.loss_weights, problem, "give one weight for each"))
        if self.sync_ref_model and self.precomputes:
            problem = "log-probabilities computed before training cannot follow a reference that moves"
            found.append(Problem("sync_ref_model", True, problem, "give precompute_ref_log_probs=false"))
        if self.streaming and self.precompute_ref_log_probs:
            problem = "a stream cannot be gone through before training"
            found.append(Problem("precompute_ref_log_probs", True, problem, "leave it out"))
        if self.sync_ref_model and self.lora_r:
            problem = "under LoRA the reference is the model with its adapters off, which does not move"
            found.append(Problem("sync_ref_model", True, problem, "give lora_r=0, or sync_ref_model=false"))
        return found

    def launch_problems(self, strategy: Strategy) -> list[Problem]:
        """What training has to say, and that a reference in parts cannot move."""
        found = super().launch_problems(strategy)
        if not found and self.sync_ref_model and strategy != "ddp":
            problem = "a reference in parts cannot be moved and saved"
            found.append(Problem("sync_ref_model", True, problem, "leave it out, or launch with ddp.yaml"))
        return found


def dpo(config: DPOStageConfig) -> dict[str, float]:
    """Align a model on preferences with DPO and measure it.

    Writes the model (adapters merged into it, and by themselves under ``adapter``), its tokenizer and
    ``log_history.json`` into ``config.output_dir``.

    Returns:
        Held out: ``dpo/loss`` (the sigmoid loss, whatever was trained; ln 2 at the reference), ``dpo/accuracy``
        (share with a higher implicit reward β log π/π_ref for the chosen summary, with its interval), ``dpo/margin``
        (mean difference of implicit rewards, with its interval), ``dpo/pairs``; and the shares of texts that were cut
        (of a stream: of what is held out and of the first training pairs). With a mixture also ``dpo/loss_<set>`` and
        ``dpo/accuracy_<set>``; of a stream also ``dpo/skipped_rows``.

    Raises:
        UserError: from the model, the tokenizer or the data; or log-probabilities that are not finite.
    """
    import numpy as np
    import torch
    from transformers import set_seed

    from pipelines.corpus import load_preferences
    from pipelines.seq2seq.collators import tokenize_pairs
    from pipelines.seq2seq.dpo_trainer import EncoderDecoderDPOTrainer, pair_log_probs
    from pipelines.seq2seq.losses import dpo_loss
    from pipelines.seq2seq.metrics import wins, with_interval
    from pipelines.seq2seq.models import load_tokenizer
    from pipelines.seq2seq.streamed import streamed_preferences
    from pipelines.seq2seq.training import global_batch

    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model, field="model")
    model = load_policy(config.model)
    parts, stream = None, None
    if config.streaming:
        texts, parts, stream = streamed_preferences(config, tokenizer)
    else:
        texts = load_preferences(config)
    pairs, cut = tokenized_splits(texts, lambda split: tokenize_pairs(split, tokenizer, config))
    if stream is None:
        global_batch(config, len(pairs["train"]), field="preferences", noun="pairs")
    policy = train_directly(
        config,
        EncoderDecoderDPOTrainer,
        model,
        pairs,
        tokenizer,
        stream,
        loss_type=config.loss_types,
        loss_weights=config.loss_weights,
        label_smoothing=config.label_smoothing,
        f_divergence_type=config.f_divergence,
        f_alpha_divergence_coef=config.f_alpha,
        sync_ref_model=config.sync_ref_model,
        ref_model_sync_steps=config.ref_model_sync_steps,
        ref_model_mixup_alpha=config.ref_model_mixup_alpha,
    )

    def score(model) -> tuple[np.ndarray, np.ndarray]:
        found = pair_log_probs(model, pairs["test"], tokenizer, config.eval_batch_size)
        if not np.isfinite(found).all():
            raise UserError("learning_rate", config.learning_rate, "the policy gives NaN log-probabilities", "lower it")
        return found

    (chosen, rejected), (chosen_reference, rejected_reference) = scored_and_saved(config, policy, tokenizer, score)
    tensors = map(torch.from_numpy, (chosen, rejected, chosen_reference, rejected_reference))
    chosen_reward = config.beta * (chosen - chosen_reference)
    rejected_reward = config.beta * (rejected - rejected_reference)
    total = sum(map(len, pairs.values()))
    losses, right = dpo_loss(*tensors, beta=config.beta).numpy(), wins(chosen_reward, rejected_reward)
    of_sets = {}
    for name, (loss, accuracy) in (parts.of(losses, right) if parts is not None else {}).items():
        of_sets |= {f"dpo/loss_{name}": float(loss.mean()), **with_interval(f"dpo/accuracy_{name}", accuracy)}
    return {
        "dpo/loss": float(losses.mean()),
        **with_interval("dpo/accuracy", right),
        **with_interval("dpo/margin", chosen_reward - rejected_reward),
        "dpo/pairs": float(len(chosen)),
        "dpo/truncated_documents": cut["documents"] / total,
        "dpo/truncated_summaries": cut["summaries"] / (2 * total),
        **of_sets,
        **({} if stream is None else {"dpo/skipped_rows": float(stream.skipped())}),
    }

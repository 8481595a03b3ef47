"""Policy and critic in one module, so that one forward (and one DistributedDataParallel) serves both."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.seq2seq.losses import entropy, token_log_probs
from pipelines.seq2seq.sharded import without_tied
from pipelines.seq2seq.shared_attention import decode_shared
from pipelines.seq2seq.stacks import states_width, unwrap
from pipelines.seq2seq.view import as_view, decoder_inputs, encode, output_logits

VALUE_HEAD_FILE = "value_head.safetensors"
CRITIC_FOLDER = "critic"


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the N real tokens to (R, T), 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


class ValueHead(nn.Module):
    """A linear value of decoder states brought to unit RMS; it starts at 0 everywhere.

    T5 scales its decoder states by d_model^-1/2 and other families do not: without the RMS the head's pace would
    depend on the architecture.

    Args:
        width: H, of the decoder states.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(…, H) → (…) fp32 values."""
        states = F.rms_norm(states.float(), states.shape[-1:])
        return self.linear(states).squeeze(-1).float()


class ActorCritic(nn.Module):
    """An encoder-decoder policy with a critic on its decoder states, or on those of a trunk of the critic's own.

    Args:
        policy: a view, or a PEFT model around one; it stays a plain checkpoint of its own.
        separate_critic: give the critic a copy of the policy's encoder and decoder instead of sharing them, without
            adapters: under LoRA too it learns with all its weights.
        train_encoder: False leaves the policy's encoder as it is, which spares its backward pass. What it shares with
            the decoder (T5's embedding) goes on learning from the decoder's side.
    """

    # The Trainer asks for these of every model it loads.
    _keys_to_ignore_on_save = None

    def __init__(self, policy: Any, *, separate_critic: bool = False, train_encoder: bool = True):
        super().__init__()
        self.policy = policy
        inner = unwrap(policy)
        self.train_encoder = train_encoder
        if not train_encoder:
            kept = {
                id(p) for module in (inner.get_decoder(), inner.get_output_embeddings()) for p in module.parameters()
            }
            projection = getattr(inner, "enc_to_dec_proj", None)
            for module in filter(None, (inner.get_encoder(), projection)):
                for parameter in module.parameters():
                    if id(parameter) not in kept:
                        parameter.requires_grad_(False)
        self.critic = None
        if separate_critic:
            # Adapters are merged into it: a plain model that learns with all its weights and is saved by its own class.
            own = copy.deepcopy(policy)
            self.critic = own.merge_and_unload() if hasattr(own, "merge_and_unload") else unwrap(own)
            self.critic.requires_grad_(True)
            head = self.critic.get_output_embeddings()
            if head.weight is not self.critic.get_input_embeddings().weight:
                head.requires_grad_(False)  # the critic has no use for it, and DDP wants every trained weight used
        self.value_head = ValueHead(states_width(inner.get_decoder()))

    @property
    def config(self) -> Any:
        """The policy's configuration."""
        return unwrap(self.policy).config

    @property
    def _no_split_modules(self) -> Any:
        # What accelerate cuts a model by.
        return getattr(unwrap(self.policy), "_no_split_modules", None)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass, in policy and critic."""
        for model in filter(None, (self.policy, self.critic)):
            model.activation_checkpointing_enable(**options)

    def value_parameters(self) -> list[nn.Parameter]:
        """What belongs to the critic alone."""
        trunk = [] if self.critic is None else [p for p in self.critic.parameters() if p.requires_grad]
        return [*trunk, *self.value_head.parameters()]

    def forward(
        self,
        source_ids: Tensor,
        source_mask: Tensor | None,
        completion_ids: Tensor,
        completion_mask: Tensor,
        *,
        encoder_states: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> dict[str, Tensor]:
        """Log-probabilities and values of B·K completions (source-major) of B sources, each source encoded once.

        Args:
            source_ids: (B, S), or whatever else the policy's encoder reads (features, pixels).
            source_mask: (B, S) or None.
            completion_ids: (R, T) without the decoder's start token.
            completion_mask: (R, T).
            encoder_states: (B, S, H) of the policy where they are known already.
            temperature: the policy is softmax(logits / temperature).
            with_entropy: also give the entropy of each token's distribution.

        Returns:
            ``log_probs``, ``values`` and, if asked for, ``entropy``: (R, T) fp32, 0 where the mask is 0.
        """
        mask = completion_mask.bool()
        inputs = decoder_inputs(self.policy, completion_ids)
        if encoder_states is None:
            with nullcontext() if self.train_encoder else torch.no_grad():
                encoder_states = encode(self.policy, source_ids, source_mask)
        states = decode_shared(self.policy, encoder_states, source_mask, inputs, order="source-major")[mask]
        logits = output_logits(self.policy, states)
        found = {"log_probs": token_log_probs(logits, completion_ids[mask], temperature=temperature)}
        if with_entropy:
            found["entropy"] = entropy(logits, temperature=temperature)
        if self.critic is not None:
            own = encode(self.critic, source_ids, source_mask)
            states = decode_shared(self.critic, own, source_mask, inputs, order="source-major")[mask]
        found["values"] = self.value_head(states)
        return {name: _spread(value, mask) for name, value in found.items()}

    def save_policy(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the policy as any transformers user reads it.

        Args:
            folder: written into.
            state: the weights by name, where the model's own are in parts.
        """
        own = None if state is None else without_tied(unwrap(self.policy), _below(state, "policy"))
        self.policy.save_pretrained(folder, state_dict=own)

    def save_critic(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the value head, and the critic's own trunk where it has one, beside the policy; ``state`` as there."""
        head = self.value_head.state_dict() if state is None else _below(state, "value_head")
        safetensors.torch.save_file(head, Path(folder) / VALUE_HEAD_FILE)
        if self.critic is not None:
            own = None if state is None else without_tied(self.critic, _below(state, "critic"))
            self.critic.save_pretrained(Path(folder) / CRITIC_FOLDER, state_dict=own)

    def load_critic(self, folder: str | Path) -> None:
        """Read what ``save_critic`` wrote."""
        self.value_head.load_state_dict(safetensors.torch.load_file(Path(folder) / VALUE_HEAD_FILE))
        if self.critic is not None:
            saved = type(self.critic)._plain_class.from_pretrained(
                Path(folder) / CRITIC_FOLDER, use_safetensors=True, dtype=self.critic.dtype
            )
            self.critic.load_state_dict(saved.state_dict())


def _below(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


class Reference:
    """The policy that the trained one is held near: a frozen copy, or the same model with its adapter off.

    Args:
        policy: a view, or a PEFT model around one.
    """

    def __init__(self, policy: Any):
        self.adapter_off = policy if hasattr(policy, "disable_adapter") else None
        self.model = policy
        if self.adapter_off is None:
            self.model = as_view(copy.deepcopy(policy)).eval().requires_grad_(False)

    @torch.no_grad()
    def log_probs(
        self,
        source_ids: Tensor,
        source_mask: Tensor | None,
        completion_ids: Tensor,
        completion_mask: Tensor,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probabilities of B·K completions (source-major) of B sources, each source encoded once.

        Args:
            source_ids: (B, S), or whatever else the encoder reads.
            source_mask: (B, S) or None.
            completion_ids: (R, T) without the decoder's start token.
            completion_mask: (R, T).
            temperature: the reference is softmax(logits / temperature), as the policy is.

        Returns:
            (R, T) fp32 in nats, 0 where the mask is 0.
        """
        with self.adapter_off.disable_adapter() if self.adapter_off is not None else nullcontext():
            states = encode(self.model, source_ids, source_mask)
            inputs = decoder_inputs(self.model, completion_ids)
            states = decode_shared(self.model, states, source_mask, inputs, order="source-major")
            mask = completion_mask.bool()
            logits = output_logits(self.model, states[mask])
            return _spread(token_log_probs(logits, completion_ids[mask], temperature=temperature), mask)

"""The reward model: the encoder reads the document once, the decoder reads summaries of it, a scalar head scores each.

    r(x, y) = wᵀ h,   h = decoder state of the last real token of y given the encoded x

It is an ordinary transformers model: ``save_pretrained``, ``from_pretrained`` and the Hub work, in safetensors.
Its folder holds its configuration (the backbone's inside it, with the prefix and the lengths its texts were tokenized
with), its weights and its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from pipelines.errors import UserError
from pipelines.seq2seq.collators import pad_rows
from pipelines.seq2seq.lean import lean_layers
from pipelines.seq2seq.models import (
    REWARD_MODEL_TYPE,
    check_reward_model,
    check_writes_from_text,
    load_seq2seq,
    load_tokenizer,
)
from pipelines.seq2seq.stacks import (
    Order,
    left_aligned,
    run_decoder,
    run_encoder,
    source_name,
    spread_rows,
    states_width,
)
from pipelines.seq2seq.training import LengthConfig, tokenize_sources, tokenize_targets
from pipelines.seq2seq.view import decoder_start_id


class EncoderDecoderRewardConfig(PreTrainedConfig):
    """Configuration of ``EncoderDecoderRewardModel``.

    Args:
        backbone: configuration of the encoder-decoder, or its plain form with ``model_type``.
        prefix: put before every document when it is tokenized.
        max_source_length: tokens of a document.
        max_target_length: tokens of a summary.
        decoder_start_token_id: the token every decoder row begins with.
    """

    model_type = REWARD_MODEL_TYPE
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012 (the name and form that transformers reads)

    backbone: PreTrainedConfig | dict | None = None
    prefix: str = ""
    max_source_length: int = 256
    max_target_length: int = 48
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True
    num_labels: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone, dict):
            plain = dict(self.backbone)
            self.backbone = AutoConfig.for_model(plain.pop("model_type"), **plain)
        if self.backbone is not None:
            # What is tied is the backbone's own business; this model has no head to tie.
            self.tie_word_embeddings = False
        super().__post_init__(**kwargs)


class EncoderDecoderRewardModel(PreTrainedModel):
    """Scores a summary of a document with one number; trained on preferences.

    Args:
        config: its ``backbone`` may be the configuration of any encoder-decoder from text to text.

    Raises:
        UserError: the backbone is another kind of model, such as one of speech or images.
    """

    config_class = EncoderDecoderRewardConfig
    base_model_prefix = "backbone"
    main_input_name = "encoder_input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: EncoderDecoderRewardConfig):
        super().__init__(config)
        check_writes_from_text(config.backbone, type(config.backbone).__name__, "model")
        self.backbone = AutoModel.from_config(config.backbone)
        self.score_head = nn.Linear(states_width(self.backbone.get_decoder()), 1, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The backbone initializes itself. The head's scale gives first scores of unit order whatever the width
        # (Stiennon et al. 2020, appendix B.1).
        if module is getattr(self, "score_head", None):
            nn.init.normal_(module.weight, std=(module.in_features + 1) ** -0.5)

    @classmethod
    def from_seq2seq(cls, path: str, lengths: LengthConfig, *, field: str = "model") -> EncoderDecoderRewardModel:
        """A reward model whose backbone is an encoder-decoder checkpoint's, with a new head.

        Args:
            path: folder or hub id, typically the supervised fine-tuned model.
            lengths: prefix and lengths, kept in the configuration.
            field: the configuration field that named the path, for messages.

        Raises:
            UserError: as ``load_seq2seq``.
        """
        source = load_seq2seq(path, field=field)
        source.config._name_or_path = ""  # it would be saved as part of the backbone's configuration
        config = EncoderDecoderRewardConfig(
            backbone=source.config,
            prefix=lengths.prefix,
            max_source_length=lengths.max_source_length,
            max_target_length=lengths.max_target_length,
            decoder_start_token_id=decoder_start_id(source),
        )
        model = cls(config)
        prefix = f"{source.base_model_prefix}."
        weights = {name.removeprefix(prefix): value for name, value in source.state_dict().items()}
        missing = model.backbone.load_state_dict(weights, strict=False).missing_keys
        if missing:
            raise UserError(field, path, f"the backbone lacks {missing[0]}", "give a whole encoder-decoder checkpoint")
        lean_layers(model)
        return model

    @property
    def lengths(self) -> LengthConfig:
        """Prefix and lengths that its texts are tokenized with."""
        c = self.config
        return LengthConfig(
            prefix=c.prefix, max_source_length=c.max_source_length, max_target_length=c.max_target_length
        )

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings (V, H)."""
        return self.backbone.get_input_embeddings()

    def encode(self, source_ids: Tensor, source_mask: Tensor) -> Tensor:
        """Encoder states (B, S, H) of documents (B, S)."""
        return run_encoder(self.backbone, {source_name(self.backbone): source_ids, "attention_mask": source_mask})

    def score(
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        summary_ids: Tensor,
        summary_mask: Tensor,
        *,
        order: Order | Tensor | None = None,
    ) -> Tensor:
        """Scores of R = K·B summaries of B documents, each document encoded once.

        Args:
            source_ids: (B, S) document ids as ``tokenize_sources`` makes them.
            source_mask: (B, S).
            summary_ids: (R, T) padded on either side, without a start token, with the end token where there is one.
            summary_mask: (R, T), 1 on the real tokens.
            order: how the R rows belong to the B documents; needed where R is not B.

        Returns:
            (R,) fp32 scores, with gradient where it is on.
        """
        summary_ids, summary_mask, _ = left_aligned(summary_ids, summary_mask)
        start = summary_ids.new_full((len(summary_ids), 1), self.config.decoder_start_token_id)
        inputs = torch.cat([start, summary_ids], dim=1)
        mask = torch.cat([torch.ones_like(start), summary_mask.to(start.dtype)], dim=1)
        return self._scores(self.encode(source_ids, source_mask), source_mask, inputs, mask, order)

    def _scores(
        self, states: Tensor, source_mask: Tensor, inputs: Tensor, mask: Tensor, order: Order | Tensor | None
    ) -> Tensor:
        rows = len(inputs)
        states, source_mask = spread_rows(states, rows, order), spread_rows(source_mask, rows, order)
        # No decoder mask: rows are padded on the right and a decoder looks back only.
        found = run_decoder(self.backbone, states, source_mask, inputs, None)
        last = mask.sum(dim=1) - 1
        return self.score_head(found[torch.arange(rows, device=found.device), last]).squeeze(-1).float()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_input_ids: Tensor,
        encoder_attention_mask: Tensor,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Scores of decoder rows ``[start; summary]`` as ``PairCollator`` lays them out (sample-major).

        Args:
            input_ids: (R, 1 + T).
            attention_mask: (R, 1 + T).
            encoder_input_ids: (B, S).
            encoder_attention_mask: (B, S).

        Returns:
            ``logits`` (R,) fp32.
        """
        states = self.encode(encoder_input_ids, encoder_attention_mask)
        scores = self._scores(states, encoder_attention_mask, input_ids, attention_mask, "sample-major")
        return SequenceClassifierOutput(logits=scores)


AutoConfig.register(REWARD_MODEL_TYPE, EncoderDecoderRewardConfig)
AutoModel.register(EncoderDecoderRewardConfig, EncoderDecoderRewardModel)


def load_reward_model(path: str, *, field: str = "reward_model") -> EncoderDecoderRewardModel:
    """A reward model from the folder of its stage or from the hub, in float32 and evaluation mode.

    Args:
        path: folder or hub id.
        field: the configuration field that named it, for messages.

    Raises:
        UserError: missing, without weights, or not a reward model.
    """
    check_reward_model(path, field)
    folder = Path(path).expanduser()
    try:
        source = str(folder) if folder.exists() else path
        model = EncoderDecoderRewardModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"the reward model cannot be loaded ({first})"
        raise UserError(field, path, problem, "give the folder of a reward stage") from error
    lean_layers(model)
    return model.eval()


class RewardScorer:
    """Texts in, scores out: a reward model with its own tokenizer, prefix and lengths.

    Args:
        path: folder or hub id of a reward model.
        batch_size: summaries scored in one pass.
        device: where to compute; None takes a GPU where there is one.
        field: the configuration field that named the path, for messages.

    Raises:
        UserError: as ``load_reward_model`` and ``load_tokenizer``.
    """

    def __init__(
        self, path: str, *, batch_size: int = 64, device: torch.device | str | None = None, field: str = "reward_model"
    ):
        self.model = load_reward_model(path, field=field)
        self.tokenizer = load_tokenizer(path, field=field)
        self.batch_size = batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device)

    def __call__(self, documents: Sequence[str], summaries: Sequence[str]) -> list[float]:
        """Score summaries[i] as a summary of documents[i]; a document that recurs is encoded once a batch.

        Raises:
            ValueError: the two differ in number.
        """
        if len(documents) != len(summaries):
            raise ValueError(f"{len(documents)} documents but {len(summaries)} summaries")
        if not documents:
            return []
        lengths = self.model.lengths
        distinct = {text: number for number, text in enumerate(dict.fromkeys(documents))}
        sources = tokenize_sources(self.tokenizer, list(distinct), lengths)["input_ids"]
        targets = tokenize_targets(self.tokenizer, list(summaries), lengths)["input_ids"]
        owner = [distinct[text] for text in documents]
        return score_tokens(self.model, sources, targets, owner, self.tokenizer.pad_token_id, self.batch_size)


@torch.no_grad()
def score_tokens(
    model: EncoderDecoderRewardModel,
    sources: Sequence[Sequence[int]],
    summaries: Sequence[Sequence[int]],
    owner: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> list[float]:
    """Scores of tokenized summaries, batches of like length, a document's summaries beside each other.

    Args:
        model: in evaluation mode (it is put there).
        sources: D token lists of documents.
        summaries: N token lists.
        owner: (N,) the document of each summary.
        pad_id: padding id.
        batch_size: summaries in one pass.

    Returns:
        N floats, in the order of ``summaries``.
    """
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(range(len(summaries)), key=lambda i: (len(sources[owner[i]]), owner[i], len(summaries[i]), i))
    scores = [0.0] * len(summaries)
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        documents = list(dict.fromkeys(owner[i] for i in rows))
        place = {document: index for index, document in enumerate(documents)}
        source_ids, source_mask = pad_rows([sources[document] for document in documents], pad_id)
        summary_ids, summary_mask = pad_rows([summaries[i] for i in rows], pad_id)
        order = torch.tensor([place[owner[i]] for i in rows], device=device)
        tensors = (t.to(device) for t in (source_ids, source_mask, summary_ids, summary_mask))
        for row, score in zip(rows, model.score(*tensors, order=order).tolist(), strict=True):
            scores[row] = score
    return scores

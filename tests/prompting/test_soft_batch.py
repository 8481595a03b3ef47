"""A prompt-tuned model answers the same from memory, when loaded again, and in a batch with other prompts."""

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_local import LocalBackend
from pipelines.prompting.soft_batch import MixedBackend, prompt_vectors
from tests.prompting.tiny_causal import CAUSAL, tiny_causal, tiny_t5, tiny_tokenizer

PROMPTS = ["cat ->", "a brown fox jumps over the lazy dog, then box ->", "Question: what? Answer:", "x"]
CHOICES = [" A", " B", " the dog"]


def model_of(family: str):
    tokenizer = tiny_tokenizer()
    return tiny_t5(len(tokenizer)) if family == "t5" else tiny_causal(family, len(tokenizer)), tokenizer


def tuned(family: str, seed: int, tokens: int):
    """A model with a soft prompt of noise."""
    model, _ = model_of(family)
    torch.manual_seed(seed)
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=tokens, num_transformer_submodules=1)
    made = get_peft_model(model, config).eval()
    torch.nn.init.normal_(made.prompt_encoder["default"].embedding.weight, std=0.5)
    return made


def answers(backend, texts):
    """What it generates with probabilities, and what it gives the choices."""
    made = backend.generate(texts, Sampling(max_new_tokens=6))
    scores = backend.choice_log_probs(texts, [CHOICES] * len(texts))
    return [(g.text, g.log_probs) for (g,) in made], [[s.log_prob for s in row] for row in scores]


def same(first, second):
    assert [text for text, _ in first[0]] == [text for text, _ in second[0]]
    for (_, one), (_, two) in zip(first[0], second[0], strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    for one, two in zip(first[1], second[1], strict=True):
        assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("family", [*CAUSAL[:2], "t5", *(pytest.param(f, marks=pytest.mark.slow) for f in CAUSAL[2:])])
def test_alone_loaded_again_and_in_a_batch_with_other_prompts(family, tmp_path):
    tokenizer = model_of(family)[1]
    models = {"first": tuned(family, 1, 3), "second": tuned(family, 2, 7)}
    alone = {name: answers(LocalBackend(model, tokenizer), PROMPTS) for name, model in models.items()}
    hard = answers(LocalBackend(model_of(family)[0], tokenizer), PROMPTS)
    assert alone["first"] != alone["second"]  # the prompts matter, or nothing would be shown
    assert alone["first"] != hard

    models["first"].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_of(family)[0], str(tmp_path)).eval()
    assert answers(LocalBackend(loaded, tokenizer), PROMPTS) == alone["first"]
    assert torch.equal(prompt_vectors(loaded), prompt_vectors(models["first"]))

    vectors = {name: prompt_vectors(model) for name, model in models.items()}
    mixed = MixedBackend(model_of(family)[0], tokenizer, vectors, batch_size=64)
    texts = [mixed.marked("first", t) for t in PROMPTS] + PROMPTS + [mixed.marked("second", t) for t in PROMPTS]
    together = answers(mixed, texts)
    for start, expected in ((0, alone["first"]), (4, hard), (8, alone["second"])):
        same((together[0][start : start + 4], together[1][start : start + 4]), expected)


def test_pefts_own_batches_move_a_soft_prompt_away_from_padded_text():
    # why the backend above exists: [prompt][padding][text] is not [padding][prompt][text] to rotary positions
    model, tokenizer = tuned("llama", 1, 3), model_of("llama")[1]
    ids = torch.tensor([[5, 6, 7]])
    padded, mask = torch.tensor([[0, 0, 0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        moved = model(input_ids=padded, attention_mask=mask).logits[0, -1]
    assert (alone - moved).abs().max() > 1e-3
    mixed = MixedBackend(model.get_base_model(), tokenizer, {"p": prompt_vectors(model)})
    (first,), (second,) = (
        mixed._tail_log_probs([mixed.virtual["p"] + [5, 6, 7], *more], 1)[:1] for more in ([], [[1] * 30])
    )
    assert first[0] == pytest.approx(alone.log_softmax(-1), abs=1e-5)
    assert second[0] == pytest.approx(alone.log_softmax(-1), abs=1e-5)


def test_a_name_that_was_not_given_is_refused():
    model, tokenizer = model_of("gpt2")
    with pytest.raises(KeyError):
        MixedBackend(model, tokenizer, {}).marked("other", "x")


def test_only_vectors_before_the_text_can_be_shared():
    from peft import PrefixTuningConfig

    made = get_peft_model(model_of("gpt2")[0], PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PREFIX_TUNING has no vectors"):
        prompt_vectors(made)

"""The local backend: what a batch gives a prompt is what the prompt gets alone."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from pipelines.corpus import unigram
from pipelines.errors import UserError
from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_local import LocalBackend
from tests.prompting.tiny_causal import CAUSAL, TEXTS, tiny_causal, tiny_t5, tiny_tokenizer

PROMPTS = [
    "Question: what?\nA. cat\nB. dog\nAnswer:",
    "box ->",
    "cat -> cats\ndog -> dogs\nchild ->",
    "x",
    "The quick brown fox jumps over the lazy dog TL;DR:",
]
CHOICES = [
    [" A", " B"],
    [" boxes", " box", " the lazy dog"],
    [" children"],
    ["yz", "y", " B", "yzz"],
    [" it jumps", ""],
]
CHOICES[4][1] = " jumps over"


@pytest.fixture(scope="module", params=CAUSAL)
def causal(request):
    tokenizer = tiny_tokenizer()
    return tiny_causal(request.param, len(tokenizer)), tokenizer


@torch.no_grad()
def one_choice(model, tokenizer, prompt: str, choice: str) -> float:
    """log p(choice | prompt) from one forward pass over one unpadded row."""
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + choice))
    start = 0
    while start < len(before) and before[start] == whole[start]:
        start += 1
    log_probs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_probs[place - 1, whole[place]].item() for place in range(start, len(whole)))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_choices_score_as_in_a_loop_over_single_rows(causal, batch):
    model, tokenizer = causal
    found = LocalBackend(model, tokenizer, batch_size=batch).choice_log_probs(PROMPTS, CHOICES)
    assert [len(row) for row in found] == [len(row) for row in CHOICES]
    for prompt, choices, scores in zip(PROMPTS, CHOICES, found, strict=True):
        for choice, score in zip(choices, scores, strict=True):
            assert score.log_prob == pytest.approx(one_choice(model, tokenizer, prompt, choice), abs=1e-5)
            assert score.tokens == len(tokenizer(prompt + choice)["input_ids"]) - len(tokenizer(prompt)["input_ids"])


def test_labels_of_one_token_share_one_forward_pass(causal, monkeypatch):
    model, tokenizer = causal
    backend, rows = LocalBackend(model, tokenizer), []
    original = backend._tail_log_probs
    monkeypatch.setattr(backend, "_tail_log_probs", lambda r, t: rows.extend(r) or original(r, t))
    backend.choice_log_probs(PROMPTS[:1], [[" B", " C", " D", " E"]])
    assert rows == [tokenizer(PROMPTS[0])["input_ids"]]
    rows.clear()
    backend.choice_log_probs(PROMPTS[:1], [[" B", " box", " boxes", " it"]])  # box and boxes part at their last token
    assert rows == [tokenizer(PROMPTS[0] + " box")["input_ids"][:-1]]


def test_a_merge_across_the_boundary_is_scored_alike_for_all_choices():
    """``do`` + ``g`` is one token, ``do`` + ``t`` is two: both must be scored from the token before."""
    tokenizer = tiny_tokenizer()
    model = tiny_causal("gpt2", len(tokenizer))
    prompt, choices = "cat d", ["og", "ot"]
    base = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + "og")["input_ids"][: len(base)] != base  # the case is what it says
    (scores,) = LocalBackend(model, tokenizer).choice_log_probs([prompt], [choices])
    start = min(
        next((i for i, (a, b) in enumerate(zip(base, whole, strict=False)) if a != b), len(base))
        for whole in (tokenizer(prompt + choice)["input_ids"] for choice in choices)
    )
    for choice, score in zip(choices, scores, strict=True):
        whole = tokenizer(prompt + choice)["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        expected = sum(log_probs[place - 1, whole[place]].item() for place in range(start, len(whole)))
        assert score.log_prob == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens one by one, without a cache or padding, and their log-probabilities; ends at id 0."""
    ids, taken, log_probs = tokenizer(prompt)["input_ids"], [], []
    for _ in range(count):
        row = model(input_ids=torch.tensor([ids + taken])).logits[0, -1].double().log_softmax(-1)
        taken.append(int(row.argmax()))
        log_probs.append(row.max().item())
        if taken[-1] == 0:
            break
    return taken, log_probs


@pytest.mark.parametrize("batch", [1, 4])
def test_temperature_zero_is_argmax_whatever_the_batch(causal, batch):
    model, tokenizer = causal
    backend = LocalBackend(model, tokenizer, batch_size=batch)
    found = backend.generate(PROMPTS, Sampling(max_new_tokens=7), samples=2)
    views = backend.token_probabilities(PROMPTS, Sampling(max_new_tokens=7), alternatives=3)
    for prompt, (one, two), view in zip(PROMPTS, found, views, strict=True):
        taken, log_probs = greedy(model, tokenizer, prompt, 7)
        assert one == two
        assert one.text == tokenizer.decode(taken, skip_special_tokens=True)
        assert one.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert one.finished == (0 in taken)
        assert [t.probability for t in view] == pytest.approx([2.718281828459045**p for p in log_probs], rel=1e-3)
        assert all(t.alternatives[0] == (t.token, t.probability) for t in view)
        assert all(len(t.alternatives) == 3 for t in view)
        assert [t.token for t in view] == [tokenizer.decode([token]) for token in taken]


def test_samples_depend_on_seed_prompt_and_number_alone(causal):
    model, tokenizer = causal
    warm = Sampling(temperature=1.5, max_new_tokens=6, seed=3)
    many = LocalBackend(model, tokenizer, batch_size=8).generate(PROMPTS, warm, samples=3)
    alone = [LocalBackend(model, tokenizer, batch_size=1).generate([p], warm, samples=3)[0] for p in PROMPTS]
    assert [[g.text for g in row] for row in many] == [[g.text for g in row] for row in alone]
    assert len({g.text for row in many for g in row}) > len(PROMPTS)
    other = LocalBackend(model, tokenizer).generate(PROMPTS, Sampling(temperature=1.5, max_new_tokens=6, seed=4))
    assert [row[0].text for row in other] != [row[0].text for row in many]


def test_samples_follow_the_distribution_with_temperature_and_top_p():
    tokenizer = tiny_tokenizer()
    model = tiny_causal("gpt2", len(tokenizer))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("box ->")["input_ids"]])).logits[0, -1]
    expected = (logits.double() / 2).softmax(-1)
    draws = 4000
    backend = LocalBackend(model, tokenizer, batch_size=1000)
    sampling = Sampling(temperature=2.0, max_new_tokens=1)
    views = backend.generate(["box ->"], sampling, samples=draws)[0]
    # what was taken is known by its probability, which is that of temperature 1
    plain = logits.double().log_softmax(-1)
    taken = torch.tensor([int((plain - g.log_probs[0]).abs().argmin()) for g in views])
    seen = torch.bincount(taken, minlength=len(expected)) / draws
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((seen - expected).abs() <= 4.5 * error + 1e-9).all()

    narrow = backend.generate(["box ->"], Sampling(temperature=2.0, top_p=0.3, max_new_tokens=1), samples=500)[0]
    ordered = expected.sort(descending=True)
    allowed = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    assert {int((plain - g.log_probs[0]).abs().argmin()) for g in narrow} <= allowed


def test_an_answer_ends_before_the_stop_text():
    tokenizer = tiny_tokenizer()
    model = tiny_causal("gpt2", len(tokenizer))
    backend = LocalBackend(model, tokenizer)
    warm = Sampling(temperature=3.0, max_new_tokens=12)
    free = [row[0] for row in backend.generate(PROMPTS, warm)]
    stop = next(c for g in free for c in g.text[2:] if c.isascii() and c.isalpha())
    held = backend.generate(PROMPTS, Sampling(temperature=3.0, max_new_tokens=12, stop=stop))
    stopped = 0
    for before, (after,) in zip(free, held, strict=True):
        assert after.text == before.text.split(stop)[0]
        if stop in before.text:
            stopped += 1
            assert after.finished
            assert after.log_probs == pytest.approx(before.log_probs[: len(after.log_probs)], abs=1e-5)
            assert len(after.log_probs) <= len(before.log_probs)
    assert stopped


def test_a_prompt_longer_than_the_context_is_one_line():
    tokenizer = tiny_tokenizer()
    backend = LocalBackend(tiny_causal("gpt2", len(tokenizer), positions=16), tokenizer, name="tiny")
    with pytest.raises(UserError, match=r"a prompt takes \d+ tokens and 4 for the answer, tiny reads 16; give fewer"):
        backend.generate(["cat -> cats\n" * 5], Sampling(max_new_tokens=4))
    with pytest.raises(UserError, match=r"with its longest choice it takes \d+ tokens, tiny reads 16"):
        backend.choice_log_probs(["cat -> cats\n" * 5], [["a", "b"]])
    assert backend.generate(["cat ->"], Sampling(max_new_tokens=4))[0][0].log_probs


def test_an_empty_prompt_begins_with_the_models_own_token():
    tokenizer = tiny_tokenizer()
    model = tiny_causal("gpt2", len(tokenizer))
    backend = LocalBackend(model, tokenizer)
    (scores,) = backend.choice_log_probs([""], [["cat", "x"]])
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[0]])).logits[0, -1].log_softmax(-1)
    assert scores[1].log_prob == pytest.approx(first[tokenizer("x")["input_ids"][0]].item(), abs=1e-5)
    assert backend.generate([""], Sampling(max_new_tokens=3))[0][0].log_probs
    with pytest.raises(UserError, match="an empty choice cannot be scored"):
        backend.choice_log_probs(["a"], [["b", " "]])


def test_a_chat_model_reads_the_prompt_through_its_template():
    tokenizer = tiny_tokenizer(chat=True)
    model = tiny_causal("llama", len(tokenizer))
    backend = LocalBackend(model, tokenizer, chat=True)
    prompt = f"<|user|>{PROMPTS[1]}<|end|><|assistant|>"
    plain = LocalBackend(model, tokenizer)
    expected = plain.generate([prompt], Sampling(max_new_tokens=5))[0][0]
    (found,) = backend.generate(PROMPTS[1:2], Sampling(max_new_tokens=5))[0]
    assert found.text == expected.text
    (scores,) = backend.choice_log_probs(PROMPTS[1:2], [[" boxes", " box"]])
    assert scores[0].log_prob == pytest.approx(one_choice(model, tokenizer, prompt, "boxes"), abs=1e-5)
    with pytest.raises(UserError, match=r"models\.model=.*no chat template"):
        LocalBackend(model, tiny_tokenizer(), chat=True)


# --- encoder-decoders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["t5", "bart"])
def encoder_decoder(request):
    tokenizer = unigram.train(TEXTS * 30, 330, lowercase=False)
    if request.param == "t5":
        return tiny_t5(len(tokenizer)), tokenizer
    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


@torch.no_grad()
def test_an_encoder_decoders_choices_score_as_in_a_loop(encoder_decoder):
    model, tokenizer = encoder_decoder
    found = LocalBackend(model, tokenizer, batch_size=3).choice_log_probs(PROMPTS, CHOICES)
    for prompt, choices, scores in zip(PROMPTS, CHOICES, found, strict=True):
        source = torch.tensor([tokenizer(prompt)["input_ids"]])
        for choice, score in zip(choices, scores, strict=True):
            labels = tokenizer(choice.strip())["input_ids"]
            assert labels.pop() == tokenizer.eos_token_id
            inputs = torch.tensor([[model.config.decoder_start_token_id, *labels[:-1]]])
            log_probs = model(input_ids=source, decoder_input_ids=inputs).logits[0].double().log_softmax(-1)
            expected = sum(log_probs[place, token].item() for place, token in enumerate(labels))
            assert score.log_prob == pytest.approx(expected, abs=1e-5)
            assert score.tokens == len(labels)


@torch.no_grad()
def test_an_encoder_decoder_answers_alike_alone_and_in_a_batch(encoder_decoder):
    model, tokenizer = encoder_decoder
    many = LocalBackend(model, tokenizer).generate(PROMPTS, Sampling(max_new_tokens=6))
    for prompt, (found,) in zip(PROMPTS, many, strict=True):
        source = torch.tensor([tokenizer(prompt)["input_ids"]])
        taken, log_probs = [model.config.decoder_start_token_id], []
        for _ in range(6):
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([taken])).logits[0, -1].double()
            log_probs.append(logits.log_softmax(-1).max().item())
            taken.append(int(logits.argmax()))
            if taken[-1] == tokenizer.eos_token_id:
                break
        assert found.text == tokenizer.decode(taken[1:], skip_special_tokens=True)
        assert found.log_probs == pytest.approx(log_probs, abs=1e-4)


# --- soft prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_soft_prompt_scores_and_answers_alike_alone_and_in_a_batch(kind):
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    tokenizer = tiny_tokenizer()
    base = tiny_causal("gpt2", len(tokenizer))
    cls = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    torch.manual_seed(2)
    model = get_peft_model(base, cls(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)).eval()
    alone, many = (LocalBackend(model, tokenizer, batch_size=size) for size in (1, 8))
    prompts = [*PROMPTS, "dog ->", "cat ->"]
    choices = [*CHOICES, [" dogs", " a"], [" cats"]]
    one, two = (
        [s.log_prob for row in backend.choice_log_probs(prompts, choices) for s in row] for backend in (alone, many)
    )
    assert one == pytest.approx(two, abs=1e-5)
    plain = [s.log_prob for row in LocalBackend(base, tokenizer).choice_log_probs(prompts, choices) for s in row]
    assert max(abs(a - b) for a, b in zip(one, plain, strict=True)) > 1e-3
    with torch.no_grad():
        ids = tokenizer(prompts[0] + " B")["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert two[1] == pytest.approx(logits[-2, ids[-1]].item(), abs=1e-5)
    first, second = (
        [row[0].text for row in backend.generate(prompts, Sampling(max_new_tokens=5))] for backend in (alone, many)
    )
    assert first == second
    assert alone.reader.room == 128 - 5

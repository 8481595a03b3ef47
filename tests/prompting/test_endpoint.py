"""Endpoints: the answers of the local model; faults are weathered or told; nothing is asked twice; no key is left."""

import json
import math
import time

import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_local import LocalBackend
from pipelines.prompting.cache import ResponseCache, request_key
from pipelines.prompting.endpoint import EndpointBackend, EndpointSpec, read_endpoint
from tests.prompting.faulty_proxy import FaultyProxy
from tests.prompting.tiny_causal import tiny_causal, tiny_tokenizer

PROMPTS = [f"cat -> cats\n{word} ->" for word in ("dog", "box", "child", "city", "lens", "fox", "key", "hat")]
KEY = "sk-a1b2c3d4-never-to-be-written"
GREEDY = Sampling(max_new_tokens=5)


def endpoint(url, tmp_path, model="m", **fields) -> EndpointBackend:
    spec = read_endpoint("remote", {"url": url, "model": model, "timeout": 20, **fields})
    return EndpointBackend(spec, name="remote", cache=ResponseCache(tmp_path / "cache"))


def completion(text: str, **more) -> dict:
    return {"choices": [{"index": 0, "text": text, "finish_reason": "stop", **more}]}


@pytest.fixture(scope="module")
def local():
    tokenizer = tiny_tokenizer(chat=True)
    return tiny_causal("llama", len(tokenizer), positions=400), tokenizer


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_real_server_answers_as_the_local_model_does(served, local, tmp_path, api):
    backend = endpoint(served.url, tmp_path, served.model, api=api)
    expected = LocalBackend(*local, chat=api == "chat").generate(PROMPTS, GREEDY)
    found = backend.generate(PROMPTS, GREEDY)
    assert [row[0].text for row in found] == [row[0].text for row in expected]
    assert [row[0].finished for row in found] == [row[0].finished for row in expected]
    assert len({row[0].text for row in found}) > 1
    # it ignores `logprobs`, which is told where they are needed, and only there
    assert all(row[0].log_probs is None and row[0].failure is None for row in found)
    with pytest.raises(UserError, match="gives no token log-probabilities; the token-probability view needs them"):
        backend.token_probabilities(PROMPTS[:1], GREEDY)
    message = "gives no token log-probabilities; scoring" if api == "completions" else "cannot score a text"
    with pytest.raises(UserError, match=message) as caught:
        backend.choice_log_probs(PROMPTS[:1], [[" a", " b"]])
    assert "scoring=[generate]" in str(caught.value)


def test_a_real_server_stops_at_the_stop_text_as_the_local_model_does(served, local, tmp_path):
    free = LocalBackend(*local).generate(PROMPTS, Sampling(max_new_tokens=8))
    stop = next(c for row in free for c in row[0].text[1:] if c.isascii() and c.isprintable())
    sampling = Sampling(max_new_tokens=8, stop=stop)
    expected = [row[0] for row in LocalBackend(*local).generate(PROMPTS, sampling)]
    found = [row[0] for row in endpoint(served.url, tmp_path, served.model).generate(PROMPTS, sampling)]
    assert [(g.text, g.finished) for g in found] == [(g.text, g.finished) for g in expected]
    assert any(g.text != row[0].text for g, row in zip(found, free, strict=True))


def test_faults_in_front_of_a_real_server_are_weathered_and_the_second_run_is_free(served, local, tmp_path):
    faults = [429, 500, "drop", "torn", "slow:4", 503, None, 429]

    def plan(body, before):
        number = PROMPTS.index(body["prompt"])
        return faults[number] if before == 0 else None

    expected = [row[0].text for row in LocalBackend(*local).generate(PROMPTS, GREEDY)]
    with FaultyProxy(served.root, plan) as proxy:
        backend = endpoint(proxy.url, tmp_path, served.model, timeout=3.0, concurrency=8)
        assert [row[0].text for row in backend.generate(PROMPTS, GREEDY)] == expected
        sent = proxy.requests
        # each prompt once, and once more where there was a fault (late answers are asked for again)
        assert sent == len(PROMPTS) + sum(fault is not None for fault in faults)
        assert [row[0].text for row in backend.generate(PROMPTS, GREEDY)] == expected
        again = endpoint(proxy.url, tmp_path, served.model)
        assert [row[0].text for row in again.generate(PROMPTS, GREEDY)] == expected
        assert proxy.requests == sent


def test_an_answer_that_never_comes_is_told_and_asked_for_again(tmp_path):
    broken = {1: 500, 2: "drop", 3: "slow:9", 4: 429, 5: "html", 6: {"choices": []}}

    def plan(body, before):
        return broken.get(PROMPTS.index(body["prompt"]), completion(" right"))

    with FaultyProxy(None, plan) as proxy:
        backend = endpoint(proxy.url, tmp_path, max_retries=1, timeout=1)
        found = [row[0] for row in backend.generate(PROMPTS, GREEDY)]
        assert [g.text for g in found] == [" right", *[""] * 6, " right"]
        told = [g.failure for g in found[1:7]]
        assert told[0].startswith("HTTP 500")
        assert told[1].startswith("the connection broke")
        assert told[2] == "no answer within 1 s"
        assert told[3].startswith("HTTP 429")
        assert told[4].startswith("an answer that cannot be read")
        assert told[5].startswith("an answer that cannot be read")
        before = proxy.requests
        broken.clear()
        again = [row[0] for row in backend.generate(PROMPTS, GREEDY)]
        assert all(g.text == " right" and g.failure is None for g in again)
        assert proxy.requests - before == 6  # only what had failed


def test_no_more_requests_at_once_than_told(tmp_path):
    def plan(body, before):
        time.sleep(0.05)
        return completion("x")

    with FaultyProxy(None, plan) as proxy:
        endpoint(proxy.url, tmp_path, concurrency=3).generate([f"p{n}" for n in range(20)], GREEDY)
        assert 2 <= proxy.most_at_once <= 3
        assert proxy.requests == 20


def test_equal_requests_are_one(tmp_path):
    with FaultyProxy(None, lambda body, before: completion(str(body["seed"]))) as proxy:
        backend = endpoint(proxy.url, tmp_path)
        backend.generate(["a", "b", "a"], GREEDY, samples=4)
        assert proxy.requests == 2  # at temperature 0 all samples are one
        warm = Sampling(temperature=1.0, max_new_tokens=5)
        first = backend.generate(["a"], warm, samples=3)[0]
        assert len({g.text for g in first}) == 3  # each sample with a seed of its own
        assert proxy.requests == 5
        assert backend.generate(["a"], warm, samples=4)[0][:3] == first
        assert proxy.requests == 6


def test_the_cache_is_keyed_by_everything_that_matters(tmp_path):
    base = {"url": "http://h/v1", "model": "m"}
    variants = [
        (base, "p", GREEDY, 0, 0),
        (base | {"url": "http://g/v1"}, "p", GREEDY, 0, 0),
        (base | {"model": "n"}, "p", GREEDY, 0, 0),
        (base | {"api": "chat"}, "p", GREEDY, 0, 0),
        (base | {"api": "chat", "system": "be brief"}, "p", GREEDY, 0, 0),
        (base | {"extra": {"min_p": 0.1}}, "p", GREEDY, 0, 0),
        (base, "q", GREEDY, 0, 0),
        (base, "p", Sampling(max_new_tokens=6), 0, 0),
        (base, "p", Sampling(max_new_tokens=5, temperature=0.5), 0, 0),
        (base, "p", Sampling(max_new_tokens=5, top_p=0.5), 0, 0),
        (base, "p", Sampling(max_new_tokens=5, stop="\n"), 0, 0),
        (base, "p", Sampling(max_new_tokens=5, seed=1), 0, 0),
        (base, "p", GREEDY, 1, 0),
        (base, "p", GREEDY, 0, 5),
    ]
    keys = set()
    for spec, prompt, sampling, sample, log_probs in variants:
        backend = EndpointBackend(validate(EndpointSpec, spec), name="x", cache=ResponseCache(tmp_path))
        keys.add(request_key(backend._request(prompt, sampling, sample, log_probs)))
        # how fast and how often it is asked decides nothing
        patient = validate(EndpointSpec, spec | {"timeout": 9, "concurrency": 1, "max_retries": 0})
        other = EndpointBackend(patient, name="y", cache=ResponseCache(tmp_path))
        assert request_key(other._request(prompt, sampling, sample, log_probs)) in keys
    assert len(keys) == len(variants)


def test_extra_fields_change_the_body_and_null_takes_one_out(tmp_path):
    extra = {"max_tokens": None, "max_completion_tokens": 7, "top_p": 0.3, "min_p": 0.1}
    with FaultyProxy(None, lambda body, before: completion("x")) as proxy:
        endpoint(proxy.url, tmp_path, extra=extra, send_seed=False).generate(["p"], GREEDY)
        (body,) = map(json.loads, proxy.seen)
    assert body == {
        "model": "m", "max_completion_tokens": 7, "temperature": 0.0, "top_p": 0.3, "min_p": 0.1, "prompt": "p",
        "logprobs": 0,
    }  # fmt: skip


def test_a_torn_cache_file_is_asked_for_again(tmp_path):
    cache = ResponseCache(tmp_path)
    request = {"url": "u", "api": "completions", "body": {"prompt": "ü"}, "sample": 0}
    assert cache.get(request) is None
    cache.put(request, {"text": "é"})
    assert cache.get(request) == {"text": "é"}
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text()[:-5])
    assert cache.get(request) is None
    cache.put(request, {"text": "é"})
    assert cache.get(request) == {"text": "é"}
    assert not list(tmp_path.rglob("*.tmp"))


# --- log-probabilities, from a server that gives them -----------------------------------------------------------------


def server_with_log_probs(model, tokenizer):
    """What a server with ``echo`` and ``logprobs`` answers, computed with the model itself (as vLLM formats it)."""
    import torch

    def answer(body, before):
        ids = tokenizer(body["prompt"])["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        if body.get("echo"):
            tokens = [tokenizer.decode([i]) for i in ids]
            values = [None, *(log_probs[n, ids[n + 1]].item() for n in range(len(ids) - 1))]
            given = {"tokens": ["<s>", *tokens, "!"], "token_logprobs": [None, *values, -0.5]}
            return completion(body["prompt"] + "!", logprobs=given)
        best = log_probs[-1].topk(body["logprobs"] or 1)
        tops = {tokenizer.decode([i]): p for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        token = next(iter(tops))
        given = {"tokens": [token], "token_logprobs": [tops[token]], "top_logprobs": [tops]}
        return completion(token, logprobs=given)

    return answer


def test_choices_score_as_with_the_local_model_where_the_server_echoes(local, tmp_path):
    model, tokenizer = local
    prompts = ["cat ->", "Question: what do birds eat?\nA. seeds\nB. stone\nAnswer:", "the lazy d"]
    choices = [[" cats", " cat", " the lazy dog"], [" A", " B"], ["og", "ot"]]
    expected = LocalBackend(model, tokenizer).choice_log_probs(prompts, choices)
    with FaultyProxy(None, server_with_log_probs(model, tokenizer)) as proxy:
        backend = endpoint(proxy.url, tmp_path)
        found = backend.choice_log_probs(prompts, choices)
        one = Sampling(max_new_tokens=1)
        view = backend.token_probabilities(prompts, one, alternatives=3)
        told = backend.generate(prompts, one)
    for row, other in zip(found, expected, strict=True):
        assert [s.log_prob for s in row] == pytest.approx([s.log_prob for s in other], abs=1e-5)
        assert [s.tokens for s in row] == [s.tokens for s in other]
    mine = LocalBackend(model, tokenizer).token_probabilities(prompts, one, alternatives=3)
    for (one_view,), (other_view,), (generation,) in zip(view, mine, told, strict=True):
        assert one_view.token == other_view.token
        assert one_view.probability == pytest.approx(other_view.probability, abs=1e-5)
        # as a mapping of texts, which is the format, tokens that are half a character fall together
        others = {t: p for t, p in other_view.alternatives if "\ufffd" not in t}
        assert {t: p for t, p in one_view.alternatives if t in others} == pytest.approx(others, abs=1e-5)
        assert math.exp(generation.log_probs[0]) == pytest.approx(one_view.probability, abs=1e-9)


def test_a_server_without_log_probs_is_noticed_after_one_prompt(tmp_path):
    with FaultyProxy(None, lambda body, before: completion("x")) as proxy:
        with pytest.raises(UserError, match="gives no token log-probabilities; scoring by likelihood needs"):
            endpoint(proxy.url, tmp_path).choice_log_probs(PROMPTS, [[" a", " b", " c"]] * len(PROMPTS))
        assert proxy.requests == 3


def test_scores_of_a_prompt_are_all_there_or_all_failed(local, tmp_path):
    real = server_with_log_probs(*local)
    with FaultyProxy(None, lambda body, before: 500 if body["prompt"] == "a x" else real(body, before)) as proxy:
        first, second = endpoint(proxy.url, tmp_path, max_retries=0).choice_log_probs(["a", "b"], [[" y", " x"]] * 2)
    assert all(math.isnan(score.log_prob) and score.failure.startswith("HTTP 500") for score in first)
    assert all(score.failure is None and score.log_prob < 0 for score in second)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_an_endpoint_that_is_not_there_is_one_line_soon(tmp_path):
    backend = endpoint("http://127.0.0.1:9/v1", tmp_path)
    with pytest.raises(
        UserError, match=r"^endpoints\.remote\.url=http://127.0.0.1:9/v1: nothing answers there \(All conn.*; st"
    ):
        backend.generate(PROMPTS, GREEDY)


def test_an_endpoint_that_dies_is_not_asked_a_thousand_times(tmp_path):
    with FaultyProxy(None, lambda body, before: completion("x") if body["prompt"] == "p0" else 500) as proxy:
        found = endpoint(proxy.url, tmp_path, max_retries=0).generate([f"p{n}" for n in range(60)], GREEDY)
        assert proxy.requests < 20
    assert found[0][0].text == "x"
    assert found[-1][0].failure == "not asked, 10 answers in a row had failed"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"endpoints\.remote\.api_key_env=SOME_KEY: the endpoint refuses the key \(HTTP 401: .*…"),
        (404, r"endpoints\.remote\.model=m: not found there \(HTTP 404"),
        (400, r"endpoints\.remote: prompt=cat -> .*the endpoint refuses it \(HTTP 400.*give a shorter prompt"),
    ],
)
def test_a_refusal_is_one_line_without_the_key(tmp_path, monkeypatch, capfd, status, message):
    monkeypatch.setenv("SOME_KEY", KEY)
    with FaultyProxy(None, lambda body, before: status) as proxy:
        original = proxy.server.RequestHandlerClass.reply
        repeats = json.dumps({"error": {"message": f"no such key: {KEY}"}}).encode()
        monkeypatch.setattr(
            proxy.server.RequestHandlerClass, "reply", lambda s, c, b, **m: original(s, c, repeats, **m)
        )
        with pytest.raises(UserError, match=message) as caught:
            endpoint(proxy.url, tmp_path, api_key_env="SOME_KEY").generate(PROMPTS, GREEDY)
        assert proxy.keys == {f"Bearer {KEY}"}
    assert len(caught.value.problems) == 1
    assert KEY not in str(caught.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url=127.0.0.1:8000: not an address"),
        ({"url": f"http://me:{KEY}@host/v1"}, "url=http://host/…: holds more than an address"),
        ({"url": f"http://host/v1?key={KEY}"}, "url=http://host/…: holds more than an address"),
        ({"api_key": KEY}, r"api_key=\(not shown\): unknown key; put a key into an environment variable"),
        ({"temprature": KEY}, r"temprature=\(not shown\): unknown key; "),
        ({"timeout": "soon"}, "timeout=soon"),
        ({"api_key_env": KEY}, r"api_key_env=\(not shown\): not the name of an environment variable"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env=NO_SUCH_KEY: no such environment variable"),
        ({"system": "be brief"}, "system=be brief: acts on api: chat only"),
    ],
)
def test_a_wrong_endpoint_is_refused_before_it_is_asked(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        read_endpoint("remote", {"url": "http://host/v1", "model": "m", **fields})
    assert str(caught.value).startswith("endpoints.remote.")
    assert len(caught.value.problems) == 1
    assert KEY not in str(caught.value)

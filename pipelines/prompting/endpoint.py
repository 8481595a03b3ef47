"""An OpenAI-compatible endpoint as a backend: vLLM, llama.cpp, Ollama, ``transformers serve``, OpenAI and others.

The ``openai`` client sends, retries and backs off. What is ours: how many are on their way at once, the cache, and that
an answer which did not come is told as such. The key comes from an environment variable and is written nowhere.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from pipelines.config import config, fields_of, nearest, validate
from pipelines.errors import Problem, UserError
from pipelines.prompting.backends import ChoiceScore, Generation, Sampling, TokenProbability
from pipelines.prompting.cache import ResponseCache, request_key

if TYPE_CHECKING:
    import openai

_GIVE_UP = 10  # answers in a row that failed, after which the rest is not asked
_NO_KEY = "none"  # what a server that wants no key is sent for one
_HIDDEN = "(not shown)"


@config
class EndpointSpec:
    """An OpenAI-compatible endpoint."""

    url: str = Field(description="its base address, such as http://127.0.0.1:8000/v1")
    model: str = Field(description="the model's name there")
    api: Literal["completions", "chat"] = Field(
        "completions", description="/completions continues the prompt; /chat/completions answers it as a message"
    )
    system: str | None = Field(None, description="chat: the system message")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; null sends none")
    concurrency: int = Field(4, ge=1, le=1000, description="requests on their way at once")
    timeout: float = Field(60.0, gt=0, description="seconds an answer may take")
    max_retries: int = Field(5, ge=0, le=100, description="tries again after 408, 409, 429, 5xx, dropped, timed out")
    log_probs: bool = Field(True, description="ask for token log-probabilities; false where the server refuses that")
    send_seed: bool = Field(True, description="send a seed; false where the server refuses that")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="more fields of the request's body, or other values; null takes one out"
    )

    def problems(self) -> list[Problem]:
        found = []
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            found.append(Problem("url", self.url, "not an address", "write http://HOST:PORT/v1"))
        elif parts.username or parts.password or parts.query:
            mend = "write the bare address, and name the key's environment variable in api_key_env"
            found.append(Problem("url", f"{parts.scheme}://{parts.hostname}/…", "holds more than an address", mend))
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            mend = "give the variable's name, such as OPENAI_API_KEY, not the key"
            found.append(Problem("api_key_env", _HIDDEN, "not the name of an environment variable", mend))
        elif self.api_key_env is not None and not os.environ.get(self.api_key_env):
            mend = f"export {self.api_key_env}=…, or leave api_key_env out for a server without keys"
            found.append(Problem("api_key_env", self.api_key_env, "no such environment variable, or empty", mend))
        elif self.api_key_env is not None and not os.environ[self.api_key_env].isascii():
            found.append(Problem("api_key_env", self.api_key_env, "holds no key (not ASCII)", "mend its value"))
        if self.system is not None and self.api != "chat":
            found.append(Problem("system", self.system, "acts on api: chat only", "give api: chat, or leave it out"))
        return found


def read_endpoint(name: str, table: dict[str, Any]) -> EndpointSpec:
    """The endpoint that a table of a configuration describes.

    Raises:
        UserError: one line for each mistake. Values under unknown names are not shown: one may be a key.
    """
    known = fields_of(EndpointSpec)
    where = f"endpoints.{name}."
    problems = []
    for key in table:
        if key in known:
            continue
        mend = nearest(str(key), list(known))
        if re.search("key|token|secret|password", str(key), re.IGNORECASE):
            mend = "put a key into an environment variable, and that variable's name into api_key_env"
        problems.append(Problem(f"{where}{key}", _HIDDEN, "unknown key", mend))
    kept = {key: value for key, value in table.items() if key in known}
    try:
        spec = validate(EndpointSpec, kept, where)
    except UserError as error:
        raise UserError.of(problems + error.problems) from None
    if problems:
        raise UserError.of(problems)
    return spec


class EndpointBackend:
    """A model behind an endpoint.

    Args:
        spec: which, and how it is asked.
        name: what it is called in results and messages.
        cache: where answers are kept.

    Raises:
        UserError: the package ``openai`` is missing.
    """

    def __init__(self, spec: EndpointSpec, *, name: str, cache: ResponseCache):
        try:
            import openai  # noqa: F401
        except ImportError:
            mend = "pip install 'genalign[prompting]'"
            raise UserError(f"endpoints.{name}", spec.url, "the package openai is missing", mend) from None
        self.spec, self.name, self.cache = spec, name, cache

    # --- what is asked ------------------------------------------------------------------------------------------------

    def _request(self, prompt: str, sampling: Sampling, sample: int, log_probs: int | None) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.spec.model, "max_tokens": sampling.max_new_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.stop:
            body["stop"] = [sampling.stop]
        if self.spec.send_seed:
            body["seed"] = random.Random(f"{sampling.seed} {sample}").getrandbits(31)
        if self.spec.api == "chat":
            system = [] if self.spec.system is None else [{"role": "system", "content": self.spec.system}]
            body["messages"] = [*system, {"role": "user", "content": prompt}]
            if log_probs is not None:
                body |= {"logprobs": True, "top_logprobs": log_probs}
        else:
            body["prompt"] = prompt
            if log_probs is not None:
                body["logprobs"] = log_probs
        return self._whole(body, sample)

    def _whole(self, body: dict[str, Any], sample: int = 0) -> dict[str, Any]:
        body = {field: value for field, value in (body | self.spec.extra).items() if value is not None}
        return {"url": self.spec.url, "api": self.spec.api, "body": body, "sample": sample}

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, *, samples: int = 1, progress: str | None = None
    ) -> list[list[Generation]]:
        """``samples`` answers to each prompt; one that did not come has its ``failure`` said.

        Raises:
            UserError: the endpoint cannot be reached, refuses the key, the model or a request.
        """
        drawn = samples if sampling.temperature > 0 else 1
        wanted = 0 if self.spec.log_probs else None
        requests = [self._request(prompt, sampling, n, wanted) for prompt in prompts for n in range(drawn)]
        found = [self._generation(answer, sampling) for answer in self._ask(requests, progress)]
        rows = [found[start : start + drawn] for start in range(0, len(found), drawn)]
        return rows if drawn == samples else [row * samples for row in rows]

    def _generation(self, answer: dict[str, Any] | str, sampling: Sampling) -> Generation:
        if isinstance(answer, str):
            return Generation("", None, False, answer)
        text, finished = answer["text"], answer["finish_reason"] == "stop"
        if sampling.stop and sampling.stop in text:
            text, finished = text[: text.index(sampling.stop)], True
        log_probs = answer.get("log_probs")
        return Generation(text, None if log_probs is None else tuple(log_probs), finished)

    def token_probabilities(
        self, prompts: Sequence[str], sampling: Sampling, *, alternatives: int = 5
    ) -> list[list[TokenProbability]]:
        """The tokens of one answer to each prompt, with what the endpoint says were alternatives.

        Raises:
            UserError: the endpoint gives no log-probabilities, or an answer failed.
        """
        answers = self._ask([self._request(prompt, sampling, 0, alternatives) for prompt in prompts], None)
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if isinstance(answer, str):
                raise UserError(f"endpoints.{self.name}", prompt, f"no answer came ({answer})", "give it again")
            if answer.get("log_probs") is None:
                raise self._without_log_probs("the token-probability view needs them", "views=0")
            found.append(
                [
                    TokenProbability(token, math.exp(log_prob), tuple((t, math.exp(p)) for t, p in others))
                    for token, log_prob, others in zip(
                        answer["tokens"], answer["log_probs"], answer["alternatives"], strict=True
                    )
                ]
            )
        return found

    def choice_log_probs(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, progress: str | None = None
    ) -> list[list[ChoiceScore]]:
        """log p(choice | prompt) of every choice: the endpoint echoes prompt and choice with their log-probabilities.

        All choices of a prompt are scored from the same character on, the first of any token that holds a character of
        a choice.

        Raises:
            UserError: ``api: chat``, which echoes nothing, or an endpoint that gives no log-probabilities.
        """
        if self.spec.api == "chat":
            mend = "give api: completions, or scoring=[generate]"
            raise UserError(f"endpoints.{self.name}.api", "chat", "cannot score a text that is given to it", mend)
        # One token more is asked for than is looked at: many servers refuse to write none.
        fixed = {"model": self.spec.model, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
        requests = [
            self._whole(fixed | {"prompt": prompt + choice})
            for prompt, some in zip(prompts, choices, strict=True)
            for choice in some
        ]
        for prompt, some in zip(prompts[:1], choices[:1], strict=True):
            # Whoever gives no log-probabilities is noticed by one prompt, not after all of them.
            self._scores(prompt, some, self._ask(requests[: len(some)], None))
        answers = iter(self._ask(requests, progress))
        return [
            self._scores(prompt, some, [next(answers) for _ in some])
            for prompt, some in zip(prompts, choices, strict=True)
        ]

    def _scores(
        self, prompt: str, choices: Sequence[str], answers: Sequence[dict[str, Any] | str]
    ) -> list[ChoiceScore]:
        failed = next((answer for answer in answers if isinstance(answer, str)), None)
        if failed is not None:
            # Choices can only be compared when all are there.
            return [ChoiceScore(math.nan, 0, failed) for _ in choices]
        texts = [prompt + choice for choice in choices]
        placed = []  # of each choice: where each of its tokens begins and ends in the text, and its log-probability
        for text, answer in zip(texts, answers, strict=True):
            # A token that begins every text may stand before it, and what was written stands behind it.
            place = -"".join(answer.get("tokens", ())).find(text)
            if answer.get("log_probs") is None or place > 0:
                why = "scoring by likelihood needs those of the prompt (echo)"
                raise self._without_log_probs(why, "scoring=[generate]")
            mine = []
            for token, log_prob in zip(answer["tokens"], answer["log_probs"], strict=True):
                mine.append((place, place + len(token), log_prob))
                place += len(token)
            placed.append([(begin, end, p) for begin, end, p in mine if begin < len(text)])
        start = min(begin for mine in placed for begin, end, _ in mine if end > len(prompt))
        # The first token of all follows nothing, so it has no probability.
        scored = [[p for begin, _, p in mine if begin >= start and p is not None] for mine in placed]
        return [ChoiceScore(math.fsum(some), len(some)) for some in scored]

    def _without_log_probs(self, why: str, instead: str) -> UserError:
        mend = f"give {instead}, a server that gives them (such as vLLM), or the model itself in models="
        return UserError(f"endpoints.{self.name}", self.spec.url, f"gives no token log-probabilities; {why}", mend)

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, requests: Sequence[dict[str, Any]], progress: str | None) -> list[dict[str, Any] | str]:
        """The answer to each request, from the cache where it is there; or, as text, why there is none."""
        from tqdm.auto import tqdm

        keys = [request_key(request) for request in requests]
        found: dict[str, dict[str, Any] | str] = {}
        pending: dict[str, dict[str, Any]] = {}
        for key, request in zip(keys, requests, strict=True):
            if key in found or key in pending:
                continue
            known = self.cache.get(request)
            if known is None:
                pending[key] = request
            else:
                found[key] = known
        bar = tqdm(total=len(found) + len(pending), initial=len(found), desc=progress, disable=progress is None)
        with bar:
            if pending:
                _run(lambda: self._ask_pending(pending, found, bar.update))
        return [found[key] for key in keys]

    async def _ask_pending(
        self, pending: dict[str, dict[str, Any]], found: dict[str, Any], done: Callable[[], Any]
    ) -> None:
        import openai

        gate = asyncio.Semaphore(self.spec.concurrency)
        in_a_row = 0

        async def one(client: openai.AsyncOpenAI, key: str) -> None:
            nonlocal in_a_row
            async with gate:
                if in_a_row >= _GIVE_UP:
                    found[key] = f"not asked, {_GIVE_UP} answers in a row had failed"
                else:
                    found[key] = await self._ask_one(client, pending[key])
                    in_a_row = in_a_row + 1 if isinstance(found[key], str) else 0
                done()

        key = os.environ[self.spec.api_key_env] if self.spec.api_key_env else _NO_KEY
        async with openai.AsyncOpenAI(
            api_key=key, base_url=self.spec.url, timeout=self.spec.timeout, max_retries=self.spec.max_retries
        ) as client:
            # Whoever is not there at all is noticed by one request soon, not by thousands late.
            first = next(iter(pending))
            answer = await self._ask_one(client.with_options(max_retries=min(1, self.spec.max_retries)), pending[first])
            if isinstance(answer, str) and answer.startswith(_UNREACHABLE):
                mend = "start the server, or mend the address"
                raise UserError(f"endpoints.{self.name}.url", self.spec.url, answer, mend)
            if isinstance(answer, dict):
                found[first] = answer
                done()
            tasks = [asyncio.create_task(one(client, key)) for key in pending if key not in found]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_one(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> dict[str, Any] | str:
        import openai

        path = "/chat/completions" if self.spec.api == "chat" else "/completions"
        try:
            raw = await client.post(path, cast_to=object, body=request["body"])
        except openai.APITimeoutError:
            return f"no answer within {self.spec.timeout:g} s"
        except openai.APIConnectionError as error:
            # A connection that was never made is another thing than one that broke.
            never = type(error.__cause__).__name__ == "ConnectError"
            return f"{_UNREACHABLE if never else 'the connection broke'} ({self._clean(error.__cause__)})"
        except (openai.RateLimitError, openai.InternalServerError) as error:
            return f"HTTP {error.status_code} ({self._clean(error)})"
        except openai.APIStatusError as error:
            if error.status_code in (408, 409):
                return f"HTTP {error.status_code} ({self._clean(error)})"
            raise self._refusal(error, request) from None
        except (openai.OpenAIError, ValueError) as error:
            return f"an answer that cannot be read ({self._clean(error)})"
        answer = _parsed(raw)
        if isinstance(answer, dict):
            self.cache.put(request, answer)
        return answer

    def _refusal(self, error: openai.APIStatusError, request: dict[str, Any]) -> UserError:
        status, said = error.status_code, self._clean(error)
        where = f"endpoints.{self.name}"
        if status in (401, 403):
            env = self.spec.api_key_env
            mend = f"put a valid key into {env}" if env else "name the key's environment variable in api_key_env"
            return UserError(f"{where}.api_key_env", env, f"the endpoint refuses the key (HTTP {status}: {said})", mend)
        if status == 404:
            mend = "mend url (it usually ends in /v1) or model"
            return UserError(f"{where}.model", self.spec.model, f"not found there (HTTP 404: {said})", mend)
        prompt = request["body"].get("prompt") or request["body"]["messages"][-1]["content"]
        mend = "give a shorter prompt (fewer shots), or set log_probs, send_seed or extra as the server wants them"
        return UserError(f"{where}: prompt", prompt, f"the endpoint refuses it (HTTP {status}: {said})", mend)

    def _clean(self, error: object) -> str:
        """What an error says, on one line, without the key should a server repeat it."""
        text = " ".join(str(error).split()) or type(error).__name__
        key = os.environ.get(self.spec.api_key_env or "", "")
        return (text.replace(key, "…") if key else text)[:200]


_UNREACHABLE = "nothing answers there"


def _run(work: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine to its end, in a thread of its own where this one has a loop already (a notebook)."""

    async def whole() -> None:
        await work()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(whole())
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, whole()).result()


def _parsed(raw: Any) -> dict[str, Any] | str:
    """The parts of an answer's JSON that are used, or what is wrong with it.

    Returns:
        ``text``, ``finish_reason`` and, where they are given, ``tokens``, ``log_probs`` (None for a first token that
        follows nothing) and ``alternatives`` (of each token, pairs of a token and its log-probability, falling).
    """
    try:
        choice = raw["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        text = "" if text is None else text
        found: dict[str, Any] = {"text": str(text), "finish_reason": choice.get("finish_reason")}
        given = choice.get("logprobs")
        if not given:
            return found
        if given.get("content") is not None:
            entries = given["content"]
            tokens = [entry["token"] for entry in entries]
            log_probs = [float(entry["logprob"]) for entry in entries]
            tops = [
                {top["token"]: float(top["logprob"]) for top in entry.get("top_logprobs") or []} for entry in entries
            ]
        elif given.get("tokens") is not None:
            tokens = list(given["tokens"])
            log_probs = [None if p is None else float(p) for p in given["token_logprobs"]]
            tops = [top or {} for top in given.get("top_logprobs") or [{}] * len(tokens)]
        else:
            return found
        alternatives = [sorted(([t, float(p)] for t, p in top.items()), key=lambda pair: -pair[1]) for top in tops]
        return found | {"tokens": tokens, "log_probs": log_probs, "alternatives": alternatives}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return f"an answer that cannot be read ({type(error).__name__}: {error})"

"""The official client, held to this project's manners: patience, an end to every wait, one line for what goes wrong.

Endpoint and token are those of ``huggingface_hub``: ``HF_ENDPOINT``, and ``HF_TOKEN`` or what ``hf auth login`` has
stored. The token goes into request headers and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from pipelines.errors import UserError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

T = TypeVar("T")

CONNECTING = 20.0
SILENCE = 300.0
"""Seconds until a connection, and until an answer, is given up: the client itself would wait for ever."""

TRIES = 4
"""How often a step is tried that failed for a reason which may pass (the client tries each upload 6 times itself)."""

LONGEST_PAUSE = 300.0
"""Seconds; a Hub that asks for more than that is asked again by the user."""

_MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504)
_ADDRESS = re.compile(r"(https?://[^/\s'\"]+)/[^\s'\"]*")


class PushError(UserError):
    """The result stands in its folder and is not on the Hub yet."""


def usable_token(given: str | None = None, what: str = "", kept: str = "") -> str:
    """The token to push with.

    Args:
        given: a token; None for the one that ``huggingface_hub`` has stored.
        what: the repository, for messages.
        kept: what is kept where, for messages.

    Raises:
        UserError: there is none, or it cannot be one.
    """
    from huggingface_hub import get_token

    try:
        token = (given or get_token() or "").strip()
    except Exception as error:  # its exchange for a short-lived one may fail, and say what was sent
        problem = f"the stored token cannot be had ({type(error).__name__}){kept}"
        raise PushError("repo_id", what, problem, "log in with `hf auth login`, or set HF_TOKEN") from None
    if not token:
        mend = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        raise PushError("repo_id", what, f"there is no token to push with{kept}", mend)
    if not re.fullmatch(r"[!-~]+", token):
        # The client would quote such a token in its own error.
        problem = f"the token holds a blank, a line end or a letter beyond ASCII{kept}"
        raise PushError("repo_id", what, problem, "copy it again, as one word")
    return token


@contextlib.contextmanager
def hub(
    what: str, token: str | None = None, endpoint: str | None = None, *, kept: str = "", again: str = ""
) -> Iterator[HfApi]:
    """The client, ready to write; whatever fails inside becomes one line without the token.

    Args:
        what: the repository, for messages.
        token: None for the one that ``huggingface_hub`` has stored.
        endpoint: address of the Hub; None for the one that ``huggingface_hub`` is set to.
        kept: what is kept where; put behind every problem.
        again: the command that goes on from there; put behind every mend.

    Raises:
        PushError: offline mode is on, there is no token, or what is done inside fails.
    """
    from huggingface_hub import HfApi, constants, set_client_factory
    from huggingface_hub.utils import _http

    kept, again = kept and f"; {kept}", again and f", then give `{again}`: what is there already is not sent again"
    if constants.is_offline_mode():
        raise PushError("repo_id", what, f"offline mode is on{kept}", f"unset HF_HUB_OFFLINE{again}")
    token = usable_token(token, what, kept)
    plain = _http._GLOBAL_CLIENT_FACTORY  # the user's own, where one is set; there is no other way to ask for it

    def impatient() -> httpx2.Client:
        import httpx2

        client = plain()
        client.timeout = httpx2.Timeout(SILENCE, connect=CONNECTING)
        return client

    set_client_factory(impatient)
    # The user agent would otherwise name the installed packages and the tool that calls.
    before, constants.HF_HUB_DISABLE_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY, True
    try:
        with _discreet_logs(token):
            yield HfApi(endpoint=endpoint, token=token, library_name="genalign")
    except UserError:
        raise
    except Exception as error:
        # Not chained: the client's own exception may quote the request's headers.
        problem, mend = _explained(error, token)
        raise PushError("repo_id", what, f"{problem}{kept}", f"{mend}{again}") from None
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before
        set_client_factory(plain)


def patiently(step: Callable[[], T]) -> T:
    """Do what may fail for a while: again after 1, 2, 4 … seconds, or after as many as the Hub asks for.

    Args:
        step: may be done twice (an answer that got lost was an answer).

    Raises:
        Exception: what the last try raised, or the first one whose reason does not pass by itself.
    """
    for tried in range(1, TRIES + 1):
        try:
            return step()
        except Exception as error:
            pause = _pause(error, 2.0 ** (tried - 1))
            if pause is None or pause > LONGEST_PAUSE or tried == TRIES:
                raise
            status = status_of(error)
            told = f"the Hub answered {status}" if status else "the connection was lost"
            print(f"{told}: trying again in {pause:.0f} s ({tried} of {TRIES - 1})", file=sys.stderr, flush=True)
        time.sleep(pause)
    raise AssertionError("unreachable")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from: an upload in a thread wraps the answer of the Hub."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error came from; None where there was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((e.response.status_code for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)


def _pause(error: BaseException, usual: float) -> float | None:
    """Seconds to wait before it is tried again; None where that is of no use."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            if cause.response.status_code not in _MAY_PASS:
                return None
            asked = cause.response.headers.get("Retry-After", "").strip()
            limit = parse_ratelimit_headers(cause.response.headers)
            if asked.isdigit():
                return max(usual, float(asked))
            return max(usual, limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else usual
        if isinstance(cause, httpx2.TransportError):
            return usual
    return None


def _explained(error: BaseException, token: str) -> tuple[str, str]:
    """What went wrong and how to mend it, without the token."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    answer = next((e for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)
    lost = next((e for e in _causes(error) if isinstance(e, httpx2.TransportError)), None)
    text = getattr(answer, "server_message", None) or str(answer or lost or error)
    text = _ADDRESS.sub(r"\1", " ".join(text.replace(token, "***").split()))[:300]
    if answer is None:
        problem = f"the push did not get through ({type(lost or error).__name__}: {text})"
        mend = "check the network, HF_ENDPOINT and the token"
        if lost is None and not constants.HF_HUB_DISABLE_XET:
            mend += "; where the Hub is a mirror without Xet storage, set HF_HUB_DISABLE_XET=1"
        return problem, mend
    status = answer.response.status_code
    said = f"{status}: {text}" if getattr(answer, "server_message", None) else f"{status}"
    return {
        401: (f"the Hub does not accept the token ({said})", "log in again with `hf auth login`, or set HF_TOKEN"),
        403: (f"the token may not write there ({said})", "use a token with the right to write, or your own namespace"),
        404: (f"the Hub knows no such repository or endpoint ({said})", "check repo_id and HF_ENDPOINT"),
        429: (f"the Hub asks for patience ({said})", "wait a few minutes"),
    }.get(status, (f"the Hub answered {status} ({text})", "wait, or mend what it names"))


@contextlib.contextmanager
def _discreet_logs(token: str) -> Iterator[None]:
    """Keeps the token, and signed addresses of the storage, out of whatever is logged meanwhile."""
    hide = _Discreet(token)
    # A handler sees the records of every logger below it; a filter on a logger would see only its own.
    handlers = [h for name in ("", "huggingface_hub", "httpx2") for h in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(hide)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hide)


class _Discreet(logging.Filter):
    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        discreet = _ADDRESS.sub(r"\1/…", message.replace(self.token, "***"))
        if discreet != message:
            record.msg, record.args = discreet, ()
        return True

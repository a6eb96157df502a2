"""A request for a chat completion in OpenAI's form. What would change the answer and is not done here is refused: an
answer that silently lacks it would be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import Messages
from lbllm.errors import LbllmError
from lbllm.fields import allowed
from lbllm.json_input import replaced, shown

STOPS = 16  # sequences that end an answer
MOST_LIKELIEST = 20
LONGEST = 1 << 20
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_READ = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "repetition_penalty"),
    *("seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs"),
)
# They change nothing of an answer, whatever their value is.
_UNUSED = (
    *("user", "metadata", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls",),
)
# Settings that are not done here, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
}
# What a message of an answer has beside its text, if it is sent back as it came.
_EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls", "name")


class RequestError(LbllmError):
    """A request is refused. ``param``: the field; ``code``: OpenAI's name of the reason; ``status``: of HTTP."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


@dataclass(frozen=True)
class Question:
    """A request, checked. ``max_tokens``: None if the server decides; ``seed``: None if it is random; ``chances``: how
    many of the likeliest tokens to name at each place, None without log-probabilities."""

    model: str
    messages: Messages
    max_tokens: int | None
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage_at_end: bool
    chances: int | None


def read_question(document: Mapping[str, Any]) -> Question:
    """Return what the body of a request asks for; null counts as not given. Without temperature, top_p and
    repetition_penalty those of a chat of this program count. Raises RequestError, with the field."""
    given = {name: value for name, value in document.items() if value is not None}
    for name, value in given.items():
        _check_known(name, value)
    if not isinstance(given.get("model"), str):
        raise _bad("model", given.get("model"), "the name of a model; GET /v1/models has it")
    stream = _flag(given, "stream")
    return Question(
        model=given["model"],
        messages=_messages(given.get("messages")),
        max_tokens=_max_tokens(given),
        temperature=_setting(given, "temperature"),
        top_p=_setting(given, "top_p"),
        repetition_penalty=_setting(given, "repetition_penalty"),
        seed=_whole(given, "seed", 0, 2**63 - 1),
        stop=_stop(given.get("stop")),
        stream=stream,
        usage_at_end=_usage_at_end(given, stream),
        chances=_chances(given),
    )


def _bad(name: str, value: object, needed: str) -> RequestError:
    stated = "is missing" if value is None else f"is {shown(value)}"
    return RequestError(f"{name} {stated}; give {needed}", param=name)


def _check_known(name: str, value: object) -> None:
    if name in _READ or name in _UNUSED:
        return
    if name not in _NEUTRAL:
        raise RequestError(
            f"{shown(name)} is not a field that this server knows; leave it out. It reads {', '.join(_READ)}",
            param=replaced(name[:100]),
            code="unknown_parameter",
        )
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name]):
        raise RequestError(
            f"{name} is {shown(value)}, which this server can't do; leave {name} out",
            param=name,
            code="unsupported_parameter",
        )


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise _bad(name, value, "true or false")
    return value


def _whole(given: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _bad(name, value, f"a whole number from {least} to {most}")
    return value


def _setting(given: Mapping[str, Any], name: str) -> float:
    field = ChatSettings.model_fields[name]
    value = given.get(name, field.default)
    needed = f"a number {allowed(field)}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _bad(name, value, needed)
    try:
        return float(getattr(ChatSettings.model_validate({name: value}), name))
    except ValidationError:
        raise _bad(name, value, needed) from None


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    old, new = (_whole(given, name, 1, LONGEST) for name in ("max_tokens", "max_completion_tokens"))
    if None not in (old, new) and old != new:
        raise _bad("max_tokens", old, f"one of max_tokens and max_completion_tokens, which is {new}")
    return old if new is None else new


def _stop(value: object) -> tuple[str, ...]:
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > STOPS or not all(isinstance(x, str) and x for x in listed):
        raise _bad("stop", value, f"a text, or a list of at most {STOPS} texts, none of them empty")
    return tuple(listed)


def _usage_at_end(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options needs stream: true; leave it out otherwise", param="stream_options")
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise _bad("stream_options", options, 'an object like {"include_usage": true}')
    return _flag(options, "include_usage")


def _chances(given: Mapping[str, Any]) -> int | None:
    wanted, count = _flag(given, "logprobs"), _whole(given, "top_logprobs", 0, MOST_LIKELIEST)
    if count and not wanted:
        raise RequestError("top_logprobs needs logprobs: true; give both, or leave it out", param="top_logprobs")
    return (count or 0) if wanted else None


def _messages(value: object) -> Messages:
    if not isinstance(value, list) or not value:
        raise _bad("messages", value, 'a list like [{"role": "user", "content": "Why is the sky blue?"}]')
    return [_message(f"messages[{number}]", message) for number, message in enumerate(value)]


def _message(place: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _bad(place, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _bad(f"{place}.role", role, "system, developer, user or assistant; tools are not called here")
    for name, extra in message.items():
        if name in ("role", "content") or (name in _EMPTY and (extra is None or extra == [])):
            continue
        raise RequestError(
            f"{place} has {shown(name)} {shown(extra)}, which the model would not see; leave it out",
            param=replaced(f"{place}.{name[:100]}"),
            code="unsupported_parameter",
        )
    return {"role": _ROLES[role], "content": _content(f"{place}.content", message.get("content"))}


def _content(place: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _bad(place, value, "a text")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _bad(place, part, 'parts like {"type": "text", "text": "..."}; the model reads text alone')
    return "\n".join(part["text"] for part in value)

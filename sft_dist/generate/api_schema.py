"""Requests of the OpenAI API as they are understood here; what would change an answer and is not, is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sft_dist.data.messages import Message, Role
from sft_dist.generate.engine import Sampling

# Parameters that are accepted as long as they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
}
# Parameters that no answer depends on.
WITHOUT_EFFECT = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")

# How the messages of the API name those who speak.
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class RequestError(Exception):
    """A request that is answered with an error in the form of the API.

    Args:
        param: the parameter that is wrong, or None.
        code: a word that clients may ask for, or None.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(ROLES[self.role], text, name=self.name)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool | None = None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


class _Request(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] = []
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, max_new_tokens: int) -> Sampling:
        """
        Args:
            max_new_tokens: where the request says nothing.
        """
        return Sampling(
            max_new_tokens=self.max_tokens or max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            # torch's generators take 64 bits.
            seed=None if self.seed is None else self.seed % 2**63,
            stop=tuple(self.stop),
        )


class ChatRequest(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def sampling(self, *, max_new_tokens: int) -> Sampling:
        limit = self.max_completion_tokens or max_new_tokens
        return super().sampling(max_new_tokens=limit)


class CompletionRequest(_Request):
    prompt: str


R = TypeVar("R", bound=_Request)


def chat_request(body: Any) -> ChatRequest:
    """Raises ``RequestError``."""
    request = _read(ChatRequest, body)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError("max_tokens is the old name of max_completion_tokens: give one", param="max_tokens")
    return request


def completion_request(body: Any) -> CompletionRequest:
    """Raises ``RequestError``."""
    if isinstance(body, dict) and isinstance(body.get("prompt"), list) and len(body["prompt"]) == 1:
        body = {**body, "prompt": body["prompt"][0]}
    return _read(CompletionRequest, body)


def _read(kind: type[R], body: Any) -> R:
    if not isinstance(body, dict):
        raise RequestError("the request is no JSON object")
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(
            value == each and type(value) is type(each) for each in (*neutral, *_floats(neutral))
        ):
            raise RequestError(
                f"{name} is not supported here, other than {_choices(neutral)}",
                param=name,
                code="unsupported_parameter",
            )
    known = {name: value for name, value in body.items() if name not in NEUTRAL and name not in WITHOUT_EFFECT}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _refusal(error) from error


def _floats(values: tuple[Any, ...]) -> list[float]:
    return [float(value) for value in values if type(value) is int]


def _choices(neutral: tuple[Any, ...]) -> str:
    return " or ".join([repr(value) for value in neutral] or ["null"])


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    where = [part for part in first["loc"] if not (isinstance(part, str) and part in ("str", "list[_Part]"))]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".") or None
    if first["type"] == "extra_forbidden":
        return RequestError(f"Unrecognized request argument: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"Missing required parameter: {param}", param=param, code="missing_required_parameter")
    return RequestError(f"{param}: {first['msg']}", param=param, code="invalid_value")

"""Bodies of OpenAI's API, as far as they are understood here, and three parameters more, named as in vLLM.

What is not known is ignored. What is known and would change the answer, but cannot be done, is refused (``REFUSED``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from flabc.errors import UsageError
from flabc.runtime.sampling import MAX_LOGPROBS, SamplingParams

#: Fields that would change the answer and are not understood, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

#: Tokens of a completion unless the request says otherwise, as OpenAI has it; a chat's answer may fill the room.
COMPLETION_TOKENS = 16

#: OpenAI takes 0 for ``top_p``; the most likely token alone has more than this.
LEAST_TOP_P = 1e-6


def _characters(text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("Input should be valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_characters)]
Stop = Annotated[Text, StringConstraints(max_length=1000)]
Texts = Annotated[list[Text], Field(min_length=1)]
TokenIds = Annotated[list[int], Field(min_length=1)]


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    include_usage: bool = False


class Body(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: Text
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    n: int | None = Field(None, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UsageError: naming the field.
        """
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value is not None and value not in REFUSED[name]:
                raise UsageError(f"{name!r} is not supported by this server.", fix="Leave it out.")

    def params(self, choice: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """How one of the ``n`` answers is drawn; each has a seed of its own."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, LEAST_TOP_P),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            seed=None if self.seed is None else (self.seed + choice) % 2**64,
            logprobs=logprobs,
        )


class CompletionBody(Body):
    """A request to ``/v1/completions``."""

    prompt: (
        Text | Annotated[list[Text], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, be they one or several, texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class Part(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """A message. Only its role and its text reach the template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None

    @property
    def plain(self) -> dict[str, str]:
        """The message as templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Completion(BaseModel):
    """The reply to either kind of request; ``choices`` are as OpenAI's."""

    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "flabc"
    max_model_len: int


class Models(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ProblemDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problem(BaseModel):
    """An error as OpenAI's API has it."""

    error: ProblemDetail

"""An endpoint: a model that only answers, behind an address or as a Python function.

It has no weights, gradients or log-probabilities to read: an image and a prompt go in, a text comes
out. Nothing is sent anywhere unless an address is given as the target.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

import httpx2
import torch
from PIL import Image
from torch import Tensor, nn

from lightleak.errors import UserError
from lightleak.records import Record
from lightleak.targets.families import Parts
from lightleak.targets.target import Batch, EncodedRecord, Outputs, Target

KEY = "LIGHTLEAK_API_KEY"
ANSWER_TOKENS = 128
# Characters of an answer that are kept; a server need not heed how many tokens it is asked for.
_MOST_CHARACTERS = 4096
_MOST_BYTES = 1 << 20
_PNG_BYTES = 4 << 20
_AT_ONCE = 4
# Seconds to wait before asking once more, and how long one answer may take in all.
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
_LONGEST_WAIT = 60.0
_TIMEOUT = httpx2.Timeout(120.0, connect=10.0)
_LONGEST_ANSWER = 300.0
_BUSY = (408, 425, 429)
# What a server says of one question and not of all.
_OF_ONE_QUESTION = (400, 413, 415, 422, 451)


@dataclass(frozen=True)
class Question:
    """A record's image and prompt, to be answered once.

    Attributes:
        image: RGB.
        prompt: the question.
        temperature: of the sampling.
        seed: of the sampling, where the endpoint heeds it.
    """

    image: Image.Image
    prompt: str
    temperature: float
    seed: int


@dataclass(frozen=True)
class Reply:
    """An answer, and what the server says that it runs (`system_fingerprint`); "" if nothing."""

    text: str
    server: str = ""


class Answerer(Protocol):
    """What answers questions."""

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Answers, in the order of the questions, which are about one image."""
        ...


Function = Callable[[Image.Image, str, float, int], str]


class Unsaid(Outputs):
    """What an endpoint says of a batch before it is asked: nothing."""

    @property
    def losses(self) -> Tensor:
        """There are none."""
        return torch.zeros(0)

    def vectors(self) -> list[Tensor]:
        """There are none."""
        return []

    def detach(self) -> Unsaid:
        """The same."""
        return self


class _Elsewhere(nn.Module):
    """Stands where a model would; it has no parameters."""


@dataclass
class EndpointTarget(Target):
    """Something that answers.

    Attributes:
        answer: does so.
    """

    kind: ClassVar[str] = "endpoint"
    answer: Answerer = field(kw_only=True)

    def __post_init__(self) -> None:
        self.parts = Parts((), (), ())

    @property
    def dtype(self) -> torch.dtype:
        """Unknown; numbers about answers are stored in float32."""
        return torch.float32

    def encode(self, record: Record, image: Image.Image) -> EncodedRecord:
        """A record, which goes to the endpoint as it is."""
        del image
        return EncodedRecord(record.id, {}, frozenset(), 0)

    def outputs(self, batch: Batch) -> Outputs:
        """Nothing: it is asked for answers."""
        del batch
        return Unsaid()


def is_address(name: str) -> bool:
    """Whether a target is named by an address, or is a function."""
    return name.startswith(("http://", "https://", _FUNCTION))


def connect(name: str) -> EndpointTarget:
    """The endpoint at an address `http(s)://host/v1#model`, or a function that was `registered`.

    Without a model's name the server is asked which it has.

    Raises:
        UserError: it is no such address, nobody answers there, or it has several models.
    """
    answer: Answerer
    if name.startswith(_FUNCTION):
        if name not in _functions:
            raise UserError(
                "this function is not known to this process",
                name.removeprefix(_FUNCTION),
                "Give the function itself as target, and workers=1.",
            )
        answer, full = Asked(_functions[name]), name
    else:
        chat = ChatCompletions.at(name)
        answer, full = chat, f"{chat.address}#{chat.model}"
    return EndpointTarget(
        model=_Elsewhere(),
        processor=None,
        device=torch.device("cpu"),
        hashes={"endpoint": hashlib.sha256(full.encode()).hexdigest()},
        name=full,
        answer=answer,
    )


# -- a Python function --------------------------------------------------------------------------

_FUNCTION = "function:"
_functions: dict[str, Function] = {}


def registered(function: Function) -> str:
    """The name of a function as a target, known to this process alone.

    Two functions of one name are one target to a run that is resumed: nothing else is known.
    """
    named = getattr(function, "__qualname__", type(function).__qualname__)
    name = f"{_FUNCTION}{getattr(function, '__module__', '')}.{named}"
    _functions[name] = function
    return name


@dataclass(frozen=True)
class Asked:
    """Answers by calling a function `(image, prompt, temperature, seed) -> str`, one by one."""

    function: Function

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Answers in the order of the questions."""
        return [
            Reply(_text(self.function(each.image, each.prompt, each.temperature, each.seed)))
            for each in questions
        ]


# -- an OpenAI-compatible server ----------------------------------------------------------------


@dataclass(frozen=True)
class ChatCompletions:
    """A server that speaks OpenAI's chat completions.

    Attributes:
        address: up to and with /v1.
        model: which of its models.
        client: carries the key, which is kept nowhere else.
        key: to strike it out of what the server says.
    """

    address: str
    model: str
    client: httpx2.Client = field(repr=False)
    key: str = field(repr=False)

    @staticmethod
    def at(name: str) -> ChatCompletions:
        """The server at `address#model`; the key is in the environment's LIGHTLEAK_API_KEY.

        Raises:
            UserError: it is no such address, nobody answers there, or it has several models.
        """
        address, _, model = name.partition("#")
        try:
            parts = urlsplit(address)
            if not parts.hostname or parts.port == 0 or not httpx2.URL(address).host:
                raise ValueError("it names no host")
        except (ValueError, httpx2.InvalidURL) as error:
            raise UserError(f"this is no address ({error})", address) from error
        if parts.username is not None or parts.query:
            raise UserError(
                "an address with a password or a query would be kept in the report",
                f"{parts.scheme}://{parts.hostname}",
                f"Put the key into the environment variable {KEY}.",
            )
        key = os.environ.get(KEY, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError("it holds characters that no key has", KEY)
        server = ChatCompletions(
            address.rstrip("/").removesuffix("/chat/completions"),
            model,
            httpx2.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=_TIMEOUT
            ),
            key,
        )
        return server if model else server._only_model()

    def _only_model(self) -> ChatCompletions:
        how = "Name the model behind the address: ADDRESS#MODEL."
        try:
            content = json.loads(self._send("GET", "models"))
            names = [str(each["id"]) for each in content["data"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError("it does not say which models it has", self.address, how) from error
        if len(names) != 1:
            several = f"it has {len(names)} models ({', '.join(names)[:200]})"
            raise UserError(several, self.address, how)
        return ChatCompletions(self.address, names[0], self.client, self.key)

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """Answers in the order of the questions, a few asked at once.

        Raises:
            ValueError: one of the replies holds no answer.
            UserError: the server cannot be asked any further.
        """
        image = _data_url(questions[0].image)
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            return list(pool.map(lambda each: self._ask(image, each), questions))
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, image: str, question: Question) -> Reply:
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": question.prompt},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": question.temperature,
            "seed": question.seed,
            "max_tokens": ANSWER_TOKENS,
        }
        received = self._send("POST", "chat/completions", body)
        try:
            reply = json.loads(received)
            text = reply["choices"][0]["message"]["content"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            said = self._quoted(received)
            raise ValueError(f"the reply is no chat completion: {said}") from error
        server = reply.get("system_fingerprint")
        return Reply(_text(text), _text(server)[:100] if isinstance(server, str) else "")

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """What the server replies once it does; where it is busy or gone it is asked again."""
        for wait in (*_WAITS, None):
            try:
                status, headers, content = self._once(method, path, body)
            except httpx2.TransportError as error:
                asked, problem = 0.0, f"it cannot be reached ({str(error) or type(error).__name__})"
            else:
                if status == httpx2.codes.OK:
                    return content
                self._refuse(status, content)
                asked, problem = _seconds(headers), f"it says {status}: {self._quoted(content)}"
            if wait is not None:
                time.sleep(min(max(wait, asked), _LONGEST_WAIT))
        raise UserError(
            problem,
            self.address,
            "What it has answered is kept; the same command goes on where it stopped.",
        )

    def _once(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, httpx2.Headers, bytes]:
        begun, received = time.monotonic(), bytearray()
        with self.client.stream(method, f"{self.address}/{path}", json=body) as response:
            for part in response.iter_bytes():
                received += part
                if len(received) > _MOST_BYTES:
                    raise ValueError(f"the reply is larger than {_MOST_BYTES >> 20} MiB")
                if time.monotonic() - begun > _LONGEST_ANSWER:
                    raise httpx2.ReadTimeout("the reply does not end")
        return response.status_code, response.headers, bytes(received)

    def _refuse(self, status: int, content: bytes) -> None:
        """Raise what asking again cannot mend."""
        if status in _BUSY or status >= 500:
            return
        if status in _OF_ONE_QUESTION:
            raise ValueError(f"the server says {status}: {self._quoted(content)}")
        if status in (401, 403):
            wrong = "it does not take the key" if self.key else "it wants a key"
            how = f"Put the right one into the environment variable {KEY}."
            raise UserError(f"{wrong} ({status})", self.address, how)
        if status == 404:
            raise UserError(
                f"it knows no such address or model (404: {self._quoted(content)})",
                f"{self.address}#{self.model}".removesuffix("#"),
                "Give its address up to and with /v1, and the model as in ADDRESS#MODEL.",
            )
        raise UserError(f"it says {status}: {self._quoted(content)}", self.address)

    def _quoted(self, content: bytes) -> str:
        """The first words of a reply, without the key."""
        said = content[:2000].decode(errors="replace")
        if self.key:
            said = said.replace(self.key, "…")
        return " ".join(said.split())[:200] or "nothing"


def _seconds(headers: httpx2.Headers) -> float:
    """How long the server asks to be left alone."""
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:
        return 0.0  # A date, which few send.


def _text(said: object) -> str:
    """An answer as it can be stored."""
    if not isinstance(said, str):
        raise ValueError("the reply holds no text")
    return said[:_MOST_CHARACTERS].encode(errors="replace").decode()


def _data_url(image: Image.Image) -> str:
    """The picture as PNG; as a good JPEG where that would be large. Nothing else goes with it."""
    stream, kind = BytesIO(), "png"
    image.save(stream, "PNG")
    if stream.tell() > _PNG_BYTES:
        stream, kind = BytesIO(), "jpeg"
        image.save(stream, "JPEG", quality=95)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"

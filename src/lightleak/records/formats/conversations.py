"""Conversations: the JSON lists that LLaVA and ShareGPT fine-tuning data come in.

A record is one question with its answer, so of a longer conversation the first question and its
answer are the record, and `meta["turns"]` says how many there were. LLaVA's objects are
{id, image, conversations: [{from, value}]}, ShareGPT's {messages: [{role, content}], images}.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

from lightleak.errors import UserError
from lightleak.records.formats.jsonl import parse_json
from lightleak.records.formats.rows import Row

ASKING = ("human", "user")
ANSWERING = ("gpt", "assistant")
IMAGE_MARK = "<image>"
READ_KEYS = ("id", "image", "images", "group", "conversations", "messages")


@dataclass(frozen=True)
class Turn:
    """What one side says: `speaker` as the file names it, `content` without image marks."""

    speaker: object
    content: str


def conversation_rows(file: Path) -> Iterator[Row]:
    """Yield a row for each object of the list; keys that are not read become meta.

    Raises:
        UserError: the file is not a JSON list of such objects.
    """
    try:
        entries = parse_json(file.read_bytes().removeprefix(BOM_UTF8))
    except JSONDecodeError as error:
        raise UserError(
            f"this is not JSON ({error.msg})", f"{file}, line {error.lineno}"
        ) from error
    except ValueError as error:
        raise UserError(f"this is not JSON ({error})", str(file)) from error
    if not isinstance(entries, list):
        raise UserError("this is not a JSON list", str(file), "Write plain records as JSONL.")
    for number, entry in enumerate(entries):
        place = f"entry {number} (counted from 0)"
        if not isinstance(entry, dict) or not {"conversations", "messages"} & entry.keys():
            raise UserError(
                "this entry has neither conversations nor messages",
                f"{file}, {place}",
                "Write plain records as JSONL.",
            )
        known = {key: entry[key] for key in ("id", "group") if key in entry}
        try:
            yield Row(place, number, known | _fields(entry))
        except ValueError as error:
            yield Row(place, number, known, fault=str(error))


def _fields(entry: Mapping[str, object]) -> dict[str, object]:
    turns = _turns(entry.get("conversations", entry.get("messages")))
    if len(turns) < 2 or turns[0].speaker not in ASKING or turns[1].speaker not in ANSWERING:
        raise ValueError("the conversation does not begin with a question and its answer")
    meta = {key: value for key, value in entry.items() if key not in READ_KEYS}
    if len(turns) > 2:
        meta["turns"] = sum(turn.speaker in ASKING for turn in turns)
    # A question that is nothing but the image is no prompt.
    prompt = turns[0].content.strip() or None
    return {"image": _image(entry), "prompt": prompt, "text": turns[1].content, "meta": meta}


def _turns(conversation: object) -> list[Turn]:
    if not isinstance(conversation, list) or not all(isinstance(x, dict) for x in conversation):
        raise ValueError("the conversation is not a list of objects")
    turns = [
        Turn(turn.get("from", turn.get("role")), _content(turn.get("value", turn.get("content"))))
        for turn in conversation
    ]
    return [turn for turn in turns if turn.speaker != "system"]


def _content(content: object) -> str:
    """The text of a turn, given as a string or as a list of typed parts."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(content, str):
        raise ValueError(f"what is said must be a string, not {type(content).__name__}")
    return content.replace(IMAGE_MARK, "")


def _image(entry: Mapping[str, object]) -> object:
    image = entry.get("image", entry.get("images"))
    if not isinstance(image, list):
        return image
    if len(image) > 1:
        raise ValueError(f"the conversation has {len(image)} images; a record has one")
    return image[0] if image else None

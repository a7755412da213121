"""Records: one image with its text, read from files, checked, and split."""

from lightleak.records.check import readable
from lightleak.records.folds import assign_folds
from lightleak.records.images import image_bytes, image_sha256, open_rgb
from lightleak.records.load import load
from lightleak.records.people import PeopleSet, Person, Photo, load_people
from lightleak.records.record import (
    DEFAULT_PROMPT,
    Failure,
    Record,
    RecordSet,
    content_key,
    content_sha256,
)

__all__ = [
    "DEFAULT_PROMPT",
    "Failure",
    "PeopleSet",
    "Person",
    "Photo",
    "Record",
    "RecordSet",
    "assign_folds",
    "content_key",
    "content_sha256",
    "image_bytes",
    "image_sha256",
    "load",
    "load_people",
    "open_rgb",
    "readable",
]

"""A page as its reader gets it."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Its tags with their attributes, and the text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags = []
        self.rows = []
        self._texts = []
        self._style = False
        self._in_row = False
        self.feed(self.source)
        self.text = squeeze("".join(self._texts))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"
        if tag == "tr":
            self.rows.append("")
            self._in_row = True
        if tag not in ("bdi", "code"):
            self.handle_data(" ")

    def handle_endtag(self, tag):
        self._in_row = self._in_row and tag != "tr"

    def handle_data(self, data):
        if not self._style:
            self._texts.append(data)
            if self._in_row:
                self.rows[-1] += data

    def row(self, start):
        """The text of the first table row that starts so."""
        return next(row for row in map(squeeze, self.rows) if row.startswith(start))


def squeeze(text):
    """A text with single spaces."""
    return " ".join(text.split())

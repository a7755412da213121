"""From a template and what fills it to a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from lightleak.report import words
from lightleak.runs import replacing


def write_page(file: Path, template: str, **filled: Any) -> Path:
    """Fill a template and write the page. Every text is escaped: records and names are hostile.

    Raises:
        UserError: it cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightleak.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "p": words.p_value,
        "score": words.score,
        "thousands": words.thousands,
        "cut": words.cut,
    }
    environment.globals["VERDICTS"] = words.VERDICTS
    page = environment.get_template(template).render(**filled)
    with replacing(file) as stream:
        stream.write(page.encode())
    return file

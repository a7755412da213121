"""Write the JSON Schemas of verdict.json from the classes that write it.

python -m lightleak.validity.schemas
"""

from __future__ import annotations

import json
from pathlib import Path

from lightleak.validity import IdentityVerdict, ProbingVerdict, Verdict
from lightleak.validity.verdict import BaseVerdict

SCHEMAS: dict[str, type[BaseVerdict]] = {
    "verdict": Verdict,
    "identity": IdentityVerdict,
    "probing": ProbingVerdict,
}


def main() -> None:
    """Write all beside this file; a test holds them equal."""
    for name, verdict in SCHEMAS.items():
        schema = json.dumps(verdict.model_json_schema(mode="serialization"), indent=2)
        Path(__file__).with_name(f"{name}.schema.json").write_text(schema + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

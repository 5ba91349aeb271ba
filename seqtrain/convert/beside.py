"""Other conversions of the same teacher, whose figures stand in the tables of a report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seqtrain.errors import ConfigError


def read_others(folders: Iterable[str], report: dict[str, Any]) -> dict[str, Any]:
    """By what to call it: perplexities, part of the gap closed and tokens trained on of each conversion in `folders`.

    `report`: of this conversion, with `source` and `texts`. Raises `ConfigError` for one of another teacher or other
    texts, whose figures can't be compared.
    """
    found = {}
    for folder in folders:
        file = Path(folder).expanduser() / "report.json"
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
            same = {key: other[key] == report[key] for key in ("source", "texts")}
            verified = {key: other["config"]["verify"][key] for key in ("tokens", "sequences")}
            config = other["config"]
            about = {
                "tokens_trained": sum(run["tokens"] for run in other["training"]),
                "perplexity": {name: text["perplexity"] for name, text in other["end"]["texts"].items()},
                "gap_closed": other["gap_closed"],
            }
            name = f"{config['target']} by {config['recipe']['name']}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"beside={folder}: holds no report of a conversion ({error})") from None
        mine = report["config"]["verify"]
        same |= {key: value == mine[key] for key, value in verified.items()}
        if differing := [key for key, equal in same.items() if not equal]:
            raise ConfigError(f"beside={folder}: is of another {differing[0]}, and can't be compared")
        found[name] = about
    return found

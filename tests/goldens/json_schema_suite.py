"""A part of the JSON Schema Test Suite, draft 2020-12, as the ``jsonschema`` package's sdist carries it.

``pip download --no-deps --no-binary :all: jsonschema==4.26.0``, then
``python tests/goldens/json_schema_suite.py jsonschema-4.26.0.tar.gz`` writes ``json_schema_suite.json``: [[file, case,
schema, [[instance, valid], ...]], ...]. Taken are the first cases of each file of the required part whose schemas need
nothing from elsewhere.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

MOST_CASES = 6
ELSEWHERE = ("refRemote", "dynamicRef", "vocabulary", "format", "unevaluated", "infinite-loop")


def main(source: str) -> None:
    taken = []
    with tarfile.open(source) as tar:
        for member in sorted(tar.getmembers(), key=lambda one: one.name):
            name = member.name.partition("/tests/draft2020-12/")[2]
            if not name.endswith(".json") or "/" in name or name.startswith(ELSEWHERE):
                continue
            file = tar.extractfile(member)
            assert file is not None
            for case in json.load(file)[:MOST_CASES]:
                schema = case["schema"]
                if isinstance(schema, dict):
                    schema.pop("$schema", None)
                tests = [[test["data"], test["valid"]] for test in case["tests"]]
                taken.append([name.removesuffix(".json"), case["description"], schema, tests])
    lines = ",\n".join(json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in taken)
    Path(__file__).with_suffix(".json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

"""Bytes that a document takes, with windows' layers cut to what further tokens see, and as if nothing were cut.

    python benchmarks/document_bytes.py --model PATH --length 8192 --out benchmarks/results/document_bytes_cpu.json

Keys and values on the device after reading, with the room for questions, and the files of the document on disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import apb
from apb.hardware import fingerprint
from apb.hf.cache import ShardCache
from apb.hf.config import vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine = apb.Engine.from_pretrained(arguments.model, strategy="full")
    tokens = [(7 * i * i + 3 * i) % vocabulary(engine.model.config) for i in range(arguments.length)]
    report: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "fingerprint": fingerprint(engine.device, engine.dtype),
        "tokens": arguments.length,
    }
    with patch.object(ShardCache, "keep_windows", lambda cache, total: None):
        report["all kept"] = measured(engine, tokens)
    report["windows cut"] = measured(engine, tokens)
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def measured(engine: apb.Engine, tokens: list[int]) -> dict[str, Any]:
    """The bytes of a document that is read now."""
    document = engine.read(tokens=tokens)
    cache = document.state.cache
    with tempfile.TemporaryDirectory() as folder:
        document.save(folder)
        disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    held = {count: cache.held.count(count) for count in sorted(set(cache.held))}
    return {"layers by tokens": held, "keys and values": cache.filled, "storage": cache.nbytes, "disk": disk}


if __name__ == "__main__":
    main()

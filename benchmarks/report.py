"""What every benchmark does with its figures: keep all of them, show the medians."""

import json
import tempfile
from dataclasses import asdict
from datetime import date
from statistics import median

from benchmarks.machine import describe
from benchmarks.subjects import ROOT
from grpo.config import RunConfig

RESULTS = ROOT / "benchmarks" / "results"


def spread(values: list[float]) -> dict:
    """The median, and every value it was taken of."""
    return {"median": round(median(values), 6), "values": [round(value, 6) for value in values]}


def save(name: str, config: RunConfig, results: dict) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    record = {"date": date.today().isoformat(), "machine": describe(), "config": asdict(config)} | results
    text = json.dumps(record, indent=2).replace(f"{ROOT}/", "").replace(tempfile.gettempdir(), "TMP")
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(f"written to benchmarks/results/{name}.json")


def table(header: list[str], rows: list[list]) -> None:
    """Print rows of texts and numbers under a header."""
    cells = [header] + [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )

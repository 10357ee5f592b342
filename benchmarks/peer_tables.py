"""Tables of what benchmarks/peers.py measures."""

from operator import itemgetter

from cells import Row, by, grouped, markdown, spread
from peer_cases import CASES, NETWORKS
from turns import quotient

from sltt.training.console import megabytes

Rows = list[Row]
LAST = ", channels last"
LABELS = {
    "SpikingJelly SLTT": "SpikingJelly 2.0, `SLTTLIFNode`",
    "SpikingJelly BPTT": "SpikingJelly 2.0, `LIFNode`, layer by layer",
    "SpikingJelly SLTT, channels last": "the same, channels last",
    "SpikingJelly BPTT, channels last": "the same, channels last",
    "SpikingJelly memopt, units": "the same, `memopt` level 1 on each unit of layer, norm and neuron",
    "SpikingJelly memopt, blocks": "the same, `memopt` level 1 on residual blocks",
}


def ratio(rows: Rows, row: Row, to: str | None) -> tuple[float, float, float] | None:
    """Divide times within a turn; return median, smallest and largest, or None where the other case was not in it."""
    other = faster_format(rows, row, to)
    return quotient(row["times"], other["times"]) if other and "times" in row else None


def faster_format(rows: Rows, row: Row, to: str | None) -> Row | None:
    """Return the row of another case in the same turns: in the faster memory format, if both were measured."""
    forms = (
        r for r in rows if r["case"] in (to, f"{to}{LAST}") and "times" in r and r.get("began") == row.get("began")
    )
    return min(forms, key=itemgetter("seconds"), default=None)


def over_peer(rows: Rows, row: Row) -> str:
    """Write the ratio to SpikingJelly, and its format if that is not PyTorch's default."""
    peer = CASES[row["case"]].peer
    other = faster_format(rows, row, peer)
    return spread(ratio(rows, row, peer)) + LAST * bool(other and other["case"].endswith(LAST) and other is not row)


def cases_table(rows: Rows) -> str:
    """Cases of one setting."""
    floors = {CASES[row["case"]].floor for row in rows}
    floor = "ReLU" if all(name.startswith("relu") for name in floors) else floors.pop()
    columns = {
        "time": [f"{row['seconds']:.3g} s" for row in rows],
        f"ratio to {floor}": [spread(ratio(rows, row, CASES[row["case"]].floor)) for row in rows],
        "ratio to SpikingJelly": [over_peer(rows, row) for row in rows],
        "memory": [megabytes(row["memory"]) if "memory" in row else "" for row in rows],
        "resident set": [megabytes(row["resident"]) if "resident" in row else "" for row in rows],
    }
    return conditions(rows, steps=True) + lines(rows, {name: cells for name, cells in columns.items() if any(cells)})


def steps_table(rows: Rows, of: str | None) -> str:
    """Memory of each case, and its time or its ratio to the time of another, a pair of columns for each T."""
    cases = grouped(rows, "case")
    columns: dict[str, list[str]] = {}
    for steps, mine in sorted(grouped(rows, "steps").items()):
        one = by(mine, "case")
        columns[f"T = {steps}: memory"] = [megabytes(one[case]["memory"]) if case in one else "" for case in cases]
        columns[f"T = {steps}: time"] = [
            "" if case not in one else spread(ratio(mine, one[case], of)) if of else f"{one[case]['seconds']:.3g} s"
            for case in cases
        ]
    note = f" Times are ratios to {LABELS.get(of, of)}." if of else ""
    line = conditions(rows, steps=False).replace(":\n", f".{note}\n", 1)
    return line + lines([several[0] for several in cases.values()], columns)


def lines(rows: Rows, columns: dict[str, list[str]]) -> str:
    """Markdown: a line for each row, with the name of its case."""
    names = [LABELS.get(row["case"], row["case"].replace("relu", "ReLU")) for row in rows]
    table = markdown(["", *columns], list(zip(names, *columns.values(), strict=True)))
    return table.replace("|  |", "| |").replace("|  |", "| |")


def conditions(rows: Rows, steps: bool) -> str:
    """A line over the table: what was measured, and on what."""
    first = rows[0]
    batch, *shape = first["input"]
    words = [NETWORKS[first["network"]][2], f"batch {batch} × {'×'.join(map(str, shape))}"]
    words += [f"T = {first['steps']}"] * steps
    words += [first["hardware"], "processor time" if first["clock"] == "process" else "wall-clock time"]
    counts = sorted({len(row["times"]) for row in rows})
    words += [f"medians of {counts[0]}" if len(counts) == 1 else f"medians of {counts[0]} to {counts[-1]}"]
    return f"{', '.join(words)}:\n\n"

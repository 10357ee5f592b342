"""The memory of what passes between layers in a time step."""

from dataclasses import dataclass

from sltt.interop.c_network import Affine, Network, Sum, Value


@dataclass
class Buffer:
    """An array of the struct that values pass through.

    Attributes:
        name: in the struct.
        kind: "spikes" is a list of indices; "values", or "currents" of 16 bits.
        size: how many values fit.
        until: the last operation that reads what is in it.
    """

    name: str
    kind: str
    size: int
    until: float


def plan(network: Network, narrow: set[Value]) -> tuple[list[Buffer], dict[Value, Buffer]]:
    """Give each value a buffer; one serves several whose times do not overlap. Those in `narrow` have 16 bits."""
    operations = network.operations
    last = {value: i for i, op in enumerate(operations) for value in op.inputs}
    buffers: list[Buffer] = []
    places: dict[Value, Buffer] = {}
    for i, op in enumerate(operations):
        value = op.output
        kept = any(value in before.inputs for before in operations[: i + 1])  # read in the next step
        until = float("inf") if kept else last.get(value, i)
        if value is network.output:
            continue
        kind = "spikes" if value.spikes else "currents" if value in narrow else "values"
        free = [b for b in buffers if b.until < i and b.kind == kind and not kept]
        if isinstance(op, Affine | Sum):  # in place of an input that nobody reads any more
            ours = [places[x] for x in op.inputs if x in places and places[x].until == i and not x.spikes]
            free = ours or free
        if free:
            buffer = min(free, key=lambda b: (b.size < value.size, abs(b.size - value.size)))
            buffer.size = max(buffer.size, value.size)
        else:
            buffer = Buffer(f"{kind}{sum(b.kind == kind for b in buffers)}", kind, value.size, until)
            buffers.append(buffer)
        buffer.until = until
        places[value] = buffer
    return buffers, places

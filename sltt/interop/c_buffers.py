"""The memory of what passes between layers in a time step."""

from dataclasses import dataclass

from sltt.interop.c_network import Affine, Network, Sum, Value


@dataclass
class Buffer:
    """An array of the struct that values pass through.

    Attributes:
        name: in the struct.
        spikes: it holds a list of indices.
        size: how many values fit.
        until: the last operation that reads what is in it.
    """

    name: str
    spikes: bool
    size: int
    until: float


def plan(network: Network) -> tuple[list[Buffer], dict[Value, Buffer]]:
    """Give each value a buffer; one serves several values whose times do not overlap."""
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
        free = [b for b in buffers if b.until < i and b.spikes == value.spikes and not kept]
        if isinstance(op, Affine | Sum):  # in place of an input that nobody reads any more
            ours = [places[x] for x in op.inputs if x in places and places[x].until == i and not x.spikes]
            free = ours or free
        if free:
            buffer = min(free, key=lambda b: (b.size < value.size, abs(b.size - value.size)))
            buffer.size = max(buffer.size, value.size)
        else:
            count = sum(b.spikes == value.spikes for b in buffers)
            buffer = Buffer(f"{'spikes' if value.spikes else 'values'}{count}", value.spikes, value.size, until)
            buffers.append(buffer)
        buffer.until = until
        places[value] = buffer
    return buffers, places

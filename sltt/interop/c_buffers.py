"""The memory of what passes between layers in a time step."""

from dataclasses import dataclass

from sltt.interop.c_network import PEAK, Affine, Fire, Keep, Network, Operation, Sum, Value, Weights


@dataclass
class Buffer:
    """An array of the struct that values pass through."""

    name: str
    kind: str  # "spikes" is bits, 32 in a word; "small" has the type of inputs, "kept" of states, "values" of sums
    size: int  # how many words or values fit
    until: float  # the last operation that reads what is in it
    layer: str  # that writes most to it


def find_fused(network: Network) -> dict[Operation, Weights]:
    """Return the operations that run pixel by pixel with the layer before them, whose currents then need no memory."""
    pairs = zip(network.operations, network.operations[1:], strict=False)
    return {
        op: before
        for before, op in pairs
        if isinstance(op, Fire | Keep) and isinstance(before, Weights) and op.inputs == [before.output]
        if network.readers(before.output) == 1
    }


def memory_kind(network: Network, value: Value) -> str:
    """Return the kind of memory of a value."""
    if value.spikes:
        return "spikes"
    makers = [op for op in network.operations if op.output is value]
    if any(isinstance(op, Keep) for op in makers):
        return "small" if network.input in makers[0].inputs else "kept" if network.bounds[value] <= PEAK else "values"
    counts = all(op.counts for op in makers) and network.bounds.get(value, 128) <= 127
    return "small" if counts and value is not network.output else "values"


def count_padded(network: Network, op: Weights) -> int:
    """Return how many sums a layer writes for a pixel: in integers, C takes four weights at a time."""
    return -(-len(op.bias) // 4) * 4 if network.integers and op.groups == 1 else len(op.bias)


def plan_buffers(network: Network, fused: dict[Operation, Weights]) -> tuple[list[Buffer], dict[Value, Buffer]]:
    """Give each value a buffer; one serves several whose times do not overlap."""
    operations = network.operations
    # weights that run with the neurons behind them read their input until these have run
    last = {value: i + (op in fused.values()) for i, op in enumerate(operations) for value in op.inputs}
    buffers: list[Buffer] = []
    places: dict[Value, Buffer] = {}
    for i, op in enumerate(operations):
        value, kind = op.output, memory_kind(network, op.output)
        # also where it is read in the next step
        persistent = isinstance(op, Keep) or any(value in other.inputs for other in operations[: i + 1])
        until = float("inf") if persistent else last.get(value, i)
        wider = isinstance(op, Weights) and count_padded(network, op) > value.shape[0]
        if value is network.output and not (persistent or wider):
            continue
        size = -(-value.size // 32) if value.spikes else value.shape[0] if op in fused.values() else value.size
        size += count_padded(network, op) - value.shape[0] if isinstance(op, Weights) else 0
        free = [b for b in buffers if b.until < i and b.kind == kind and not persistent]
        if isinstance(op, Affine | Sum) and not persistent:  # in place of an input that nobody reads any more
            in_place = [places[x] for x in op.inputs if x in places and places[x].until == i and places[x].kind == kind]
            free = in_place or free
        if free:
            buffer = min(free, key=lambda b: (b.size < size, abs(b.size - size)))
            if buffer.size < size:
                buffer.size, buffer.layer = size, op.name
        else:
            buffer = Buffer(f"{kind}{sum(b.kind == kind for b in buffers)}", kind, size, until, op.name)
            buffers.append(buffer)
        buffer.until = until
        places[value] = buffer
    return buffers, places

"""BatchNorm: over the time steps of a call, and as a part of the neuron's step."""

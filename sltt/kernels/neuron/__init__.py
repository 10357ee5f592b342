"""The step of a layer of neurons: the equations, and its forms in C++, Triton and TorchInductor."""

"""Other networks: neurons of other libraries under the rules here, conversion, twins of ANNs, NIR, ONNX and C.

A network with neurons of SpikingJelly, snnTorch, sinabs or Norse is given to a rule as it is; Norse's, which pass their
state through their calls, are wrapped in `sltt.interop.norse.KeepState`. No library is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sltt.interop.activations import QCFS
    from sltt.interop.c import to_c
    from sltt.interop.conversion import ConversionError, convert
    from sltt.interop.nir_export import to_nir
    from sltt.interop.nir_import import from_nir
    from sltt.interop.onnx import to_onnx
    from sltt.interop.twin import spiking

_HOMES = {
    "QCFS": "activations",
    "ConversionError": "conversion",
    "convert": "conversion",
    "from_nir": "nir_import",
    "spiking": "twin",
    "to_c": "c",
    "to_nir": "nir_export",
    "to_onnx": "onnx",
}

__all__ = ["QCFS", "ConversionError", "convert", "from_nir", "spiking", "to_c", "to_nir", "to_onnx"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sltt.interop.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

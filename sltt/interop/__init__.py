"""Networks of other libraries: their neurons under the rules here, conversion, NIR and ONNX.

A network with neurons of SpikingJelly, snnTorch, sinabs or Norse is given to a rule as it is; Norse's, which pass their
state through their calls, are wrapped in `sltt.interop.norse.KeepState`. No library is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sltt.interop.conversion import ConversionError, convert
    from sltt.interop.nir_export import to_nir
    from sltt.interop.nir_import import from_nir
    from sltt.interop.onnx import to_onnx

_HOMES = {
    "ConversionError": "conversion",
    "convert": "conversion",
    "from_nir": "nir_import",
    "to_nir": "nir_export",
    "to_onnx": "onnx",
}

__all__ = ["ConversionError", "convert", "from_nir", "to_nir", "to_onnx"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sltt.interop.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Other networks: neurons of other libraries under the rules here, conversion, NIR, ONNX and C.

A network with neurons of SpikingJelly, snnTorch, sinabs or Norse is given to a rule as it is; Norse's, which pass their
state through their calls, are wrapped in `sltt.interop.norse.KeepState`. No library is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sltt.interop.c import to_c as to_c
from sltt.interop.conversion import ConversionError as ConversionError, convert as convert
from sltt.interop.onnx import to_onnx as to_onnx

if TYPE_CHECKING:
    from sltt.interop.chips import check_chip as check_chip
    from sltt.interop.nir_export import to_nir as to_nir
    from sltt.interop.nir_import import from_nir as from_nir
    from sltt.interop.snntorch import to_snntorch as to_snntorch


def __getattr__(name: str) -> Any:
    homes = {"to_nir": "nir_export", "from_nir": "nir_import", "check_chip": "chips", "to_snntorch": "snntorch"}
    home = homes.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sltt.interop.{home}"), name)

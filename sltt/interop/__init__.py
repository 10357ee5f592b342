"""Networks of other libraries: their neurons under the rules here, conversion, NIR and ONNX.

A network with neurons of SpikingJelly, snnTorch, sinabs or Norse is given to a rule as it is; Norse's, which pass their
state through their calls, are wrapped in `sltt.interop.norse.KeepState`. No library is imported before it is used.
"""

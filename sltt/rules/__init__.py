"""Learning rules: each turns a batch into gradients, and differs only in which of them it keeps."""

from sltt.rules.base import Rule
from sltt.rules.batch import Output
from sltt.rules.mixed import Mixed
from sltt.rules.ottt import OTTT
from sltt.rules.rate import RateBased
from sltt.rules.truncated import BPTT, SLTT, TBPTT, Truncated
from sltt.rules.unrolling import unroll

# every rule, in the order of the help; tests/rules/test_shipped.py says what else a new one needs
SHIPPED: tuple[type[Rule], ...] = (SLTT, BPTT, TBPTT, OTTT, RateBased, Mixed)

__all__ = ["BPTT", "OTTT", "SHIPPED", "SLTT", "TBPTT", "Mixed", "Output", "RateBased", "Rule", "Truncated", "unroll"]

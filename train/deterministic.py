"""What a run that is to be repeated bit for bit needs beside XLA's own flag for it."""

import json
from typing import Any

from jax.stages import Lowered
from jaxlib.mlir import ir

_BACKWARD = "__cudnn$fmhaSoftmaxBackward"


def fix_order_of_attention(lowered: Lowered) -> None:
    """Has cuDNN add up the gradients of attention in a fixed order, in every layer.

    XLA's flag asks for that as well, but of the first of several equal layers alone, and then
    finds no program for the others (openxla/xla pull request 46500); asked for in each call
    beforehand, they stay equal.

    Args:
        lowered: is changed in place; nothing in it where attention is not cuDNN's.
    """

    def visit(operation: Any) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call":
            attributes = operation.attributes
            if ir.StringAttr(attributes["call_target_name"]).value == _BACKWARD:
                config = json.loads(ir.StringAttr(attributes["backend_config"]).value)
                config["cudnn_fmha_backend_config"]["force_deterministic"] = True
                attributes["backend_config"] = ir.StringAttr.get(json.dumps(config))
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir("stablehlo")
    with module.context:
        module.operation.walk(visit)

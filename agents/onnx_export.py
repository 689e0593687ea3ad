"""A policy as one ONNX file, for programs without Python or torch.

The graph is written node by node: a dozen nodes, one dependency, the same bytes every time. torch's exporter would
bring a second package and graphs that change with its version.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hpo_env.observations import FEATURES

from .files import write_atomically
from .optional import require
from .policy import OBSERVATION_CLIP, ControlPolicy
from .policy_file import FORMAT_VERSION

OPSET, IR_VERSION = 17, 8
"""Of 2022: all that is needed here, and every runtime in use knows them."""


def export(policy: ControlPolicy, path: Path | str) -> None:
    """Write `policy` as an ONNX file, whole or not at all.

    Its input is `observation`, float32 `[batch, features]`; its output is `action`, float32 `[batch, controls]` in
    -1..1. Normalization and clipping are inside. Infinite observations count as the ends of the range; a row with a NaN
    gives NaN, which stays where it is (`hpo_env.actions.move`), as it does in torch.

    The file's metadata holds, each as JSON: the fields of `PolicyHeader`; `feature_bounds`, the range to which each
    feature is clipped before; the policy's `digest`; and the `format_version` that features and controls belong to.

    Raises:
        ImportError: the package onnx is not installed.
        OSError: the file could not be written; an old one stays.
    """
    model = _model(policy)
    metadata = {
        **asdict(policy.header),
        "feature_bounds": {
            feature.name: (feature.low, feature.high) for feature in FEATURES if feature.name in policy.header.features
        },
        "digest": policy.digest,
        "format_version": FORMAT_VERSION,
    }
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    write_atomically(Path(path), model.SerializeToString(deterministic=True))


def _model(policy: ControlPolicy) -> Any:
    """What `ControlPolicy.forward` does, as an `onnx.ModelProto`."""
    onnx = require("onnx", extra="onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes, constants = [], []

    def constant(name: str, value: Any, dtype: Any = np.float32) -> str:
        constants.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(kind: str, *inputs: str, output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def clip(x: str, limit: float, output: str) -> str:
        return node("Clip", x, constant(f"{output}.least", -limit), constant(f"{output}.most", limit), output=output)

    x = node("Sub", "observation", constant("mean", policy.mean), output="centred")
    x = node("Div", x, constant("std", policy.std), output="normalized")
    x = clip(x, OBSERVATION_CLIP, output="clipped")
    for name, layer in policy.network.named_children():
        if isinstance(layer, nn.Linear):
            weight, bias = (constant(f"{name}.{part}", value.detach()) for part, value in layer.named_parameters())
            x = node("Gemm", x, weight, bias, output=f"linear.{name}", transB=1)
        else:
            x = node("Tanh", x, output=f"tanh.{name}")
    header = policy.header
    x = clip(x, 1.0, output="bounded")
    first = constant("first", [header.features.index("first_decision")], np.int64)
    share = node("Gather", "observation", first, output="first_decision", axis=1)
    share = node("Clip", share, constant("no", 0.0), constant("yes", 1.0), output="whether_first")
    share = node("Mul", share, constant("rest", 1 - header.strength), output="more_at_first")
    share = node("Add", share, constant("strength", header.strength), output="share")
    node("Mul", x, share, output="action")

    observation = helper.make_tensor_value_info("observation", float32, ["batch", len(header.features)])
    action = helper.make_tensor_value_info("action", float32, ["batch", len(header.controls)])
    graph = helper.make_graph(nodes, "policy", [observation], [action], constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, producer_name="hyperpilot", ir_version=IR_VERSION, opset_imports=[opset])

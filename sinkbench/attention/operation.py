"""The attention of a declaration as one operation on plain tensors, for authors of plugins and for notebooks.

Shapes: b sequence of the batch, h head, g kv head, t position, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sinkbench.api import AttentionSpec, ParameterSpec, ScoreBias
from sinkbench.attention.backends import Use, choose
from sinkbench.attention.reference import Problem
from sinkbench.errors import PluginError

WHERE = "sinkbench.api.attention"


def attention(
    spec: AttentionSpec,
    query_bhtd: Tensor,
    key_bgtd: Tensor,
    value_bgtd: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    position_bias: ScoreBias | None,
    position_parameters: Mapping[str, Tensor],
    prefix: int,
    document_start: Tensor | None,
    backend: str,
) -> Tensor:
    """See ``sinkbench.api.attention``."""
    _check_tensors(query_bhtd, key_bgtd, value_bgtd)
    heads, length, size = query_bhtd.shape[1:]
    sizes = {"heads": heads, "kv_heads": key_bgtd.shape[1], "head_size": size}
    _check_parameters("parameters", _needed(spec), parameters, sizes)
    learned = position_bias.parameters if position_bias is not None else {}
    _check_parameters("position_parameters", learned, position_parameters, sizes)
    if not 0 <= prefix <= length:
        raise PluginError(WHERE, f"prefix {prefix} of {length} positions", "give 0 to as many")
    if document_start is not None:
        _check_documents(document_start, query_bhtd, prefix)
    use = Use(
        device=query_bhtd.device.type,
        head_size=size,
        position_bias=position_bias is not None,
        learned_bias=any(x.requires_grad for x in position_parameters.values()),
        prefix=prefix > 0,
        documents=document_start is not None,
        half=query_bhtd.dtype in (torch.bfloat16, torch.float16),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    position = torch.arange(length, device=query_bhtd.device)
    problem = Problem(
        spec=spec,
        query_bhqd=query_bhtd,
        key_bgkd=key_bgtd,
        value_bgkd=value_bgtd,
        position_q=position,
        position_k=position,
        aligned=True,
        scale=size**-0.5 if spec.scale is None else spec.scale,
        heads=torch.arange(heads, device=query_bhtd.device),
        parameters=parameters,
        position_bias=position_bias,
        position_parameters=position_parameters,
        prefix=prefix,
        document_start_bk=None if document_start is None else document_start.int(),
    )
    return choose(spec, use, backend, where=f"{WHERE}: backend").run(problem)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = " and ".join(str(list(x.shape)) for x in (query, key, value))
    alike = query.dim() == key.dim() == 4 and key.shape == value.shape
    if not alike or query[:, 0].shape != key[:, 0].shape or query.shape[1] % key.shape[1]:
        raise PluginError(
            WHERE,
            f"query, key and value have shapes {shapes}",
            "give [b, h, t, d], [b, g, t, d] and [b, g, t, d], h a multiple of g",
        )
    if len({(x.dtype, x.device) for x in (query, key, value)}) > 1 or not query.is_floating_point():
        raise PluginError(
            WHERE,
            "query, key and value differ in dtype or device, or hold integers",
            "give floating-point tensors of one dtype on one device",
        )
    if query.numel() == 0:
        raise PluginError(
            WHERE, f"there is nothing in tensors of shapes {shapes}", "give at least one position"
        )


def _check_documents(start: Tensor, query: Tensor, prefix: int) -> None:
    batch, _, length, _ = query.shape
    whole = start.dtype in (torch.int32, torch.int64)
    if list(start.shape) != [batch, length] or not whole or start.device != query.device:
        raise PluginError(
            WHERE,
            f"document_start has shape {list(start.shape)}, {start.dtype} on {start.device}",
            f"give int32 of shape [{batch}, {length}] on {query.device}",
        )
    if prefix:
        problem = "a prefix whose positions see one another is given together with document_start"
        raise PluginError(WHERE, problem, "leave one of them out")
    begins = start == torch.arange(length, device=start.device)
    goes_on = torch.zeros_like(begins)
    goes_on[:, 1:] = start[:, 1:] == start[:, :-1]
    wrong = (~(begins | goes_on)).nonzero()
    if len(wrong):
        row, at = wrong[0].tolist()
        raise PluginError(
            WHERE,
            f"document_start of sequence {row} is {int(start[row, at])} at position {at}",
            "write the position itself where a document begins, else what the position before has",
        )


def _needed(spec: AttentionSpec) -> dict[str, ParameterSpec]:
    """Declared parameters that the operation reads: not those of the layer around it."""
    inner = replace(spec, head_transform=None, output_gate=None)
    return {name: spec.parameters[name] for name in sorted(inner._named())}


def _check_parameters(
    what: str, declared: Mapping[str, ParameterSpec], given: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> None:
    lacking = sorted(declared.keys() - given.keys())
    if lacking:
        raise PluginError(
            WHERE, f"{what} has no {', '.join(lacking)}", "give a tensor for each that is declared"
        )
    for name, parameter in declared.items():
        named = [sizes.get(size, size) if isinstance(size, str) else size for size in parameter.shape]
        if list(given[name].shape) != named and "hidden" not in named:
            shape = list(given[name].shape)
            raise PluginError(WHERE, f"{what}: {name} has shape {shape}", f"it is declared as {named}")

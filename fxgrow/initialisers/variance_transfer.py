"""Variance transfer: new units in pairs that cancel, incoming weights (V, V), outgoing weights (Z, -Z).

Yuan, Savarese, Maire: "Accelerated Training via Incrementally Growing Neural Networks using Variance Transfer and
Learning Rate Adaptation", NeurIPS 2023, arXiv 2306.12700, section 3.1. Rows of alpha `[k, P]` are V, those of omega
`[k, taps, O]` are Z, both Kaiming-normal for the width as it will be. In the paper old weights are rescaled as well, so
that activations keep their variance when the new units no longer cancel, and each stage has its learning rate; here the
function stays and the learning rate is the user's.
"""

from __future__ import annotations

import math

import torch

from fxgrow.analysis.widths import GrowableWidth
from fxgrow.axes.axes import unit_entries
from fxgrow.errors import PlanError
from fxgrow.graph.graph import lookup
from fxgrow.initialisers.copies import CopyInitialiser
from fxgrow.initialisers.registry import InitialiserRequest, Outgoing, Proposal, initialiser
from fxgrow.rewriting.values import CopiedUnits, Values


@initialiser("variance-transfer", moments=False)
class VarianceTransfer(CopyInitialiser):
    """See the top of the file."""

    def write(self, request: InitialiserRequest, width: GrowableWidth, proposal: Proposal, values: Values) -> Outgoing:
        """An even number of new units."""
        analysed, k, generator = request.analysed, request.additions[width.name], request.generator
        if k % 2:
            raise PlanError(
                f"method='variance-transfer' adds units in pairs: {k} more at width {width.name!r}, give an even "
                f"number of its steps ({width.step})."
            )
        size = width.var.size
        # followers of both units of a pair are those of one old unit
        origin = torch.randint(size, (k // 2,), generator=generator).repeat_interleave(2)
        incoming = {(p.weight, p.out_dim): p for p in width.producers}
        outgoing = {(p.weight, p.in_dim): p for p in width.consumers}
        for name, dims in analysed.structure.parameters.items():
            for dim, axis in enumerate(dims):
                use = incoming.get((name, dim)) or outgoing.get((name, dim))
                if use is None:
                    continue
                old, entries = lookup(analysed.gm, name), unit_entries(axis, width.var).shape[1]
                fan_in = old[0].numel() if use.experts else old.numel()
                fan_in //= old.shape[use.out_dim]
                if dim == use.in_dim:
                    fan_in = fan_in // old.shape[dim] * (size + k) * entries
                shape = [*old.shape[:dim], k // 2, 1, entries, *old.shape[dim + 1 :]]
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(old) * math.sqrt(2 / fan_in)
                pairs = torch.cat([drawn, -drawn if dim == use.in_dim else drawn], dim + 1)
                values.new.setdefault(name, {})[width.name, dim] = pairs.flatten(dim, dim + 2)
        shares = torch.cat([torch.ones(size), torch.zeros(k)])
        values.copies[width.name] = CopiedUnits(origin, shares)
        return []

"""The public verbs: profile, plan, apply, grow, widen, explain, try_widths."""

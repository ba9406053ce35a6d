"""Drawing: ``f(table, *, ax=None) -> Axes``, from a tidy table; nothing is computed here."""

"""The stages on Ray: the only code that imports it, and the only place where maths and disk meet."""

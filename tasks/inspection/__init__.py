"""Inspection: what is counted of one update, what the codecs make of it, and what that says. Verb: inspect_update."""

"""Lineage: where a version of a line comes from, as a graph with key figures, and what it looks like.

`graph.py` reads it from the store and from what the registry says; `measures.py` adds what is measured; the other rooms
write it: `picture.py` as SVG, `page.py` as a page that stands alone, `mermaid.py` for Markdown.
"""

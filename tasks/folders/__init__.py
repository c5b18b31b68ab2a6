"""One-shot merges of Hugging Face folders, by the mergers of lines but without a store: see `merge`."""

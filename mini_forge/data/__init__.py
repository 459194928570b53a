"""Rows -> tokens -> batches: `tasks` reads and checks, `chat` spells, `tokenizer` encodes, `packing` and `batches` arrange."""

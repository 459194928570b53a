"""Rows to tokens to batches.

`rows` reads files, `tasks` says what a row means, `chat` spells it (through `sandbox`), `tokenizer` encodes it,
`batches` finds what is trained on and arranges documents, `packing` fills rows with them.
"""

"""Using a model: generation, chat, scores and evaluation.

`generate` samples tokens, `spans` keeps them within a context, `metrics` compares texts, `evaluate` runs a dataset,
`chat` talks. Losses come in as arguments: this room does not know `training`.
"""

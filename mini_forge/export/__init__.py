"""Other programs' formats: GGUF, which llama.cpp and what is built on it (Ollama, LM Studio) run."""

TYPES = ("f16", "bf16", "q8_0")  # of the weights in a GGUF file

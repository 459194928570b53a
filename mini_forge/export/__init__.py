"""Other programs' formats: GGUF, which llama.cpp and what is built on it (Ollama, LM Studio) run."""

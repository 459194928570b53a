"""The mathematics of the decoder: pure functions, modules, storage. No files, no printing."""

"""The vLLM boundary: the only package that knows vLLM."""

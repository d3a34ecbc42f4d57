"""What `tuneserve bench` measures, and how it is written down. Light: no torch, mlflow, prefect or vllm, so that it runs beside any vLLM server."""

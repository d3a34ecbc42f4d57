"""tuneserve: recipe -> dataset -> adapter -> registered version -> served by vLLM, unmerged, under a registry alias."""

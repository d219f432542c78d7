"""Run engines that are servers of their own (SGLang, vLLM): their processes, their requests and their weights."""

"""Engines that are servers of their own (SGLang, vLLM): their processes, requests and weights."""

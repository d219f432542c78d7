#!/usr/bin/env bash
# Builds .venvs/agents: the frameworks of docs/agents.md in an environment of their own, since agents run as commands
# there and their pins are none of the trainer's.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3.11}" -m venv .venvs/agents
.venvs/agents/bin/pip install -q openai==3.57.0 openai-agents==0.24.0 'pydantic-ai-slim[openai,anthropic]==2.68.0' \
  langgraph==1.2.24 langchain==1.5.2 langchain-openai==1.7.4 smolagents==1.26.0 mcp==2.3.0 anthropic==2.14.0

"""The HTTP endpoint that an agent asks: its server, and the dialects of OpenAI and Anthropic. May import envs.agent."""

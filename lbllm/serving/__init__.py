"""serving: a model behind OpenAI's HTTP interface, for programs that speak it; ``python -m lbllm serve``."""
